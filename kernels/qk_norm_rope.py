"""Per-head RMSNorm of queries or keys, then interleaved 3-axis rotary embedding.

    n = x / sqrt(mean(x^2) + eps);   y = n * weight;   (y_2i, y_2i+1) rotated by the angle i of the token

Bytes: x read and written, cos and sin read once for all heads; backward: x and dout read, dx written. Sources: Su et
al. (RoFormer, 2021), Henry et al. (query-key normalisation, 2020).
"""

from __future__ import annotations

import torch

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.tritons import jit, tl, triton

PROGRAMS = 512  # of the Triton backward at most (a power of two): each sums the weight gradients of its tiles


def reference(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = compute_dtype(x)
    n = x.to(dtype)
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps) * weight.to(dtype)
    even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def fused(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference in torch ops with fewer passes over memory: half its time on a CPU."""
    dtype = compute_dtype(x)
    return _NormRope.apply(*(p.to(dtype) for p in (x, weight, cos, sin)), eps).to(x.dtype)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> complex view [..., D / 2]: a rotation is one complex multiplication."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        turn = torch.complex(cos, sin)[:, None]
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        out = (x * scale).mul_(weight).contiguous()
        _pairs(out).mul_(turn)
        ctx.save_for_backward(x, scale, weight, turn)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, scale, weight, turn = ctx.saved_tensors
        dy = torch.view_as_real(_pairs(dout.contiguous()) * turn.conj()).flatten(-2)
        n = x * scale
        dweight = (dy * n).sum((0, 1)) if ctx.needs_input_grad[1] else None
        dn = dy.mul_(weight)
        along = torch.linalg.vecdot(dn, n)[..., None].div_(-x.shape[-1])
        return dn.addcmul_(n, along).mul_(scale), dweight, None, None, None


@jit
def _places(first, rows, heads: tl.constexpr, half: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Of the heads [ROWS] from `first` on: where their channels and their tokens' angles lie, and which exist."""
    row = first + tl.arange(0, ROWS)
    channel, pair = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    known = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None] * (2 * half) + channel
    angle = (row // heads).to(tl.int64)[:, None] * half + pair
    return at, known & (channel < 2 * half), angle, known & (pair < half)


@jit
def _pairs_of(values, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Even and odd channels [ROWS, HALF] in float32."""
    return tl.split(tl.reshape(values.to(tl.float32), [ROWS, HALF, 2]))


@jit
def _joined(even, odd, ROWS: tl.constexpr, HALF: tl.constexpr):
    return tl.reshape(tl.join(even, odd), [ROWS, 2 * HALF])


@jit
def _inverse(even, odd, half: tl.constexpr, eps):
    """1 / sqrt(mean(x^2) + eps) of each head, [ROWS, 1]."""
    return tl.rsqrt(tl.sum(even * even + odd * odd, 1, keep_dims=True) * (0.5 / half) + eps)


@jit
def _forward_kernel(
    x, weight, cos, sin, out, rows, eps,
    heads: tl.constexpr, half: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    at, inside, angle, known = _places(tl.program_id(0) * ROWS, rows, heads, half, ROWS, HALF)
    even, odd = _pairs_of(tl.load(x + at, inside, other=0), ROWS, HALF)
    c, s = tl.load(cos + angle, known, other=0), tl.load(sin + angle, known, other=0)
    channel = tl.arange(0, 2 * HALF)[None]
    w_even, w_odd = _pairs_of(tl.load(weight + channel, channel < 2 * half, other=0), 1, HALF)
    inverse = _inverse(even, odd, half, eps)
    even, odd = even * inverse * w_even, odd * inverse * w_odd
    turned = _joined(even * c - odd * s, even * s + odd * c, ROWS, HALF)
    tl.store(out + at, turned.to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, x, weight, cos, sin, dx, partial, rows, eps, tiles,
    heads: tl.constexpr, half: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.arange(0, 2 * HALF)
    w_even, w_odd = _pairs_of(tl.load(weight + channel[None], channel[None] < 2 * half, other=0), 1, HALF)
    sum_even, sum_odd = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    for tile in tl.range(0, tiles, num_stages=3):
        at, inside, angle, known = _places((program * tiles + tile) * ROWS, rows, heads, half, ROWS, HALF)
        even, odd = _pairs_of(tl.load(x + at, inside, other=0), ROWS, HALF)
        d_even, d_odd = _pairs_of(tl.load(dout + at, inside, other=0), ROWS, HALF)
        c, s = tl.load(cos + angle, known, other=0), tl.load(sin + angle, known, other=0)
        inverse = _inverse(even, odd, half, eps)
        back_even, back_odd = d_even * c + d_odd * s, d_odd * c - d_even * s
        even, odd = even * inverse, odd * inverse
        sum_even += back_even * even
        sum_odd += back_odd * odd
        back_even, back_odd = back_even * w_even, back_odd * w_odd
        along = tl.sum(back_even * even + back_odd * odd, 1, keep_dims=True) * (0.5 / half)
        value = _joined((back_even - even * along) * inverse, (back_odd - odd * along) * inverse, ROWS, HALF)
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside)
    of_weight = tl.reshape(tl.join(tl.sum(sum_even, 0), tl.sum(sum_odd, 0)), [2 * HALF])
    tl.store(partial + program * 2 * half + channel, of_weight, channel < 2 * half)


@jit
def _weight_kernel(partial, out, programs, dim, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of the programs, in their order."""
    column, program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PROGRAMS)
    inside = (program < programs)[:, None] & (column < dim)[None, :]
    values = tl.load(partial + program[:, None] * dim + column[None, :], inside, other=0)
    tl.store(out + column, tl.sum(values, 0).to(out.dtype.element_ty), column < dim)


def _sizes(heads: int, dim: int) -> dict[str, int]:
    """A program's tile: about 2048 channels in whole heads, 8 a thread."""
    half = triton.next_power_of_2(dim // 2)
    return {"heads": heads, "half": dim // 2, "ROWS": max(1, 1024 // half), "HALF": half, "num_warps": 8}


@torch.library.custom_op(
    "qirl::qk_norm_rope",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _forward(x, weight, cos, sin, eps):
    x, weight, cos, sin = _checked(x, weight, cos, sin)
    out, (tokens, heads, dim) = torch.empty_like(x), x.shape
    if out.numel():
        sizes, rows = _sizes(heads, dim), tokens * heads
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        _forward_kernel[grid](x, weight, cos, sin, out, rows, eps, **sizes)
    return out


def _checked(x, weight, cos, sin) -> tuple[torch.Tensor, ...]:
    """Contiguous, of shapes that fit."""
    angles = (x.shape[0], x.shape[2] // 2)
    fit = weight.shape == x.shape[2:] and x.shape[2] % 2 == 0 and cos.shape == sin.shape == angles
    assert fit, (x.shape, weight.shape, cos.shape, sin.shape)
    return tuple(t.contiguous() for t in (x, weight, cos, sin))


@_forward.register_fake
def _(x, weight, cos, sin, eps):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::qk_norm_rope_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
)
def _backward(dout, x, weight, cos, sin, eps):
    dout, (x, weight, cos, sin) = dout.contiguous(), _checked(x, weight, cos, sin)
    dx, (tokens, heads, dim), sizes = torch.empty_like(x), x.shape, _sizes(*x.shape[1:])
    rows = tokens * heads
    tiles = triton.cdiv(triton.cdiv(rows, sizes["ROWS"]), PROGRAMS)
    programs = triton.cdiv(rows, max(1, tiles) * sizes["ROWS"])
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    _backward_kernel[(programs,)](dout, x, weight, cos, sin, dx, partial, rows, eps, tiles, **sizes)
    dweight = torch.empty_like(weight)
    _weight_kernel[(triton.cdiv(dim, 16),)](partial, dweight, programs, dim, PROGRAMS=PROGRAMS, BLOCK=16, num_warps=8)
    return dx, dweight


@_backward.register_fake
def _(dout, x, weight, cos, sin, eps):
    return tritons.contiguous_like(x), tritons.contiguous_like(weight)


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, dout: (*_backward(dout, *ctx.saved_tensors, ctx.eps), None, None, None), setup_context=_keep
)


def qk_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """x [N, heads, head_dim], weight [head_dim], cos and sin float32 [N, head_dim / 2]: result in x's dtype.

    float32 inside (float64 for float64). Differentiable once, in x and weight.
    """
    own = tritons.on(_forward, x, weight, cos, sin)
    return choose("qk_norm_rope", fused=fused, reference=reference, **own)(x, weight, cos, sin, eps)
