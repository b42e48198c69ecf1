"""Sums and means over the ragged token axis: the one place where packed losses and log-probabilities are reduced."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qirl.kernels.tritons import jit, tl, triton


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
    return torch.tensor([0, *lengths], device=device).cumsum(0)


class Chunks:
    """Tokens by their row, in chunks of at most SIZE: what a kernel needs to sum over the tokens of each row in two stages.

    A program sums one chunk in order, then `reduce` adds a row's chunks in order: the same bits on every run, for rows in
    any order. N // SIZE + R chunks are enough for every split of N tokens: the host need not know it, surplus ones are
    empty.
    """

    SIZE = 16

    def __init__(self, row: torch.Tensor, rows: int):
        """row int64 [N] in [0, rows)."""
        ordered, order = torch.sort(row, stable=True)
        offset = torch.searchsorted(ordered, torch.arange(rows + 1, device=row.device))
        self.first = torch.zeros_like(offset)  # the chunk at which each row begins, and the end
        torch.cumsum((offset.diff() + self.SIZE - 1) // self.SIZE, 0, out=self.first[1:])
        number = torch.arange(len(row) // self.SIZE + rows, device=row.device)
        own = torch.searchsorted(self.first, number, right=True) - 1
        surplus, own = own >= rows, own.clamp(max=rows - 1)
        begin = offset[own] + (number - self.first[own]) * self.SIZE
        end = torch.minimum(begin + self.SIZE, offset[own + 1])
        self.tensors = order, own, begin.masked_fill(surplus, 0), end.masked_fill(surplus, 0)

    def partial(self, width: int) -> torch.Tensor:
        """Where the sums of the chunks go, float32 [chunks, width]."""
        chunk_row = self.tensors[1]
        return torch.empty(len(chunk_row), width, dtype=torch.float32, device=chunk_row.device)

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """[chunks, width] -> float32 [R, width]; 0 for a row without tokens."""
        width, rows = partial.shape[1], len(self.first) - 1
        out = torch.empty(rows, width, dtype=torch.float32, device=partial.device)
        if out.numel():
            block = min(256, triton.next_power_of_2(width))
            _reduce_kernel[(rows, triton.cdiv(width, block))](partial, self.first, out, width, BLOCK=block)
        return out


@jit
def _reduce_kernel(partial, first, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(tl.load(first + row), tl.load(first + row + 1)):
        total += tl.load(partial + chunk * width + column, inside, other=0)
    tl.store(out + row * width + column, total, inside)
