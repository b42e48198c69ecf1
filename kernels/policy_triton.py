"""Triton for `policy_loss`: its formulas token by token, and a row's results out of its tokens' sums in a fixed order.

The ops take what csrc's take, and return what they return: loss, kl and the row's coefficients of the gradient,

    dv = dloss (c0 a + c1 b) + dkl 2/n (v - v_ref)

with the terms a, b of `terms`, and ratio and clip flag of a ratio.
"""

from __future__ import annotations

import torch

from qirl.kernels import tritons
from qirl.kernels.flow_step import tile, transition_of
from qirl.kernels.rows import row_total
from qirl.kernels.tritons import jit, tl

NFT, NFT_X0, RATIO = range(3)
SUMS = 5  # two terms, two of nft's x0 form, kl


@jit
def terms(v, old, first, second, own, t, s, cap, mode, level, sine, beta, KIND: tl.constexpr):
    """nft: a, b = v+ - u, v- - u; on x0: x_t - t v+ - x0, x_t - t v- - x0. ratio: a, b = x' - mean, mean - mean_old."""
    if KIND == 2:
        on_x, on_v, _ = transition_of(own, t, s, cap, mode, level, sine)
        a = second - (on_x[:, None] * first + on_v[:, None] * v)
        b = on_v[:, None] * (v - old)
    else:
        a, b = beta * v + (1 - beta) * old, (1 + beta) * old - beta * v
        if KIND == 0:
            a, b = a - (second - first), b - (second - first)
        else:
            at = tl.load(t + own)[:, None]
            x_t = (1 - at) * first + at * second
            a, b = x_t - at * a - first, x_t - at * b - first
    return a, b


