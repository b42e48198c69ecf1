"""Triton where it is: kernels are compiled for CUDA tensors, and interpreted for any under TRITON_INTERPRET=1.

The interpreter is slow and there for tests: `auto` never chooses it. TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # other platforms: ops run their other implementations
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 2048  # elements of a program of an elementwise kernel: several 16-byte accesses of each thread in flight


def jit(kernel: Callable) -> Callable:
    """triton.jit, or the function as it is where there is no Triton."""
    return triton.jit(kernel) if triton is not None else kernel


def on(launch: Callable, *tensors: torch.Tensor) -> dict[str, Callable]:
    """{"triton": launch} where Triton serves these tensors, for `dispatch.choose`; float64 is left to the references."""
    if triton is None or any(t.dtype == torch.float64 for t in tensors):
        return {}
    serves = os.environ.get("QIRL_KERNELS") == "triton" if INTERPRETED else all(t.is_cuda for t in tensors)
    return {"triton": launch} if serves else {}


def over_elements(kernel, *tensors: torch.Tensor) -> None:
    """Runs an elementwise kernel(*tensors, count, BLOCK) over contiguous tensors of one shape; nothing if they are empty."""
    count = tensors[0].numel()
    if count:
        kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, BLOCK=BLOCK)


def tiles(tokens: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes of a kernel whose programs hold TOKENS tokens of CHANNELS (a power of two, at least 4) channels."""
    width = max(4, triton.next_power_of_2(channels))
    height = max(1, BLOCK // 2 // width)  # several tensors at a time must fit the registers
    return (triton.cdiv(tokens, height),), {"TOKENS": height, "CHANNELS": width}


def warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements in registers: 16 elements a thread at most."""
    return min(16, max(1, block // 512))


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """As kernels read them; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """An unset tensor of x's shape: what an op's fake returns where the kernel writes contiguously."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
