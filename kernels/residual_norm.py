"""Gated residual and the norm that reads it, in one pass: `gated_residual`, then `norm_modulate` of the result.

    out = x + tanh(gate[row]) * y;   n = (out - mean(out)) / sqrt(var(out) + eps) * (1 + scale[row]) + shift[row]

The shift is left out in Qwen-Image 2.1; in 1.x the gate is plain. Bytes: x and y read, out and n written,
4 * N * D * itemsize (apart: 5); backward: both gradients, out and y read, dx and dy written, 6 * N * D * itemsize
(apart: 9). The rows' gradients are sums over their tokens, in two stages of a fixed order (`modulation.Chunks`). The
norm sees `out` as rounded to its dtype, as it does apart.
"""

from __future__ import annotations

import torch

from qirl.kernels import gated_residual, norm_modulate, norm_rows, tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.gated_residual import before_gate, gated
from qirl.kernels.modulation import Chunks, Modulation, Tile, program_tokens, span, tokens_in_order
from qirl.kernels.tritons import jit, tl


def reference(x, y, gate, scale, row, eps, shift=None, bounded=True) -> tuple[torch.Tensor, torch.Tensor]:
    out = gated_residual.reference(x, y, gate, row, bounded)
    return out, norm_modulate.reference(out, scale, row, eps, shift)


@jit
def _forward_kernel(
    x, y, gate, scale, shift, row, out, scaled, tokens, stride, eps,
    BOUNDED: tl.constexpr,
    width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token, there, of_row = program_tokens(row, tokens, stride, TOKENS)
    a, b = norm_rows.load(x, token * width, there, width, TOKENS, BLOCK, REST)
    y_a, y_b = norm_rows.load(y, token * width, there, width, TOKENS, BLOCK, REST)
    gate_a, gate_b = norm_rows.load(gate, of_row, there, width, TOKENS, BLOCK, REST)
    gain_a, gain_b = norm_rows.load(scale, of_row, there, width, TOKENS, BLOCK, REST)
    a, b = a + gated(gate_a, BOUNDED) * y_a, b + gated(gate_b, BOUNDED) * y_b
    norm_rows.store(out, token * width, there, a, b, width, TOKENS, BLOCK, REST)
    a, b = a.to(out.dtype.element_ty).to(tl.float32), b.to(out.dtype.element_ty).to(tl.float32)
    a, b = norm_rows.normed(a, b, eps, width, BLOCK, REST, LANES)
    a, b = a * (1 + gain_a), b * (1 + gain_b)
    if shift is not None:
        shift_a, shift_b = norm_rows.load(shift, of_row, there, width, TOKENS, BLOCK, REST)
        a, b = a + shift_a, b + shift_b
    norm_rows.store(scaled, token * width, there, a, b, width, TOKENS, BLOCK, REST)


@jit
def _backward_kernel(
    dout, dscaled, out, y, gate, scale, dx, dy, partial, order, spans, stride, eps,
    BOUNDED: tl.constexpr, SHIFTED: tl.constexpr,
    width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    own, begin, end = span(order, spans)
    g_a, g_b = norm_rows.load_one(gate, own * stride, width, BLOCK, REST)
    g_a, g_b = gated(g_a, BOUNDED), gated(g_b, BOUNDED)
    gain_a, gain_b = norm_rows.load_one(scale, own * stride, width, BLOCK, REST)
    gate_a, gate_b = norm_rows.zeros(TOKENS, BLOCK, REST)
    scale_a, scale_b = norm_rows.zeros(TOKENS, BLOCK, REST)
    shift_a, shift_b = norm_rows.zeros(TOKENS, BLOCK, REST)
    for start in tl.range(begin, end, TOKENS, num_stages=3):
        token, there = tokens_in_order(order, start, end, TOKENS)
        a, b = norm_rows.load(out, token * width, there, width, TOKENS, BLOCK, REST)
        d_a, d_b = norm_rows.load(dscaled, token * width, there, width, TOKENS, BLOCK, REST)
        direct_a, direct_b = norm_rows.load(dout, token * width, there, width, TOKENS, BLOCK, REST)
        y_a, y_b = norm_rows.load(y, token * width, there, width, TOKENS, BLOCK, REST)
        a, b, dx_a, dx_b = norm_rows.norm_and_gradient(
            a, b, d_a * (1 + gain_a), d_b * (1 + gain_b), eps, width, BLOCK, REST, LANES
        )
        dx_a, dx_b = direct_a + dx_a, direct_b + dx_b
        norm_rows.store(dx, token * width, there, dx_a, dx_b, width, TOKENS, BLOCK, REST)
        norm_rows.store(dy, token * width, there, g_a * dx_a, g_b * dx_b, width, TOKENS, BLOCK, REST)
        gate_a += dx_a * y_a
        scale_a += d_a * a
        if REST:
            gate_b += dx_b * y_b
            scale_b += d_b * b
        if SHIFTED:
            shift_a += d_a
            if REST:
                shift_b += d_b
    to, chunks = tl.program_id(0).to(tl.int64) * width, tl.num_programs(0).to(tl.int64) * width
    gate_a, gate_b = before_gate(gate_a, g_a, BOUNDED), before_gate(gate_b, g_b, BOUNDED)
    norm_rows.store_sum(partial, to, gate_a, gate_b, width, BLOCK, REST)
    norm_rows.store_sum(partial, to + chunks, scale_a, scale_b, width, BLOCK, REST)
    if SHIFTED:
        norm_rows.store_sum(partial, to + 2 * chunks, shift_a, shift_b, width, BLOCK, REST)


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
            x, y, *rows.tensors, row, out, scaled, tokens, rows.stride, eps, BOUNDED=bounded, width=width, **tile.row_sizes
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
            dout, dscaled, out, y, *rows.tensors, dx, dy, partial, chunks.order, chunks.spans, rows.stride, eps,
            BOUNDED=bounded, SHIFTED=shifted, width=width, **tile.row_sizes,
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
