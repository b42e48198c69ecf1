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

TOKENS = 4  # of a program of the Triton backward, which sums their weight gradients


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
def _pair(tensor, at, inside):
    """Even and odd channels [heads, half] in float32."""
    return tl.split(tl.load(tensor + at, inside, other=0).to(tl.float32))


@jit
def _places(token, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Where the channels [heads, half, 2] of one token lie, which of them exist, and the places of its angles [half]."""
    head, pair, side = tl.arange(0, HEADS), tl.arange(0, HALF), tl.arange(0, 2)
    channel = 2 * pair[None, :, None] + side[None, None, :]
    at = (token * heads + head[:, None, None]) * (2 * half) + channel
    inside = (head < heads)[:, None, None] & (channel < 2 * half)
    return at, inside, token * half + pair, pair < half


@jit
def _forward_kernel(x, weight, cos, sin, out, heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr):
    at, inside, angle, known = _places(tl.program_id(0).to(tl.int64), heads, half, HEADS, HALF)
    even, odd = _pair(x, at, inside)
    inverse = 1 / tl.sqrt_rn(tl.sum(even * even + odd * odd, 1) / (2 * half) + eps)
    c, s = tl.load(cos + angle, known, other=0)[None], tl.load(sin + angle, known, other=0)[None]
    w_even, w_odd = tl.split(
        tl.load(weight + 2 * tl.arange(0, HALF)[:, None] + tl.arange(0, 2), known[:, None], other=0).to(tl.float32)
    )
    even, odd = even * inverse[:, None] * w_even, odd * inverse[:, None] * w_odd
    turned = tl.join(even * c - odd * s, even * s + odd * c)
    tl.store(out + at, turned.to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dout, x, weight, cos, sin, dx, partial, tokens, heads, half, eps,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    w_at = 2 * pair[:, None] + tl.arange(0, 2)
    w_even, w_odd = tl.split(tl.load(weight + w_at, (pair < half)[:, None], other=0).to(tl.float32))
    sum_even, sum_odd = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for token in range(program * TOKENS, tl.minimum((program + 1) * TOKENS, tokens)):
        at, inside, angle, known = _places(token, heads, half, HEADS, HALF)
        even, odd = _pair(x, at, inside)
        d_even, d_odd = _pair(dout, at, inside)
        inverse = (1 / tl.sqrt_rn(tl.sum(even * even + odd * odd, 1) / (2 * half) + eps))[:, None]
        c, s = tl.load(cos + angle, known, other=0)[None], tl.load(sin + angle, known, other=0)[None]
        back_even, back_odd = d_even * c + d_odd * s, d_odd * c - d_even * s
        even, odd = even * inverse, odd * inverse
        sum_even += tl.sum(back_even * even, 0)
        sum_odd += tl.sum(back_odd * odd, 0)
        back_even, back_odd = back_even * w_even, back_odd * w_odd
        along = (tl.sum(back_even * even + back_odd * odd, 1) / (2 * half))[:, None]
        value = tl.join((back_even - even * along) * inverse, (back_odd - odd * along) * inverse)
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside)
    tl.store(partial + program * 2 * half + w_at, tl.join(sum_even, sum_odd), (pair < half)[:, None])


def _sizes(x: torch.Tensor) -> dict[str, int]:
    heads, half = triton.next_power_of_2(x.shape[1]), triton.next_power_of_2(x.shape[2] // 2)
    return {"HEADS": heads, "HALF": half, "num_warps": tritons.warps(2 * heads * half)}


@torch.library.custom_op(
    "qirl::qk_norm_rope",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _forward(x, weight, cos, sin, eps):
    x, weight, cos, sin = (t.contiguous() for t in (x, weight, cos, sin))
    out, (tokens, heads, dim) = torch.empty_like(x), x.shape
    if out.numel():
        _forward_kernel[(tokens,)](x, weight, cos, sin, out, heads, dim // 2, eps, **_sizes(x))
    return out


@_forward.register_fake
def _(x, weight, cos, sin, eps):
    return tritons.contiguous_like(x)


@torch.library.custom_op(
    "qirl::qk_norm_rope_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
)
def _backward(dout, x, weight, cos, sin, eps):
    dout, x, weight, cos, sin = (t.contiguous() for t in (dout, x, weight, cos, sin))
    dx, (tokens, heads, dim) = torch.empty_like(x), x.shape
    partial = x.new_zeros(triton.cdiv(tokens, TOKENS), dim, dtype=torch.float32)
    if dx.numel():
        shape = tokens, heads, dim // 2
        _backward_kernel[(len(partial),)](
            dout, x, weight, cos, sin, dx, partial, *shape, eps, TOKENS=TOKENS, **_sizes(x)
        )
    return dx, partial.sum(0).to(weight.dtype)


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
