"""Gated residual and the norm that reads it, in one pass: `gated_residual`, then `norm_modulate` of the result.

    out = x + tanh(gate[row]) * y;   n = (out - mean(out)) / sqrt(var(out) + eps) * (1 + scale[row])

Bytes: x and y read, out and n written, 4 * N * D * itemsize (apart: 5); backward: both gradients, out and y read, dx and
dy written, 6 * N * D * itemsize (apart: 9). The modulation's gradients are sums over the tokens of a row, in two stages of a
fixed order (`rows.Chunks`). The norm sees `out` as rounded to its dtype, as it does apart.
"""

from __future__ import annotations

import torch

from qirl.kernels import gated_residual, norm_modulate, tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.gated_residual import tanh
from qirl.kernels.norm_modulate import normed
from qirl.kernels.rows import Chunks
from qirl.kernels.tritons import jit, tl, triton


def reference(x, y, gate, scale, row, eps) -> tuple[torch.Tensor, torch.Tensor]:
    out = gated_residual.reference(x, y, gate, row)
    return out, norm_modulate.reference(out, scale, row, eps)


@jit
def _forward_kernel(x, y, gate, scale, row, out, scaled, width, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at, modulation = token * width + column, tl.load(row + token) * width + column
    g = tanh(tl.load(gate + modulation, inside, other=0).to(tl.float32))
    value = tl.load(x + at, inside, other=0).to(tl.float32) + g * tl.load(y + at, inside, other=0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + at, rounded, inside)
    n, _ = normed(rounded.to(tl.float32), inside, width, eps)
    s = tl.load(scale + modulation, inside, other=0).to(tl.float32)
    tl.store(scaled + at, (n * (1 + s)).to(scaled.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, dscaled, out, y, gate, scale, dx, dy, of_gate, of_scale, order, chunk_row, begin, end, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    own = tl.load(chunk_row + chunk) * width + column
    g = tanh(tl.load(gate + own, inside, other=0).to(tl.float32))
    gain = 1 + tl.load(scale + own, inside, other=0).to(tl.float32)
    sum_gate, sum_scale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(begin + chunk), tl.load(end + chunk)):
        at = tl.load(order + place) * width + column
        n, inverse = normed(tl.load(out + at, inside, other=0).to(tl.float32), inside, width, eps)
        d = tl.load(dscaled + at, inside, other=0).to(tl.float32)
        sum_scale += d * n
        dn = d * gain
        value = inverse * (dn - tl.sum(dn) / width - n * (tl.sum(dn * n) / width))
        value += tl.load(dout + at, inside, other=0).to(tl.float32)
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside)
        tl.store(dy + at, (g * value).to(dy.dtype.element_ty), inside)
        sum_gate += value * tl.load(y + at, inside, other=0).to(tl.float32)
    tl.store(of_gate + chunk * width + column, sum_gate * (1 - g * g), inside)
    tl.store(of_scale + chunk * width + column, sum_scale, inside)


@torch.library.custom_op(
    "qirl::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor row, float eps) -> (Tensor, Tensor)",
)
def _forward(x, y, gate, scale, row, eps):
    x, y, gate, scale, row = (t.contiguous() for t in (x, y, gate, scale, row))
    out, scaled, (tokens, width) = torch.empty_like(x), torch.empty_like(x), x.shape
    if out.numel():
        block = triton.next_power_of_2(width)
        _forward_kernel[(tokens,)](
            x, y, gate, scale, row, out, scaled, width, eps, BLOCK=block, num_warps=tritons.warps(block)
        )
    return out, scaled


@_forward.register_fake
def _(x, y, gate, scale, row, eps):
    return tritons.contiguous_like(x), tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor dscaled, Tensor out, Tensor y, Tensor gate, Tensor scale, Tensor row, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dout, dscaled, out, y, gate, scale, row, eps):
    dout, dscaled, out, y, gate, scale = (t.contiguous() for t in (dout, dscaled, out, y, gate, scale))
    dx, dy, width, chunks = torch.empty_like(out), torch.empty_like(y), out.shape[1], Chunks(row, len(gate))
    of_gate, of_scale = chunks.partial(width), chunks.partial(width)
    if dx.numel():
        block = triton.next_power_of_2(width)
        _backward_kernel[(len(of_gate),)](
            dout, dscaled, out, y, gate, scale, dx, dy, of_gate, of_scale, *chunks.tensors, width, eps,
            BLOCK=block, num_warps=tritons.warps(block),
        )  # fmt: skip
    return dx, dy, chunks.reduce(of_gate).to(gate.dtype), chunks.reduce(of_scale).to(scale.dtype)


@_backward.register_fake
def _(dout, dscaled, out, y, gate, scale, row, eps):
    return tuple(map(tritons.contiguous_like, (out, y, gate, scale)))


def _keep(ctx, inputs, output):
    _, y, gate, scale, row, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale, row)


_forward.register_autograd(
    lambda ctx, dout, dscaled: (*_backward(dout, dscaled, *ctx.saved_tensors, ctx.eps), None, None), setup_context=_keep
)


def residual_norm(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, row: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, n), both [N, D] in x's dtype: x, y [N, D], gate and scale [R, D], row int64 [N] in [0, R); float32 inside."""
    own = tritons.on(_forward, x, y, gate, scale)
    return choose("residual_norm", reference=reference, **own)(x, y, gate, scale, row, eps)