@jit
def _forward_kernel(
    v, v_old, first, second, v_ref, row, t, s, cap, mode, sums, tokens, channels, level, sine, beta,
    KIND: tl.constexpr, REFERENCE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, there, at, inside = tile(tokens, channels, TOKENS, CHANNELS)
    now = tl.load(v + at, inside, other=0).to(tl.float32)
    old = tl.load(v_old + at, inside, other=0).to(tl.float32)
    one, two = tl.load(first + at, inside, other=0).to(tl.float32), tl.load(second + at, inside, other=0).to(tl.float32)
    a, b = terms(now, old, one, two, tl.load(row + token), t, s, cap, mode, level, sine, beta, KIND)
    out = sums + token * 5
    if KIND == 2:
        tl.store(out, tl.sum(b * (2 * a + b), 1), there)
    else:
        tl.store(out, tl.sum(a * a, 1), there)
    tl.store(out + 1, tl.sum(b * b, 1), there)
    if KIND == 1:
        tl.store(out + 2, tl.sum(tl.abs(a), 1), there)
        tl.store(out + 3, tl.sum(tl.abs(b), 1), there)
    if REFERENCE:
        away = now - tl.load(v_ref + at, inside, other=0).to(tl.float32)
        tl.store(out + 4, tl.sum(away * away, 1), there)


@jit
def _rows_kernel(
    sums, offset, t, s, cap, mode, share, advantage, loss, kl, kept, ratio, clipped, channels, level, sine, beta, scale,
    low, high,
    KIND: tl.constexpr, GUARD: tl.constexpr, REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offset + r), tl.load(offset + r + 1)
    n = ((end - begin) * channels).to(tl.float64)
    first, second = row_total(sums, begin, end, 5, BLOCK), row_total(sums + 1, begin, end, 5, BLOCK)
    if REFERENCE:
        tl.store(kl + r, (row_total(sums + 4, begin, end, 5, BLOCK) / n).to(tl.float32))
    else:
        tl.store(kl + r, 0.0)
    if KIND == 2:
        _, on_v, std = transition_of(r, t, s, cap, mode, level, sine)
        std = std.to(tl.float64)
        weight = tl.where(tl.load(mode + r) == 2, 1.0, 0.5 / (std * std))
        log_ratio = weight * first / n
        if GUARD:
            log_ratio = std * (log_ratio + second / (2 * std * std * n))
        own, a = tl.exp(log_ratio), tl.load(advantage + r).to(tl.float64)
        bounded = tl.minimum(tl.maximum(own, 1 - low), 1 + high)
        plain, bound = -a * own, -a * bounded
        tl.store(loss + r, tl.where(plain >= bound, plain, bound).to(tl.float32))
        tl.store(ratio + r, own.to(tl.float32))
        tl.store(clipped + r, bounded != own)
        slope = tl.where(plain >= bound, plain, 0.0)
        outer = slope * std if GUARD else slope
        on_a = outer * 2 * weight * on_v / n
        on_b = outer * on_v / (std * std * n) if GUARD else 0.0 * n
    else:
        up = tl.load(share + r).to(tl.float64)
        down = 1 - up
        if KIND == 0:
            tl.store(loss + r, ((up * first + down * second) / n).to(tl.float32))
            on_a, on_b = 2 * beta * up / n, -2 * beta * down / n
        else:
            plus = tl.maximum(row_total(sums + 2, begin, end, 5, BLOCK) / n, 1e-5)
            minus = tl.maximum(row_total(sums + 3, begin, end, 5, BLOCK) / n, 1e-5)
            tl.store(loss + r, (scale * (up * first / plus + down * second / minus) / n / beta).to(tl.float32))
            slope = 2 * scale * tl.load(t + r) / n
            on_a, on_b = -slope * up / plus, slope * down / minus
    tl.store(kept + 2 * r, on_a.to(tl.float32))
    tl.store(kept + 2 * r + 1, on_b.to(tl.float32))


@jit
def _backward_kernel(
    dloss, dkl, kept, v, v_old, first, second, v_ref, row, offset, t, s, cap, mode, dv, tokens, channels, level, sine, beta,
    KIND: tl.constexpr, REFERENCE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, there, at, inside = tile(tokens, channels, TOKENS, CHANNELS)
    own = tl.load(row + token)
    now = tl.load(v + at, inside, other=0).to(tl.float32)
    old = tl.load(v_old + at, inside, other=0).to(tl.float32)
    one, two = tl.load(first + at, inside, other=0).to(tl.float32), tl.load(second + at, inside, other=0).to(tl.float32)
    a, b = terms(now, old, one, two, own, t, s, cap, mode, level, sine, beta, KIND)
    gradient = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if dloss is not None:
        outer = tl.load(dloss + own)
        gradient += (outer * tl.load(kept + 2 * own))[:, None] * a + (outer * tl.load(kept + 2 * own + 1))[:, None] * b
    if REFERENCE:
        if dkl is not None:
            n = ((tl.load(offset + own + 1) - tl.load(offset + own)) * channels).to(tl.float32)
            away = now - tl.load(v_ref + at, inside, other=0).to(tl.float32)
            gradient += (tl.load(dkl + own) * 2 / n)[:, None] * away
    tl.store(dv + at, gradient.to(dv.dtype.element_ty), inside)


PAIRS = "Tensor v, Tensor v_old, Tensor first, Tensor second, Tensor? v_ref, Tensor row, Tensor offset, "
STEPS = "Tensor t, Tensor s, Tensor cap, Tensor mode, "
GRADIENTS = "Tensor? dloss, Tensor? dkl, Tensor coefficients, "
NFT_OPTIONS = "Tensor t, Tensor r, float beta, bool x0_weighted, float scale"


def _losses(
    kind,
    pairs,
    row,
    offset,
    steps,
    level,
    sine,
    beta=1.0,
    share=None,
    advantage=None,
    options=(1.0, 0.0, 0.0),
    guard=False,
):
    v, *_, v_ref = pairs
    new = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=v.device)  # noqa: E731
    rows, (tokens, channels) = len(offset) - 1, v.shape
    loss, kl, kept, ratio, clipped = new(rows), new(rows), new(rows, 2), new(rows), new(rows, dtype=torch.bool)
    sums, has = new(tokens, SUMS), v_ref is not None
    if rows and tokens:
        grid, sizes = tritons.tiles(tokens, channels)
        _forward_kernel[grid](
            *pairs[:4], v_ref if has else v, row, *steps, sums, tokens, channels, level, sine, beta,
            KIND=kind, REFERENCE=has, **sizes,
        )  # fmt: skip
        share, advantage = (loss if p is None else p for p in (share, advantage))
        _rows_kernel[(rows,)](
            sums, offset, *steps, share, advantage, loss, kl, kept, ratio, clipped, channels, level, sine, beta, *options,
            KIND=kind, GUARD=guard, REFERENCE=has, BLOCK=1024,
        )  # fmt: skip
    return loss, kl, kept, ratio, clipped


def _gradient(kind, outer, pairs, row, offset, steps, level, sine, beta=1.0):
    v, *_, v_ref = pairs
    dv, has = torch.empty_like(v), v_ref is not None
    if dv.numel():
        grid, sizes = tritons.tiles(*v.shape)
        _backward_kernel[grid](
            *outer, *pairs[:4], v_ref if has else v, row, offset, *steps, dv, *v.shape, level, sine, beta,
            KIND=kind, REFERENCE=has, **sizes,
        )  # fmt: skip
    return dv


@torch.library.custom_op(
    "qirl::policy_nft_triton", mutates_args=(), schema=f"({PAIRS}{NFT_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def nft(v, v_old, first, second, v_ref, row, offset, t, r, beta, x0_weighted, scale):
    pairs, kind = (v, v_old, first, second, v_ref), NFT_X0 if x0_weighted else NFT
    return _losses(kind, pairs, row, offset, (t,) * 4, 0.0, 0.0, beta, share=r, options=(scale, 0.0, 0.0))[:3]


@torch.library.custom_op(
    "qirl::policy_nft_backward_triton", mutates_args=(), schema=f"({GRADIENTS}{PAIRS}{NFT_OPTIONS}) -> Tensor"
)
def nft_backward(dloss, dkl, kept, v, v_old, first, second, v_ref, row, offset, t, r, beta, x0_weighted, scale):
    pairs, kind = (v, v_old, first, second, v_ref), NFT_X0 if x0_weighted else NFT
    return _gradient(kind, (dloss, dkl, kept), pairs, row, offset, (t,) * 4, 0.0, 0.0, beta)


@torch.library.custom_op(
    "qirl::policy_ratio_triton",
    mutates_args=(),
    schema=f"({PAIRS}{STEPS}Tensor advantage, float level, float sine, float clip_low, float clip_high, bool guard) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ratio(v, v_old, first, second, v_ref, row, offset, t, s, cap, mode, advantage, level, sine, low, high, guard):
    pairs, options = (v, v_old, first, second, v_ref), (1.0, low, high)
    return _losses(
        RATIO, pairs, row, offset, (t, s, cap, mode), level, sine, advantage=advantage, options=options, guard=guard
    )


@torch.library.custom_op(
    "qirl::policy_ratio_backward_triton",
    mutates_args=(),
    schema=f"({GRADIENTS}{PAIRS}{STEPS}float level, float sine) -> Tensor",
)
def ratio_backward(dloss, dkl, kept, v, v_old, first, second, v_ref, row, offset, t, s, cap, mode, level, sine):
    pairs = (v, v_old, first, second, v_ref)
    return _gradient(RATIO, (dloss, dkl, kept), pairs, row, offset, (t, s, cap, mode), level, sine)
