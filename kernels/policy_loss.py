"""Policy losses of one pack of (sample, node) pairs (algorithm page, section 3).

    nft    v+ = b v + (1-b) v_old;  v- = (1+b) v_old - b v;  L = r |v+ - u|^2 + (1-r) |v- - u|^2,  u = noise - x0
           on x0: the same of x0+- = x_t - t v+- against x0, each over its mean |x0+- - x0|, times A_max / b
    grpo   log ratio = logp - logp_old = mean of (mean - mean_old) (2 x' - mean - mean_old) / (2 std^2);  cps: times 2 std^2
           ratio = exp(log ratio);  L = max(-A ratio, -A clip(ratio, 1 - lo, 1 + hi))
    guard  log ratio = std [logp - logp_old + mean((mean - mean_old)^2) / (2 std^2)]
    kl     |v - v_ref|^2;  for gaussian transitions times on_v^2 / (2 std^2), which makes it |mean - mean_ref|^2 / (2 std^2)

All norms are means over a pair's elements, in float32 (float64 for float64 inputs). The log ratio is written as a product, so
that it does not cancel and is exactly 0 where v = v_old. Bytes: v, v_old, two states and v_ref read once; backward: the same
again, and dv written. Sources: DiffusionNFT (arXiv 2509.16117), Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319),
Qwen-Image-2.0-RL, section 2 (velocity KL).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qirl.kernels import _native, policy_triton, tritons, velocity_match
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.flow_step import CPS, Step, coefficients
from qirl.kernels.rows import offsets, row_mean


def nft_reference(v, v_old, x0, noise, v_ref, row, t, r, lengths, beta, x0_weighted, scale):
    dtype = compute_dtype(v)
    kl = _kl(v, v_ref, lengths)
    v, v_old, x0, noise, r = (p.to(dtype) for p in (v, v_old, x0, noise, r))
    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    if not x0_weighted:
        errors = [row_mean((p - (noise - x0)) ** 2, lengths) for p in (positive, negative)]
        return r * errors[0] + (1 - r) * errors[1], kl
    t = t.to(dtype)[row, None]
    x_t = (1 - t) * x0 + t * noise
    deviations = [x_t - t * p - x0 for p in (positive, negative)]
    weights = [row_mean(d.detach().abs(), lengths).clamp_min(1e-5) for d in deviations]
    errors = [row_mean(d**2, lengths) / w for d, w in zip(deviations, weights, strict=True)]
    return scale * (r * errors[0] + (1 - r) * errors[1]) / beta, kl


def ratio_reference(v, v_old, x, x_next, v_ref, row, step, advantage, lengths, clip_low, clip_high, guard):
    dtype = compute_dtype(v)
    kl = _kl(v, v_ref, lengths)
    v, v_old, x, x_next = (p.to(dtype) for p in (v, v_old, x, x_next))
    on_x, on_v, std = coefficients(step, dtype)
    moved = on_v[row, None] * (v - v_old)  # mean - mean_old
    error = x_next - (on_x[row, None] * x + on_v[row, None] * v)
    log_ratio = row_mean(moved * (2 * error + moved), lengths) / torch.where(step.mode == CPS, 1, 2 * std * std)
    if guard:
        log_ratio = std * (log_ratio + row_mean(moved**2, lengths) / (2 * std * std))
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return loss, kl, ratio.detach(), (clipped != ratio).detach()


def _kl(v, v_ref, lengths):
    if v_ref is None:
        return v.new_zeros(len(lengths), dtype=compute_dtype(v))
    return velocity_match.reference(v, v_ref, None, None, lengths, 1.0, False)


def _fused_nft(op, v, v_old, x0, noise, v_ref, row, t, r, lengths, beta, x0_weighted, scale):
    tensors = tritons.contiguous(v, v_old, x0, noise, v_ref)
    loss, kl, _ = op(*tensors, row, offsets(tuple(lengths), v.device), t.float(), r.float(), beta, x0_weighted, scale)
    return loss, kl


def _fused_ratio(op, v, v_old, x, x_next, v_ref, row, step, advantage, lengths, clip_low, clip_high, guard):
    tensors = tritons.contiguous(v, v_old, x, x_next, v_ref)
    rows = offsets(tuple(lengths), v.device), *step.tensors, advantage.float()
    loss, kl, _, ratio, clipped = op(*tensors, row, *rows, step.level, step.sine, clip_low, clip_high, guard)
    return loss, kl, ratio, clipped


def _choose(op: str, reference, fused, velocities, states, row):
    """The implementation that serves these tensors."""
    own = {}
    if _native.same(*velocities) and _native.same(*states):
        own = tritons.on(getattr(policy_triton, op), *states) | _native.on(f"policy_{op}", *velocities, *states, row)
    return choose("policy_loss", reference=reference, **{k: functools.partial(fused, f) for k, f in own.items()})


def nft(
    v: torch.Tensor,
    v_old: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    row: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    lengths: Sequence[int],
    beta: float,
    x0_weighted: bool = False,
    scale: float = 1.0,
    v_ref: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DiffusionNFT loss and velocity KL per pair, [R] each; kl is 0 without v_ref.

    v, v_old, x0, noise, v_ref [N, C]; row int64 [N]; t, r float [R], r in [0, 1] (see `nft_weight`). x0_weighted: the
    published code's form, times `scale` (its A_max). Gradient in v only.
    """
    v_old, v_ref = v_old.detach(), v_ref if v_ref is None else v_ref.detach()
    run = _choose("nft", nft_reference, _fused_nft, (v, v_old, v_ref), (x0, noise), row)
    return run(v, v_old, x0, noise, v_ref, row, t, r, lengths, beta, x0_weighted, scale)


