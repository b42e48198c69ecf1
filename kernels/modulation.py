"""Modulation rows [R, D] that tokens [N, D] name by index: how kernels read them, and sum their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qirl.kernels import tritons
from qirl.kernels.tritons import jit, tl, triton


@dataclass(frozen=True)
class Modulation:
    """Modulation rows [R, D] of one op: views of one linear layer's output are read where they lie."""

    tensors: tuple[torch.Tensor | None, ...]
    stride: int  # elements between two rows, the same for all tensors

    @classmethod
    def of(cls, x: torch.Tensor, row: torch.Tensor, *tensors: torch.Tensor | None) -> Modulation:
        """Of tokens x [N, D], row int64 [N]; None for rows that the op goes without."""
        given = [t for t in tensors if t is not None]
        shapes = {tuple(t.shape) for t in given}
        assert row.shape == x.shape[:1] and shapes == {(len(given[0]), x.shape[1])}, (
            x.shape,
            row.shape,
            [t.shape for t in given],
        )
        if len({t.stride() for t in given}) > 1 or given[0].stride(1) != 1:
            tensors = tuple(None if t is None else t.contiguous() for t in tensors)
        return cls(tensors, tensors[0].stride(0))


@jit
def program_tokens(row, tokens, stride, TOKENS: tl.constexpr):
    """A program's tokens [TOKENS], which exist, and where their modulation begins."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    return token, there, tl.load(row + token, there, other=0) * stride


@jit
def places(row, tokens, width, stride, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program's [TOKENS, BLOCK] values: where they and their modulation lie, and which exist."""
    token, there, of_row = program_tokens(row, tokens, stride, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return token[:, None] * width + column, of_row[:, None] + column, there[:, None] & (column < width)


@dataclass(frozen=True)
class Tile:
    """Values that a program holds at a time: whole rows of narrow tokens, columns of wide ones."""

    tokens: int
    block: int
    warps: int
    rest: int = 0  # columns after `block`, where a program needs a whole row (`norm_rows`)

    @classmethod
    def of(cls, width: int, widest: int | None = None, threads: int = 1) -> Tile:
        """widest: the most columns, all where a program needs a whole row; threads: how many times the usual number."""
        whole = triton.next_power_of_2(width)
        block = min(whole, widest or whole)
        tokens = max(1, 1024 // block)
        warps = min(16, threads * tritons.warps(tokens * block))
        parted = widest is None and width <= block // 4 * 3 and block // 2 >= 256 * warps  # 8 values a thread: 16 bytes
        return cls(tokens, block // 2, warps, block // 4) if parted else cls(tokens, block, warps)

    def grid(self, tokens: int, width: int) -> tuple[int, int]:
        return triton.cdiv(tokens, self.tokens), triton.cdiv(width, self.block + self.rest)

    @property
    def sizes(self) -> dict[str, int]:
        """What a launch is given."""
        return {"TOKENS": self.tokens, "BLOCK": self.block, "num_warps": self.warps}

    @property
    def row_sizes(self) -> dict[str, int]:
        """What a launch of a kernel on whole rows is given."""
        lanes = min(self.rest or self.block, max(1, 32 * self.warps // self.tokens))
        return self.sizes | {"REST": self.rest, "LANES": lanes}


class Chunks:
    """Tokens by their row, in chunks: what a kernel needs to sum over the tokens of each row in two stages.

    A program sums one chunk in order, then `reduce` adds a row's chunks in a fixed order: no atomics, and the same bits
    on every run, for rows in any order. Row r's chunks begin at offset[r] // size + r, where offset counts the tokens
    of the rows before it: N // size + R chunks are enough for every split of N tokens, and the host need not know it.
    Some stay empty.
    """

    WARPS = 2048  # where tokens suffice: 16 a multiprocessor of a Hopper; not asked of the device, for equal bits
    LARGEST = 64  # tokens

    def __init__(self, row: torch.Tensor, rows: int, tile: Tile, width: int):
        """row int64 [N] in [0, rows); the tile of the kernel that sums."""
        tokens, (_, across) = len(row), tile.grid(len(row), width)
        fitting = triton.next_power_of_2(max(1, tokens * across * tile.warps // self.WARPS))
        self.size = max(tile.tokens, min(self.LARGEST, fitting))
        self.rows, self.width = rows, width
        self.grid = (tokens // self.size + rows, across)
        self.order = torch.empty(tokens, dtype=torch.int32, device=row.device)
        self.spans = torch.empty(self.grid[0], 3, dtype=torch.int32, device=row.device)  # row, begin, end in order
        self.first = torch.empty(rows + 1, dtype=torch.int32, device=row.device)  # each row's first chunk, and the end
        if rows:
            block = min(4096, triton.next_power_of_2(max(tokens, 16)))
            _table_kernel[(rows, triton.cdiv(max(tokens, 1), block))](
                row.contiguous(), self.order, self.spans, self.first, tokens, self.size,
                BLOCK=block, num_warps=max(1, block // 256),
            )  # fmt: skip

    def partial(self, sums: int) -> torch.Tensor:
        """Where the sums of the chunks go, float32 [sums, chunks, D]."""
        return torch.empty(sums, self.grid[0], self.width, dtype=torch.float32, device=self.order.device)

    def reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[sums, chunks, D] -> [sums, R, D]; 0 for a row without tokens."""
        out = torch.empty(len(partial), self.rows, self.width, dtype=dtype, device=partial.device)
        if out.numel():
            grid = self.rows, triton.cdiv(self.width, 32), len(partial)
            _reduce_kernel[grid](partial, self.first, out, self.grid[0], self.width, CHUNKS=64, BLOCK=32)
        return out


@jit
def _table_kernel(row, order, spans, first, tokens, size, BLOCK: tl.constexpr):
    """A stable counting sort: each program finds one row's tokens among BLOCK tokens, the row's first program also writes
    the spans of its chunks."""
    own, block = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    below, upto, earlier = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, tokens, BLOCK, loop_unroll_factor=2):
        value = tl.load(row + start + at, start + at < tokens, other=own + 1)
        below += (value < own).to(tl.int32)
        upto += (value <= own).to(tl.int32)
        earlier += ((value == own) & (start < block * BLOCK)).to(tl.int32)
    before, until = tl.sum(below), tl.sum(upto)
    token = block * BLOCK + at
    mine = (tl.load(row + token, token < tokens, other=own + 1) == own).to(tl.int32)
    tl.store(order + before + tl.sum(earlier) + tl.cumsum(mine) - 1, token, mine > 0)
    if block == 0:
        chunk, after = before // size + own, until // size + own + 1
        for start in range(chunk, after, BLOCK):
            number = start + at
            begin = tl.minimum(before + (number - chunk) * size, until)
            tl.store(spans + 3 * number, own, number < after)
            tl.store(spans + 3 * number + 1, begin, number < after)
            tl.store(spans + 3 * number + 2, tl.minimum(begin + size, until), number < after)
        tl.store(first + own, chunk)
        tl.store(first + own + 1, after)  # as the next row's program writes it


@jit
def span(order, spans):
    """A program's row, and its tokens: from begin to end in `order`."""
    at = spans + 3 * tl.program_id(0)
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)


@jit
def tokens_in_order(order, start, end, TOKENS: tl.constexpr):
    """TOKENS tokens of a span from `start` on, and which exist."""
    place = start + tl.arange(0, TOKENS)
    return tl.load(order + place, place < end, other=0).to(tl.int64), place < end


@jit
def places_in_order(order, start, end, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """As `places`, for TOKENS tokens of a span from `start` on."""
    token, there = tokens_in_order(order, start, end, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return token[:, None] * width + column, there[:, None] & (column < width)


@jit
def _reduce_kernel(partial, first, out, chunks, width, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    row, sums = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(first + row + 1)
    total = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for start in range(tl.load(first + row), end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < end)[:, None] & (column < width)
        total += tl.load(partial + (sums * chunks + chunk)[:, None] * width + column, inside, other=0)
    value = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + (sums * tl.num_programs(0) + row) * width + column, value, column < width)
