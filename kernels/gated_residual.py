"""Residual with a bounded gate, one modulation row per token by index.

    out = x + tanh(gate[row]) * y

Bytes: x and y read, out written, 3 * N * D * itemsize; backward: dout and y read, dy written. The gate's gradient is a
sum over the tokens of a row, in two stages of a fixed order (`rows.Chunks`): no atomics.
"""

from __future__ import annotations

import torch

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.rows import Chunks
from qirl.kernels.tritons import jit, tl, triton


def reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(x)
    step = torch.tanh(gate.to(dtype)).index_select(0, row) * y.to(dtype)
    return step.add_(x).to(x.dtype)


@jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def _forward_kernel(x, y, gate, row, out, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = token * width + column
    g = tl.load(gate + tl.load(row + token) * width + column, inside, other=0).to(tl.float32)
    value = tl.load(x + at, inside, other=0).to(tl.float32)
    value += tanh(g) * tl.load(y + at, inside, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(dout, y, gate, dy, partial, order, chunk_row, begin, end, width, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(chunk_row + chunk)
    inside = column < width
    g = tanh(tl.load(gate + own * width + column, inside, other=0).to(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(begin + chunk), tl.load(end + chunk)):
        at = tl.load(order + place) * width + column
        d = tl.load(dout + at, inside, other=0).to(tl.float32)
        total += d * tl.load(y + at, inside, other=0).to(tl.float32)
        tl.store(dy + at, (g * d).to(dy.dtype.element_ty), inside)
    tl.store(partial + chunk * width + column, total * (1 - g * g), inside)


@torch.library.custom_op(
    "qirl::gated_residual", mutates_args=(), schema="(Tensor x, Tensor y, Tensor gate, Tensor row) -> Tensor"
)
def _forward(x, y, gate, row):
    x, y, gate, row = (t.contiguous() for t in (x, y, gate, row))
    out, (tokens, width) = torch.empty_like(x), x.shape
    if out.numel():
        block = min(tritons.BLOCK, triton.next_power_of_2(width))
        _forward_kernel[(tokens, triton.cdiv(width, block))](x, y, gate, row, out, width, BLOCK=block)
    return out


@_forward.register_fake
def _(x, y, gate, row):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::gated_residual_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor y, Tensor gate, Tensor row) -> (Tensor, Tensor)",
)
def _backward(dout, y, gate, row):
    dout, y, gate = (t.contiguous() for t in (dout, y, gate))
    dy, width, chunks = torch.empty_like(y), y.shape[1], Chunks(row, len(gate))
    partial = chunks.partial(width)
    if dy.numel():
        block = min(1024, triton.next_power_of_2(width))
        grid = (len(partial), triton.cdiv(width, block))
        _backward_kernel[grid](dout, y, gate, dy, partial, *chunks.tensors, width, BLOCK=block)
    return dy, chunks.reduce(partial).to(gate.dtype)


@_backward.register_fake
def _(dout, y, gate, row):
    return tritons.contiguous_like(y), tritons.contiguous_like(gate)


def _gradients(ctx, dout):
    dy, dgate = _backward(dout, *ctx.saved_tensors)
    return dout, dy, dgate, None


_forward.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """x, y [N, D], gate [R, D], row int64 [N] in [0, R): float32 inside, result in x's dtype."""
    return choose("gated_residual", reference=reference, **tritons.on(_forward, x, y, gate))(x, y, gate, row)
