"""Sums and means over the ragged token axis: the one place where packed losses and log-probabilities are reduced."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qirl.kernels.tritons import jit, tl


def row_mean(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Mean over each row's tokens and channels: [sum(lengths), C] -> [R], without atomics.

    lengths are on the host. A row's mean does not depend on the other rows.
    """
    if len(set(lengths)) == 1:
        return values.reshape(len(lengths), -1).mean(1)
    if not lengths:
        return values.sum().reshape(1)[:0]
    return torch.stack([part.mean() for part in values.split(list(lengths))])


@functools.lru_cache(maxsize=256)
def offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [R + 1]: the token at which each row begins, and the end. Kept, since a run meets the same lengths again."""
    return torch.tensor([0, *lengths]).to(device, non_blocking=True).cumsum(0)


@jit
def row_total(sums, begin, end, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """float64: the sum of sums[STRIDE * i] over the tokens begin .. end-1."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        total += tl.load(sums + token * STRIDE, token < end, other=0).to(tl.float64)
    return tl.sum(total)
