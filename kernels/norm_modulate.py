"""LayerNorm without affine times (1 + scale), one modulation row per token by index.

    n = (x - mean(x)) / sqrt(var(x) + eps);   y = n * (1 + scale[row])

Bytes: x read, y written, and the rows, 2 * N * D * itemsize; backward: x and dout read, dx written. The backward takes
mean and var from x again; the scale's gradient is a sum over the tokens of a row, in two stages of a fixed order
(`rows.Chunks`). Source: adaLN of Peebles and Xie (DiT, 2023), scale only as in Qwen-Image 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.rows import Chunks
from qirl.kernels.tritons import jit, tl, triton


def reference(x: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(dtype)).index_select(0, row)).to(x.dtype)


@jit
def normed(value, inside, width, eps):
    """(n, 1 / std) of one token's values; n is 0 outside."""
    centred = tl.where(inside, value - tl.sum(value) / width, 0)
    inverse = 1 / tl.sqrt_rn(tl.sum(centred * centred) / width + eps)
    return centred * inverse, inverse


@jit
def _forward_kernel(x, scale, row, out, width, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    n, _ = normed(tl.load(x + token * width + column, inside, other=0).to(tl.float32), inside, width, eps)
    s = tl.load(scale + tl.load(row + token) * width + column, inside, other=0).to(tl.float32)
    tl.store(out + token * width + column, (n * (1 + s)).to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(dout, x, scale, dx, partial, order, chunk_row, begin, end, width, eps, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    own = tl.load(chunk_row + chunk)
    inside = column < width
    gain = 1 + tl.load(scale + own * width + column, inside, other=0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(begin + chunk), tl.load(end + chunk)):
        at = tl.load(order + place) * width + column
        n, inverse = normed(tl.load(x + at, inside, other=0).to(tl.float32), inside, width, eps)
        d = tl.load(dout + at, inside, other=0).to(tl.float32)
        total += d * n
        dn = d * gain
        value = inverse * (dn - tl.sum(dn) / width - n * (tl.sum(dn * n) / width))
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside)
    tl.store(partial + chunk * width + column, total, inside)


@torch.library.custom_op(
    "qirl::norm_modulate", mutates_args=(), schema="(Tensor x, Tensor scale, Tensor row, float eps) -> Tensor"
)
def _forward(x, scale, row, eps):
    x, scale, row = x.contiguous(), scale.contiguous(), row.contiguous()
    out, (tokens, width) = torch.empty_like(x), x.shape
    if out.numel():
        block = triton.next_power_of_2(width)
        _forward_kernel[(tokens,)](x, scale, row, out, width, eps, BLOCK=block, num_warps=tritons.warps(block))
    return out


@_forward.register_fake
def _(x, scale, row, eps):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor scale, Tensor row, float eps) -> (Tensor, Tensor)",
)
def _backward(dout, x, scale, row, eps):
    dout, x, scale = dout.contiguous(), x.contiguous(), scale.contiguous()
    dx, width, chunks = torch.empty_like(x), x.shape[1], Chunks(row, len(scale))
    partial = chunks.partial(width)
    if dx.numel():
        block = triton.next_power_of_2(width)
        _backward_kernel[(len(partial),)](
            dout, x, scale, dx, partial, *chunks.tensors, width, eps, BLOCK=block, num_warps=tritons.warps(block)
        )
    return dx, chunks.reduce(partial).to(scale.dtype)


@_backward.register_fake
def _(dout, x, scale, row, eps):
    return tritons.contiguous_like(x), tritons.contiguous_like(scale)


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, dout: (*_backward(dout, *ctx.saved_tensors, ctx.eps), None, None), setup_context=_keep
)


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x [N, D], scale [R, D], row int64 [N] in [0, R): float32 inside, result in x's dtype."""
    return choose("norm_modulate", reference=reference, **tritons.on(_forward, x, scale))(x, scale, row, eps)
