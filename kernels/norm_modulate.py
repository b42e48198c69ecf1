"""LayerNorm without affine times (1 + scale), one modulation row per token by index.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale[row])

Bytes: x read, y written, and the rows; 2 * N * D * itemsize. Source: adaLN of Peebles and Xie (DiT, 2023), scale only
as in Qwen-Image 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels.dispatch import choose, compute_dtype


def reference(x: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(dtype)).index_select(0, row)).to(x.dtype)


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x [N, D], scale [R, D], row int64 [N] in [0, R): float32 inside, result in x's dtype."""
    return choose("norm_modulate", reference=reference)(x, scale, row, eps)
