"""Policy losses of one pack of (sample, node) pairs (algorithm page, section 3).

    nft    v+ = b v + (1-b) v_old;  v- = (1+b) v_old - b v;  L = r |v+ - u|^2 + (1-r) |v- - u|^2,  u = noise - x0
    grpo   ratio = exp(logp - logp_old);  L = max(-A ratio, -A clip(ratio, 1 - lo, 1 + hi))
    guard  log ratio = std [logp - logp_old + mean((mean - mean_old)^2) / (2 std^2)]
    kl     |v - v_ref|^2,  or for gaussian transitions |mean - mean_ref|^2 / (2 std^2)

All norms are means over a pair's elements, in float32 (float64 for float64 inputs). Bytes: v, v_old and two states read;
4 * N * C * 4. Sources: DiffusionNFT (arXiv 2509.16117), Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.flow_step import Step, log_prob, mean_std
from qirl.kernels.rows import row_mean


def nft_reference(v, v_old, x0, noise, row, t, r, lengths, beta, x0_weighted, scale):
    dtype = compute_dtype(v)
    v, v_old, x0, noise, r = (p.to(dtype) for p in (v, v_old, x0, noise, r))
    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    if not x0_weighted:
        errors = [row_mean((p - (noise - x0)) ** 2, lengths) for p in (positive, negative)]
        return r * errors[0] + (1 - r) * errors[1]
    t = t.to(dtype)[row, None]
    x_t = (1 - t) * x0 + t * noise
    deviations = [x_t - t * p - x0 for p in (positive, negative)]
    weights = [row_mean(d.detach().abs(), lengths).clamp_min(1e-5) for d in deviations]
    errors = [row_mean(d**2, lengths) / w for d, w in zip(deviations, weights, strict=True)]
    return scale * (r * errors[0] + (1 - r) * errors[1]) / beta


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
) -> torch.Tensor:
    """DiffusionNFT loss per pair, [R].

    v, v_old, x0, noise [N, C]; row int64 [N]; t, r float [R], r in [0, 1] (see `nft_weight`). x0_weighted: the
    published code's form, times `scale` (its A_max). Gradient in v only.
    """
    run = choose("policy_loss", reference=nft_reference)
    return run(v, v_old.detach(), x0, noise, row, t, r, lengths, beta, x0_weighted, scale)


def nft_weight(advantage: torch.Tensor, a_max: float) -> torch.Tensor:
    """r = clip(A / A_max, -1, 1) / 2 + 1/2, in [0, 1]."""
    return (advantage / a_max).clamp(-1, 1) / 2 + 0.5


def ratio_reference(v, v_old, x, x_next, row, step, advantage, lengths, clip_low, clip_high, guard):
    mean, std = mean_std(x, v, row, step)
    mean_old, _ = mean_std(x, v_old, row, step)
    log_ratio = log_prob(x_next, mean, std, step.mode, lengths) - log_prob(x_next, mean_old, std, step.mode, lengths)
    if guard:
        log_ratio = std * (log_ratio + row_mean((mean - mean_old) ** 2, lengths) / (2 * std * std))
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return loss, ratio.detach(), (clipped != ratio).detach()


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GRPO (or GRPO-Guard) loss, ratio and clip flag per pair, [R] each.

    v, v_old [N, C]; x, x_next [N, C] as rounded to the storage dtype; advantage [R]. Old and new log-probability come
    from one function, so v_old = v gives a ratio of exactly 1. Gradient in v only.
    """
    run = choose("policy_loss", reference=ratio_reference)
    return run(v, v_old.detach(), x, x_next, row, step, advantage, lengths, clip_low, clip_high, guard)


def residual_target(v_old: torch.Tensor, x: torch.Tensor, z: torch.Tensor, row: torch.Tensor, step: Step):
    """x'_c = mean(v_old) + std z: the transition that the noise z of a guided rollout would have made without guidance.

    Hybrid CFG in its residual form (section 4): the ratio starts at exactly 1, its gradient is A z / std d mean.
    """
    mean, std = mean_std(x, v_old.detach(), row, step)
    return mean + std[row, None] * z


def velocity_kl(v: torch.Tensor, v_ref: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """|v - v_ref|^2 per pair, [R]; v, v_ref [N, C]. Qwen-Image-2.0-RL, section 2."""
    dtype = compute_dtype(v)
    return row_mean((v.to(dtype) - v_ref.detach().to(dtype)) ** 2, lengths)


def transition_kl(v, v_ref, x, row: torch.Tensor, step: Step, lengths: Sequence[int]) -> torch.Tensor:
    """KL between two gaussian transitions of one std, |mean - mean_ref|^2 / (2 std^2) per pair, [R]."""
    mean, std = mean_std(x, v, row, step)
    mean_ref, _ = mean_std(x, v_ref.detach(), row, step)
    return row_mean((mean - mean_ref) ** 2, lengths) / (2 * std * std)
