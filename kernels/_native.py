"""Loads what `python setup.py build_ext --inplace` made of csrc/, if it was built.

`qirl::philox_words` and `qirl::philox_normal` then exist as torch ops for the CPU, and for CUDA where torch
sees a GPU and nvcc was there. Nothing here falls back: callers ask `has(device)` and choose.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent


@functools.cache
def load() -> bool:
    """True if the CPU part of csrc is built and loaded; loads the CUDA part too where it can run.

    Raises OSError if a library is there but cannot be loaded (built for another torch: build it again).
    """
    cpu, cuda = library("cpu"), library("cuda")
    if not cpu.is_file():
        return False
    torch.ops.load_library(cpu)
    if cuda.is_file() and torch.cuda.is_available():
        torch.ops.load_library(cuda)
    torch.library.register_fake("qirl::philox_words", lambda counter, seed: torch.empty_like(counter))
    torch.library.register_fake("qirl::philox_normal", _fake_normal)
    return True


def library(part: str) -> Path:
    """Where the library of `part` ("cpu" or "cuda") lies once it is built."""
    return _FOLDER / f"_native_{part}.so"


def has(device: torch.device) -> bool:
    """True if csrc serves tensors on `device`."""
    return load() and (device.type == "cpu" or (device.type == "cuda" and library("cuda").is_file()))


def _fake_normal(seed, prompt, sample_word, row, token, channels, step_word):
    return row.new_empty(row.shape[0], channels, dtype=torch.float32)


def philox_words(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 of counters [N, 4], uint32 in int64: words [N, 4] alike. seed in [0, 2^64)."""
    return torch.ops.qirl.philox_words(counter.contiguous(), _signed(seed))


def philox_normal(seed, prompt, sample, row, token, channels, step) -> torch.Tensor:
    """Normals float32 [N, channels]: arguments and float64 formula of `qirl.kernels.philox.reference`."""
    tensors = [t.contiguous() for t in (prompt, sample, row, token)]
    return torch.ops.qirl.philox_normal(_signed(seed), *tensors, channels, step)


def _signed(seed: int) -> int:
    """The 64 bits of `seed` as the signed integer that a torch op takes."""
    return seed - (1 << 64) if seed >> 63 else seed
