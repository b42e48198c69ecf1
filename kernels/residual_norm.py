"""Gated residual and the norm that reads it, in one pass: `gated_residual`, then `norm_modulate` of the result.

    out = x + tanh(gate[row]) * y;   n = (out - mean(out)) / sqrt(var(out) + eps) * (1 + scale[row]) + shift[row]

The shift is left out in Qwen-Image 2.1; in 1.x the gate is plain. Bytes: x and y read, out and n written,
4 * N * D * itemsize (apart: 5); backward: both gradients, out and y read, dx and dy written, 6 * N * D * itemsize
(apart: 9). The rows' gradients are sums over their tokens, in two stages of a fixed order (`modulation.Chunks`). The
norm sees `out` as rounded to its dtype, as it does apart.
"""

from __future__ import annotations

import torch

from qirl.kernels import gated_residual, norm_modulate, tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.gated_residual import before_gate, gated
from qirl.kernels.modulation import Chunks, Modulation, Tile, places, places_in_order, span
from qirl.kernels.norm_modulate import before_norm, normed
from qirl.kernels.tritons import jit, tl


def reference(x, y, gate, scale, row, eps, shift=None, bounded=True) -> tuple[torch.Tensor, torch.Tensor]:
    out = gated_residual.reference(x, y, gate, row, bounded)
    return out, norm_modulate.reference(out, scale, row, eps, shift)


@jit
def _forward_kernel(
    x, y, gate, scale, shift, row, out, scaled, tokens, width, stride, eps,
    BOUNDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, of_row, inside = places(row, tokens, width, stride, TOKENS, BLOCK)
    value = tl.load(x + at, inside, other=0).to(tl.float32)
    step = tl.load(y + at, inside, other=0).to(tl.float32)
    g = gated(tl.load(gate + of_row, inside, other=0), BOUNDED)
    gain = 1 + tl.load(scale + of_row, inside, other=0).to(tl.float32)
    offset = 0.0
    if shift is not None:
        offset = tl.load(shift + of_row, inside, other=0).to(tl.float32)
    rounded = (value + g * step).to(out.dtype.element_ty)
    tl.store(out + at, rounded, inside)
    n, _ = normed(rounded.to(tl.float32), inside, width, eps)
    tl.store(scaled + at, (n * gain + offset).to(scaled.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, dscaled, out, y, gate, scale, dx, dy, partial, order, spans, width, stride, eps,
    BOUNDED: tl.constexpr, SHIFTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own, begin, end = span(order, spans)
    column = tl.arange(0, BLOCK)
    g = gated(tl.load(gate + own * stride + column, column < width, other=0), BOUNDED)
    gain = 1 + tl.load(scale + own * stride + column, column < width, other=0).to(tl.float32)
    of_gate, of_scale = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    of_shift = tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=3):
        at, inside = places_in_order(order, start, end, width, TOKENS, BLOCK)
        value = tl.load(out + at, inside, other=0).to(tl.float32)
        d = tl.load(dscaled + at, inside, other=0).to(tl.float32)
        direct = tl.load(dout + at, inside, other=0).to(tl.float32)
        step = tl.load(y + at, inside, other=0).to(tl.float32)
        n, inverse = normed(value, inside, width, eps)
        of_scale += d * n
        if SHIFTED:
            of_shift += d
        total = direct + before_norm(d * gain, n, inverse, width)
        tl.store(dx + at, total.to(dx.dtype.element_ty), inside)
        tl.store(dy + at, (g * total).to(dy.dtype.element_ty), inside)
        of_gate += total * step
    chunk, chunks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    to = partial + chunk * width + column
    tl.store(to, before_gate(tl.sum(of_gate, 0), g, BOUNDED), column < width)
    tl.store(to + chunks.to(tl.int64) * width, tl.sum(of_scale, 0), column < width)
    if SHIFTED:
        tl.store(to + 2 * chunks.to(tl.int64) * width, tl.sum(of_shift, 0), column < width)


@torch.library.custom_op(
    "qirl::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor row, float eps, Tensor? shift=None, "
    "bool bounded=True) -> (Tensor, Tensor)",
)
def _forward(x, y, gate, scale, row, eps, shift=None, bounded=True):
    assert x.shape == y.shape, (x.shape, y.shape)
    x, y, row, rows = x.contiguous(), y.contiguous(), row.contiguous(), Modulation.of(x, row, gate, scale, shift)
    out, scaled, (tokens, width) = torch.empty_like(x), torch.empty_like(x), x.shape
    if out.numel():
        tile = Tile.of(width)
        _forward_kernel[tile.grid(tokens, width)](
            x, y, *rows.tensors, row, out, scaled, tokens, width, rows.stride, eps, BOUNDED=bounded, **tile.sizes
        )  # fmt: skip
    return out, scaled


@_forward.register_fake
def _(x, y, gate, scale, row, eps, shift=None, bounded=True):
    return tritons.contiguous_like(x), tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor dscaled, Tensor out, Tensor y, Tensor gate, Tensor scale, Tensor row, float eps, "
    "bool shifted, bool bounded) -> (Tensor, Tensor, Tensor)",
)
def _backward(dout, dscaled, out, y, gate, scale, row, eps, shifted, bounded):
    """dx, dy, and the gradients of gate, scale and (if shifted) shift, [2 or 3, R, D]."""
    dout, dscaled, out, y = (t.contiguous() for t in (dout, dscaled, out, y))
    dx, dy, width, tile = torch.empty_like(out), torch.empty_like(y), out.shape[1], Tile.of(out.shape[1], threads=2)
    rows, chunks = Modulation.of(out, row, gate, scale), Chunks(row, len(gate), tile, width)
    partial = chunks.partial(2 + shifted)
    if partial.numel():
        _backward_kernel[chunks.grid](
            dout, dscaled, out, y, *rows.tensors, dx, dy, partial, chunks.order, chunks.spans, width, rows.stride, eps,
            BOUNDED=bounded, SHIFTED=shifted, **tile.sizes,
        )  # fmt: skip
    return dx, dy, chunks.reduce(partial, gate.dtype)


@_backward.register_fake
def _(dout, dscaled, out, y, gate, scale, row, eps, shifted, bounded):
    return *map(tritons.contiguous_like, (out, y)), gate.new_empty(2 + shifted, *gate.shape)


def _keep(ctx, inputs, output):
    _, y, gate, scale, row, ctx.eps, shift, ctx.bounded = inputs
    ctx.shifted = shift is not None
    ctx.save_for_backward(output[0], y, gate, scale, row)


def _gradients(ctx, dout, dscaled):
    dx, dy, of_rows = _backward(dout, dscaled, *ctx.saved_tensors, ctx.eps, ctx.shifted, ctx.bounded)
    return dx, dy, of_rows[0], of_rows[1], None, None, of_rows[2] if ctx.shifted else None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    row: torch.Tensor,
    eps: float = 1e-6,
    shift: torch.Tensor | None = None,
    bounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, n), both [N, D] in x's dtype; float32 inside.

    x, y [N, D]; gate, scale and shift [R, D] of one dtype; row int64 [N] in [0, R); bounded: the gate through tanh.
    """
    own = tritons.on(_forward, x, y, gate, scale)
    return choose("residual_norm", reference=reference, **own)(x, y, gate, scale, row, eps, shift, bounded)