def nft_weight(advantage: torch.Tensor, a_max: float) -> torch.Tensor:
    """r = clip(A / A_max, -1, 1) / 2 + 1/2, in [0, 1]."""
    return (advantage / a_max).clamp(-1, 1) / 2 + 0.5


def policy_ratio(
    v: torch.Tensor,
    v_old: torch.Tensor,
    x: torch.Tensor,
    x_next: torch.Tensor,
    row: torch.Tensor,
    step: Step,
    advantage: torch.Tensor,
    lengths: Sequence[int],
    clip_low: float,
    clip_high: float,
    guard: bool = False,
    v_ref: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """GRPO (or GRPO-Guard) loss, velocity KL, ratio and clip flag per pair, [R] each; kl is 0 without v_ref.

    v, v_old, v_ref [N, C]; x, x_next [N, C] as rounded to the storage dtype; advantage [R]. v_old = v gives a ratio of exactly
    1. Gradient in v only.
    """
    v_old, v_ref = v_old.detach(), v_ref if v_ref is None else v_ref.detach()
    run = _choose("ratio", ratio_reference, _fused_ratio, (v, v_old, v_ref), (x, x_next), row)
    return run(v, v_old, x, x_next, v_ref, row, step, advantage, lengths, clip_low, clip_high, guard)


def transition_factor(step: Step) -> torch.Tensor:
    """[R]: what makes the velocity KL that between two gaussian transitions of one std, on_v^2 / (2 std^2)."""
    _, on_v, std = coefficients(step, compute_dtype(step.t))
    return on_v**2 / (2 * std * std)


def _fake_nft(v, v_old, x0, noise, v_ref, row, offset, t, *options):
    return tuple(v.new_empty(size, dtype=torch.float32) for size in (len(t), len(t), (len(t), 2)))


def _fake_ratio(*given):
    v, t = given[0], given[7]
    loss, kl, kept = _fake_nft(*given[:8])
    return loss, kl, kept, torch.empty_like(loss), v.new_empty(len(t), dtype=torch.bool)


def _keep_nft(ctx, inputs, output):
    *tensors, ctx.beta, ctx.x0_weighted, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _keep_ratio(ctx, inputs, output):
    *tensors, _, ctx.level, ctx.sine, _, _, _ = inputs  # the advantage is in the coefficients
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[3], output[4])


def _nft_gradients(op, ctx, *gradients):
    *tensors, kept = ctx.saved_tensors
    dv = _gradient(op, gradients, kept, *tensors, ctx.beta, ctx.x0_weighted, ctx.scale)
    return (dv, *(None,) * 11)


def _ratio_gradients(op, ctx, *gradients):
    *tensors, kept = ctx.saved_tensors
    dv = _gradient(op, gradients, kept, *tensors, ctx.level, ctx.sine)
    return (dv, *(None,) * 16)


def _gradient(op, gradients, *given):
    """dv of the gradients of loss and kl, which come first; None stands for zeros that need not be filled and read."""
    dloss, dkl = tritons.contiguous(*gradients[:2])
    return None if dloss is None and dkl is None else op(dloss, dkl, *given)


def _fake_backward(dloss, dkl, kept, v, *rest):
    return torch.empty_like(v)


for _op, _fake, _gradients, _keep in (
    ("nft", _fake_nft, _nft_gradients, _keep_nft),
    ("ratio", _fake_ratio, _ratio_gradients, _keep_ratio),
):
    _backward = lambda *given, op=f"policy_{_op}_backward": _native.op_of(op)(*given)  # noqa: E731
    _native.register(f"policy_{_op}", _fake, functools.partial(_gradients, _backward), _keep)
    _native.register(f"policy_{_op}_backward", _fake_backward)
    _forward, _backward = getattr(policy_triton, _op), getattr(policy_triton, f"{_op}_backward")
    _forward.register_fake(_fake)
    _forward.register_autograd(functools.partial(_gradients, _backward), setup_context=_keep)
    _backward.register_fake(_fake_backward)
