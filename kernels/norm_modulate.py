"""LayerNorm without affine times (1 + scale), plus a shift where there is one; one modulation row per token by index.

    n = (x - mean(x)) / sqrt(var(x) + eps);   y = n * (1 + scale[row]) + shift[row]

Bytes: x read, y written, and the rows, 2 * N * D * itemsize; backward: x and dout read, dx written. The backward takes
mean and var from x again; the rows' gradients are sums over their tokens, in two stages of a fixed order
(`modulation.Chunks`). Source: adaLN of Peebles and Xie (DiT, 2023); scale only in Qwen-Image 2.1, with a shift in 1.x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.modulation import Chunks, Modulation, Tile, places, places_in_order, span
from qirl.kernels.tritons import jit, tl


def reference(x, scale, row, eps, shift=None) -> torch.Tensor:
    dtype = compute_dtype(x)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps) * (1 + scale.to(dtype)).index_select(0, row)
    return (y if shift is None else y + shift.to(dtype).index_select(0, row)).to(x.dtype)


@jit
def normed(value, inside, width, eps):
    """(n, 1 / std) of tokens' values [TOKENS, BLOCK]; n is 0 outside."""
    centred = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / width, 0)
    inverse = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1, keep_dims=True) / width + eps)
    return centred * inverse, inverse


@jit
def before_norm(dn, n, inverse, width):
    """The gradient of a norm's input from that of n."""
    return inverse * (dn - tl.sum(dn, 1, keep_dims=True) / width - n * (tl.sum(dn * n, 1, keep_dims=True) / width))


@jit
def _forward_kernel(
    x, scale, shift, row, out, tokens, width, stride, eps, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at, of_row, inside = places(row, tokens, width, stride, TOKENS, BLOCK)
    value = tl.load(x + at, inside, other=0).to(tl.float32)
    gain = 1 + tl.load(scale + of_row, inside, other=0).to(tl.float32)
    offset = 0.0
    if shift is not None:
        offset = tl.load(shift + of_row, inside, other=0).to(tl.float32)
    n, _ = normed(value, inside, width, eps)
    tl.store(out + at, (n * gain + offset).to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, x, scale, dx, partial, order, spans, width, stride, eps,
    SHIFTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own, begin, end = span(order, spans)
    column = tl.arange(0, BLOCK)
    gain = 1 + tl.load(scale + own * stride + column, column < width, other=0).to(tl.float32)
    of_scale, of_shift = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=3):
        at, inside = places_in_order(order, start, end, width, TOKENS, BLOCK)
        value = tl.load(x + at, inside, other=0).to(tl.float32)
        d = tl.load(dout + at, inside, other=0).to(tl.float32)
        n, inverse = normed(value, inside, width, eps)
        of_scale += d * n
        if SHIFTED:
            of_shift += d
        tl.store(dx + at, before_norm(d * gain, n, inverse, width).to(dx.dtype.element_ty), inside)
    chunk, chunks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tl.store(partial + chunk * width + column, tl.sum(of_scale, 0), column < width)
    if SHIFTED:
        tl.store(partial + (chunks + chunk) * width + column, tl.sum(of_shift, 0), column < width)


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
        _forward_kernel[grid](x, *rows.tensors, row, out, tokens, width, rows.stride, eps, **tile.sizes)
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
            dout, x, *rows.tensors, dx, partial, chunks.order, chunks.spans, width, rows.stride, eps,
            SHIFTED=shifted, **tile.sizes,
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
