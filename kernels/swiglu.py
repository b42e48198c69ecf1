"""SwiGLU: silu(gate) * up. Bytes: two reads, one write, 3 * N * F * itemsize; backward 5 * N * F * itemsize.

Nothing but the inputs is kept for the backward. Source: Shazeer, GLU variants (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.tritons import jit, tl


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(gate)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


@jit
def _forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, inside, other=0).to(tl.float32)
    u = tl.load(up + at, inside, other=0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), inside)


@jit
def _backward_kernel(dout, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(dout + at, inside, other=0).to(tl.float32)
    g = tl.load(gate + at, inside, other=0).to(tl.float32)
    u = tl.load(up + at, inside, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + at, (d * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), inside)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), inside)


@torch.library.custom_op("qirl::swiglu", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def _forward(gate, up):
    assert gate.shape == up.shape, (gate.shape, up.shape)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    tritons.over_elements(_forward_kernel, gate, up, out)
    return out


@_forward.register_fake
def _(gate, up):
    return tritons.contiguous_like(gate)


@torch.library.custom_op(
    "qirl::swiglu_backward", mutates_args=(), schema="(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)"
)
def _backward(dout, gate, up):
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    tritons.over_elements(_backward_kernel, dout, gate, up, dgate, dup)
    return dgate, dup


@_backward.register_fake
def _(dout, gate, up):
    return tritons.contiguous_like(gate), tritons.contiguous_like(up)


_forward.register_autograd(
    lambda ctx, dout: _backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [N, F] of one dtype: float32 inside, result in that dtype."""
    return choose("swiglu", reference=reference, **tritons.on(_forward, gate, up))(gate, up)
