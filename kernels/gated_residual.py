"""Residual with a gate, one modulation row per token by index.

    out = x + tanh(gate[row]) * y,   or with the gate as it is: out = x + gate[row] * y

Bytes: x and y read, out written, 3 * N * D * itemsize; backward: dout and y read, dy written. The gate's gradient is a
sum over the tokens of a row, in two stages of a fixed order (`modulation.Chunks`): no atomics. The gate is bounded in
Qwen-Image 2.1, plain in 1.x.
"""

from __future__ import annotations

import torch

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.modulation import Chunks, Modulation, Tile, places, places_in_order, span
from qirl.kernels.tritons import jit, tl


def reference(x, y, gate, row, bounded=True) -> torch.Tensor:
    dtype = compute_dtype(x)
    gate = torch.tanh(gate.to(dtype)) if bounded else gate.to(dtype)
    return (gate.index_select(0, row) * y.to(dtype)).add_(x).to(x.dtype)


@jit
def gated(gate, BOUNDED: tl.constexpr):
    """The factor of y in float32."""
    gate = gate.to(tl.float32)
    return 2 * tl.sigmoid(2 * gate) - 1 if BOUNDED else gate


@jit
def before_gate(total, g, BOUNDED: tl.constexpr):
    """The gradient of the gate from that of its factor g."""
    return total * (1 - g * g) if BOUNDED else total


@jit
def _forward_kernel(
    x, y, gate, row, out, tokens, width, stride, BOUNDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at, of_row, inside = places(row, tokens, width, stride, TOKENS, BLOCK)
    value = tl.load(x + at, inside, other=0).to(tl.float32)
    step = tl.load(y + at, inside, other=0).to(tl.float32)
    g = gated(tl.load(gate + of_row, inside, other=0), BOUNDED)
    tl.store(out + at, (value + g * step).to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, y, gate, dy, partial, order, spans, width, stride,
    BOUNDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own, begin, end = span(order, spans)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = gated(tl.load(gate + own * stride + column, column < width, other=0), BOUNDED)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=3):
        at, inside = places_in_order(order, start, end, width, TOKENS, BLOCK)
        d = tl.load(dout + at, inside, other=0).to(tl.float32)
        total += d * tl.load(y + at, inside, other=0).to(tl.float32)
        tl.store(dy + at, (g * d).to(dy.dtype.element_ty), inside)
    chunk = tl.program_id(0).to(tl.int64)
    tl.store(partial + chunk * width + column, before_gate(tl.sum(total, 0), g, BOUNDED), column < width)


@torch.library.custom_op(
    "qirl::gated_residual",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor gate, Tensor row, bool bounded=True) -> Tensor",
)
def _forward(x, y, gate, row, bounded=True):
    assert x.shape == y.shape, (x.shape, y.shape)
    x, y, row, rows = x.contiguous(), y.contiguous(), row.contiguous(), Modulation.of(x, row, gate)
    out, (tokens, width) = torch.empty_like(x), x.shape
    if out.numel():
        tile = Tile.of(width, widest=2048)
        grid = tile.grid(tokens, width)
        _forward_kernel[grid](
            x, y, *rows.tensors, row, out, tokens, width, rows.stride, BOUNDED=bounded, **tile.sizes
        )  # fmt: skip
    return out


@_forward.register_fake
def _(x, y, gate, row, bounded=True):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::gated_residual_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor y, Tensor gate, Tensor row, bool bounded) -> (Tensor, Tensor)",
)
def _backward(dout, y, gate, row, bounded):
    dout, y, rows = dout.contiguous(), y.contiguous(), Modulation.of(y, row, gate)
    dy, width, tile = torch.empty_like(y), y.shape[1], Tile.of(y.shape[1], widest=1024)
    chunks = Chunks(row, len(gate), tile, width)
    partial = chunks.partial(1)
    if partial.numel():
        _backward_kernel[chunks.grid](
            dout, y, *rows.tensors, dy, partial, chunks.order, chunks.spans, width, rows.stride,
            BOUNDED=bounded, **tile.sizes,
        )  # fmt: skip
    return dy, chunks.reduce(partial, gate.dtype)[0]


@_backward.register_fake
def _(dout, y, gate, row, bounded):
    return tritons.contiguous_like(y), tritons.contiguous_like(gate)


def _keep(ctx, inputs, output):
    _, *tensors, ctx.bounded = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dout):
    dy, dgate = _backward(dout, *ctx.saved_tensors, ctx.bounded)
    return dout, dy, dgate, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, row: torch.Tensor, bounded: bool = True
) -> torch.Tensor:
    """x, y [N, D], gate [R, D], row int64 [N] in [0, R): float32 inside, result in x's dtype; bounded: through tanh."""
    own = tritons.on(_forward, x, y, gate)
    return choose("gated_residual", reference=reference, **own)(x, y, gate, row, bounded)
