"""On-policy distillation loss of one node (algorithm page, section 6).

    u = guided teacher velocity;   L = |v - u|^2, a mean over a sample's elements

Bytes: v and the teacher's two velocities read once, 3 * N * C * itemsize; backward: the same, and dv written. Source:
Qwen-Image-2.0-RL, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qirl.kernels import _native, tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.flow_step import guide, guided, tile
from qirl.kernels.rows import offsets, row_mean, row_total
from qirl.kernels.tritons import jit, tl


def reference(v, teacher_cond, teacher_uncond, row, lengths, guidance, rescale):
    dtype = compute_dtype(v)
    u = teacher_cond if teacher_uncond is None else guide(teacher_cond, teacher_uncond, guidance, rescale)
    return row_mean((v.to(dtype) - u.detach().to(dtype)) ** 2, lengths)


def _fused(op, v, teacher_cond, teacher_uncond, row, lengths, guidance, rescale):
    v, cond, uncond = tritons.contiguous(v, teacher_cond, teacher_uncond)
    if row is None:
        row = torch.repeat_interleave(offsets(tuple(lengths), v.device).diff(), output_size=len(v))
    return op(v, cond, uncond, row, offsets(tuple(lengths), v.device), guidance, rescale)


@jit
def _forward_kernel(
    v, cond, uncond, sums, tokens, channels, guidance,
    GUIDED: tl.constexpr, RESCALE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, there, at, inside = tile(tokens, channels, TOKENS, CHANNELS)
    u = guided(cond, uncond, at, inside, guidance, GUIDED, RESCALE)
    away = tl.where(inside, tl.load(v + at, inside, other=0).to(tl.float32) - u, 0)
    tl.store(sums + token, tl.sum(away * away, 1), there)


@jit
def _rows_kernel(sums, offset, loss, channels, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offset + r), tl.load(offset + r + 1)
    total = row_total(sums, begin, end, 1, BLOCK)
    tl.store(loss + r, (total / ((end - begin) * channels).to(tl.float64)).to(tl.float32))


@jit
def _backward_kernel(
    dloss, v, cond, uncond, row, offset, dv, tokens, channels, guidance,
    GUIDED: tl.constexpr, RESCALE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, there, at, inside = tile(tokens, channels, TOKENS, CHANNELS)
    own = tl.load(row + token)
    u = guided(cond, uncond, at, inside, guidance, GUIDED, RESCALE)
    n = ((tl.load(offset + own + 1) - tl.load(offset + own)) * channels).to(tl.float32)
    away = tl.load(v + at, inside, other=0).to(tl.float32) - u
    tl.store(dv + at, ((tl.load(dloss + own) * 2 / n)[:, None] * away).to(dv.dtype.element_ty), inside)


_TEACHER = (
    "Tensor v, Tensor teacher_cond, Tensor? teacher_uncond, Tensor row, Tensor offset, float guidance, bool rescale"
)


@torch.library.custom_op("qirl::velocity_match_triton", mutates_args=(), schema=f"({_TEACHER}) -> Tensor")
def _triton(v, cond, uncond, row, offset, guidance, rescale):
    loss, sums = _fake(v, cond, uncond, row, offset), torch.empty(len(v), dtype=torch.float32, device=v.device)
    if v.numel() and len(loss):
        grid, sizes = tritons.tiles(*v.shape)
        has = uncond is not None
        twin = uncond if has else cond
        _forward_kernel[grid](v, cond, twin, sums, *v.shape, guidance, GUIDED=has, RESCALE=rescale, **sizes)
        _rows_kernel[(len(loss),)](sums, offset, loss, v.shape[1], BLOCK=1024)
    return loss


@torch.library.custom_op(
    "qirl::velocity_match_backward_triton", mutates_args=(), schema=f"(Tensor dloss, {_TEACHER}) -> Tensor"
)
def _triton_backward(dloss, v, cond, uncond, row, offset, guidance, rescale):
    dv = torch.empty_like(v)
    if v.numel():
        grid, sizes = tritons.tiles(*v.shape)
        has = uncond is not None
        twin = uncond if has else cond
        _backward_kernel[grid](
            dloss, v, cond, twin, row, offset, dv, *v.shape, guidance, GUIDED=has, RESCALE=rescale, **sizes
        )
    return dv


def _fake(v, cond, uncond, row, offset, *options):
    return v.new_empty(len(offset) - 1, dtype=torch.float32)


def _fake_backward(dloss, v, *rest):
    return torch.empty_like(v)


def _keep(ctx, inputs, output):
    *tensors, ctx.guidance, ctx.rescale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(op, ctx, dloss):
    return op(dloss.contiguous(), *ctx.saved_tensors, ctx.guidance, ctx.rescale), *(None,) * 6


_triton.register_fake(_fake)
_triton.register_autograd(functools.partial(_gradients, _triton_backward), setup_context=_keep)
_triton_backward.register_fake(_fake_backward)
_native.register(
    "velocity_match",
    _fake,
    functools.partial(_gradients, lambda *given: _native.op_of("velocity_match_backward")(*given)),
    _keep,
)
_native.register("velocity_match_backward", _fake_backward)


def velocity_match(
    v: torch.Tensor,
    teacher_cond: torch.Tensor,
    lengths: Sequence[int],
    teacher_uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = False,
    row: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss per sample [R] in float32; v, teacher_* [N, C]. Gradient in v only.

    row int64 [N]: the sample of each token, where it is at hand (it follows from lengths).
    """
    if guidance == 1.0:  # the teacher is its conditional velocity; v- + (v+ - v-) would differ from it by rounding
        teacher_uncond = None
    fused = {}
    if _native.same(v) and _native.same(teacher_cond, teacher_uncond):
        fused = tritons.on(_triton, v) | _native.on("velocity_match", v, teacher_cond, teacher_uncond)
    fused = {name: functools.partial(_fused, op) for name, op in fused.items()}
    run = choose("velocity_match", reference=reference, **fused)
    return run(v, teacher_cond, teacher_uncond, row, lengths, guidance, rescale)
