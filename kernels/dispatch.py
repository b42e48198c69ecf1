"""Which implementation of an op runs.

Every op file offers one public function. It calls `choose` with the implementations that the file holds;
`QIRL_KERNELS` = auto | reference | triton | cuda forces one. `auto` takes the fastest one that serves the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

MODES = ("auto", "reference", "triton", "cuda")
_ORDER = ("cuda", "triton", "native", "fused", "reference")


def choose(op: str, **implementations: Callable) -> Callable:
    """The implementation of `op` among `implementations` that serve its tensors (always with `reference`).

    native: csrc's C++ or CUDA op for the tensors' device. fused: torch ops with fewer passes than the reference.
    Raises ValueError if QIRL_KERNELS is unknown or asks for one that `op` does not have.
    """
    mode = os.environ.get("QIRL_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"QIRL_KERNELS={mode} is unknown; use one of {', '.join(MODES)}")
    if mode != "auto":
        if mode not in implementations:
            raise ValueError(f"QIRL_KERNELS={mode}: {op} has only {', '.join(implementations)}; set QIRL_KERNELS=auto")
        return implementations[mode]
    return next(implementations[name] for name in _ORDER if name in implementations)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 if any tensor is float64: what every reference computes in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
