"""Per-head RMSNorm of queries or keys, then interleaved 3-axis rotary embedding.

    n = x / sqrt(mean(x^2) + eps);   y = n * weight;   (y_2i, y_2i+1) rotated by the angle i of the token

Bytes: x read and written, cos and sin read once for all heads. Sources: Su et al. (RoFormer, 2021), Henry et al.
(query-key normalisation, 2020).
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose, compute_dtype


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


def qk_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """x [N, heads, head_dim], weight [head_dim], cos and sin float32 [N, head_dim / 2]: result in x's dtype.

    float32 inside (float64 for float64). Differentiable once, in x and weight.
    """
    return choose("qk_norm_rope", fused=fused, reference=reference)(x, weight, cos, sin, eps)
