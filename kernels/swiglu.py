"""SwiGLU: silu(gate) * up. Bytes: two reads, one write; 3 * N * F * itemsize. Source: Shazeer, GLU variants (2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels.dispatch import choose, compute_dtype


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(gate)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [N, F] of one dtype: float32 inside, result in that dtype."""
    return choose("swiglu", reference=reference)(gate, up)
