"""LayerNorm without affine times (1 + scale), plus a shift where there is one; one modulation row per token by index.

    n = (x - mean(x)) / sqrt(var(x) + eps);   y = n * (1 + scale[row]) + shift[row]

Bytes: x read, y written, and the rows, 2 * N * D * itemsize; backward: x and dout read, dx written. The backward takes
mean and var from x again; the rows' gradients are sums over their tokens, in two stages of a fixed order
(`modulation.Chunks`). Source: adaLN of Peebles and Xie (DiT, 2023); scale only in Qwen-Image 2.1, with a shift in 1.x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels import norm_rows, tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.modulation import Chunks, Modulation, Tile, program_tokens, span, tokens_in_order
from qirl.kernels.tritons import jit, tl


def reference(x, scale, row, eps, shift=None) -> torch.Tensor:
    dtype = compute_dtype(x)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps) * (1 + scale.to(dtype)).index_select(0, row)
    return (y if shift is None else y + shift.to(dtype).index_select(0, row)).to(x.dtype)


@jit
def _forward_kernel(
    x, scale, shift, row, out, tokens, stride, eps,
    width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token, there, of_row = program_tokens(row, tokens, stride, TOKENS)
    a, b = norm_rows.load(x, token * width, there, width, TOKENS, BLOCK, REST)
    gain_a, gain_b = norm_rows.load(scale, of_row, there, width, TOKENS, BLOCK, REST)
    a, b = norm_rows.normed(a, b, eps, width, BLOCK, REST, LANES)
    a, b = a * (1 + gain_a), b * (1 + gain_b)
    if shift is not None:
        shift_a, shift_b = norm_rows.load(shift, of_row, there, width, TOKENS, BLOCK, REST)
        a, b = a + shift_a, b + shift_b
    norm_rows.store(out, token * width, there, a, b, width, TOKENS, BLOCK, REST)


@jit
def _backward_kernel(
    dout, x, scale, dx, partial, order, spans, stride, eps,
    SHIFTED: tl.constexpr,
    width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    own, begin, end = span(order, spans)
    gain_a, gain_b = norm_rows.load_one(scale, own * stride, width, BLOCK, REST)
    scale_a, scale_b = norm_rows.zeros(TOKENS, BLOCK, REST)
    shift_a, shift_b = norm_rows.zeros(TOKENS, BLOCK, REST)
    for start in tl.range(begin, end, TOKENS, num_stages=3):
        token, there = tokens_in_order(order, start, end, TOKENS)
        a, b = norm_rows.load(x, token * width, there, width, TOKENS, BLOCK, REST)
        d_a, d_b = norm_rows.load(dout, token * width, there, width, TOKENS, BLOCK, REST)
        a, b, dx_a, dx_b = norm_rows.norm_and_gradient(
            a, b, d_a * (1 + gain_a), d_b * (1 + gain_b), eps, width, BLOCK, REST, LANES
        )
        norm_rows.store(dx, token * width, there, dx_a, dx_b, width, TOKENS, BLOCK, REST)
        scale_a += d_a * a
        if REST:
            scale_b += d_b * b
        if SHIFTED:
            shift_a += d_a
            if REST:
                shift_b += d_b
    chunk, chunks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    norm_rows.store_sum(partial, chunk * width, scale_a, scale_b, width, BLOCK, REST)
    if SHIFTED:
        norm_rows.store_sum(partial, (chunks + chunk) * width, shift_a, shift_b, width, BLOCK, REST)


@torch.library.custom_op(
    "qirl::norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor row, float eps, Tensor? shift=None) -> Tensor",
)
def _forward(x, scale, row, eps, shift=None):
    x, row, rows = x.contiguous(), row.contiguous(), Modulation.of(x, row, scale, shift)
    out, (tokens, width) = torch.empty_like(x), x.shape
    if out.numel():
        tile = Tile.of(width)
        grid = tile.grid(tokens, width)
        _forward_kernel[grid](x, *rows.tensors, row, out, tokens, rows.stride, eps, width=width, **tile.row_sizes)
    return out


@_forward.register_fake
def _(x, scale, row, eps, shift=None):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor scale, Tensor row, float eps, bool shifted) -> (Tensor, Tensor)",
)
def _backward(dout, x, scale, row, eps, shifted):
    """dx, and the gradients of scale and (if shifted) shift, [1 or 2, R, D]."""
    dout, x, rows = dout.contiguous(), x.contiguous(), Modulation.of(x, row, scale)
    dx, width, tile = torch.empty_like(x), x.shape[1], Tile.of(x.shape[1])
    chunks = Chunks(row, len(scale), tile, width)
    partial = chunks.partial(1 + shifted)
    if partial.numel():
        _backward_kernel[chunks.grid](
            dout, x, *rows.tensors, dx, partial, chunks.order, chunks.spans, rows.stride, eps,
            SHIFTED=shifted, width=width, **tile.row_sizes,
        )  # fmt: skip
    return dx, chunks.reduce(partial, scale.dtype)


@_backward.register_fake
def _(dout, x, scale, row, eps, shifted):
    return tritons.contiguous_like(x), scale.new_empty(1 + shifted, *scale.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.eps, shift = inputs
    ctx.shifted = shift is not None
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dout):
    dx, of_rows = _backward(dout, *ctx.saved_tensors, ctx.eps, ctx.shifted)
    return dx, of_rows[0], None, None, of_rows[1] if ctx.shifted else None


_forward.register_autograd(_gradients, setup_context=_keep)


def norm_modulate(
    x: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float = 1e-6, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """x [N, D], scale and shift [R, D] of one dtype, row int64 [N] in [0, R): float32 inside, result in x's dtype."""
    own = tritons.on(_forward, x, scale)
    return choose("norm_modulate", reference=reference, **own)(x, scale, row, eps, shift)
