"""Residual with a bounded gate, one modulation row per token by index.

    out = x + tanh(gate[row]) * y

Bytes: x and y read, out written; 3 * N * D * itemsize.
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose, compute_dtype


def reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(x)
    step = torch.tanh(gate.to(dtype)).index_select(0, row) * y.to(dtype)
    return step.add_(x).to(x.dtype)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """x, y [N, D], gate [R, D], row int64 [N] in [0, R): float32 inside, result in x's dtype."""
    return choose("gated_residual", reference=reference)(x, y, gate, row)
