"""Collectives along one axis of the mesh that autograd goes through, on tensors [N, ...] cut or replicated by rows.

N rows over `size` ranks: each holds n = ceil(N / size) of them, in order; the last ranks' missing ones are zeros.

    function         forward                        backward                        from, to
    copy             as it is                       all-reduce                      replicated [N], used in parts
    reduce           all-reduce                     as it is                        partial [N], replicated [N]
    split            own rows                       all-gather                      replicated [N], cut [n]
    join             all-gather                     own rows                        cut [n], replicated [N]
    gather           all-gather                     reduce-scatter                  cut [n], [N] used in parts
    scatter          reduce-scatter                 all-gather                      partial [N], cut [n]
    gather_columns   all-gather of the last dim     own columns (of the sum)        columns [N, C / size], [N, C]

`copy` and `reduce` stand around a tensor parallel region, `gather` and `scatter` where its tokens are cut outside of it
(Megatron-LM, arXiv 1909.08053 section 3 and arXiv 2205.05198 section 4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from qirl.parallel.mesh import Axis

Move = Callable[[torch.Tensor, Axis], torch.Tensor]


def copy(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _Pair.apply(x, axis, _same, _total)


def reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _Pair.apply(x, axis, _total, _same)


def split(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    rows = len(x)
    return _Pair.apply(x, axis, own_rows, lambda grad, axis: _all_rows(grad, axis)[:rows])


def join(x: torch.Tensor, axis: Axis, rows: int) -> torch.Tensor:
    return _Pair.apply(x, axis, lambda x, axis: _all_rows(x, axis)[:rows], own_rows)


def gather(x: torch.Tensor, axis: Axis, rows: int | None = None) -> torch.Tensor:
    """rows: N; None: all n * size rows."""
    return _Pair.apply(x, axis, lambda x, axis: _all_rows(x, axis)[:rows], _sum_of_own_rows)


def scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    rows = len(x)
    return _Pair.apply(x, axis, _sum_of_own_rows, lambda grad, axis: _all_rows(grad, axis)[:rows])


def gather_columns(x: torch.Tensor, axis: Axis, partial: bool) -> torch.Tensor:
    """partial: whether each rank's gradient of the result is a part of the sum."""
    return _Pair.apply(x, axis, _all_columns, _sum_of_own_columns if partial else _own_columns)


class _Pair(torch.autograd.Function):
    """One move in the forward and another in the backward."""

    @staticmethod
    def forward(ctx, x, axis: Axis, there: Move, back: Move):
        ctx.axis, ctx.back = axis, back
        return there(x, axis)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.axis), None, None, None


def _same(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x.view_as(x)


def _total(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return axis.all_reduce(x.clone(memory_format=torch.contiguous_format))


def own_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's rows of x [N, ...]: [n, ...], zeros where there are none left."""
    each = -(-len(x) // axis.size)
    own = x[each * axis.rank : each * (axis.rank + 1)]
    return _filled(own, each)


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - len(x)
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


def _all_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    whole = x.new_empty(len(x) * axis.size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=axis.group)
    return whole


def _sum_of_own_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    each = -(-len(x) // axis.size)
    own = x.new_empty(each, *x.shape[1:])
    dist.reduce_scatter_tensor(own, _filled(x, each * axis.size).contiguous(), group=axis.group)
    return own


def _all_columns(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return torch.cat(_all_rows(x, axis).chunk(axis.size), -1)


def _own_columns(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x.chunk(axis.size, -1)[axis.rank]


def _sum_of_own_columns(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _sum_of_own_rows(torch.cat(x.chunk(axis.size, -1)), axis)
