"""Advantages of several rewards inside prompt groups (algorithm page, section 5).

    A_i = scale_i sum_k w_k z_ik,   z_ik = (R_ik - mu_k) / sigma_k over the samples of i's group,   sum of w_k = 1

sigma is the population std; z_k = 0 where sigma_k < max(floor, read noise of k). A component that does not apply to a
sample gives its weight to the others; a sample with a failed component leaves mu, sigma and the loss; a group where a
component failed for every sample, or with fewer than 2 valid samples, is dropped. scale is 1, or what the category of
the sample is calibrated to. Bytes: 4 * N * K read, 4 * N written.
Source: Qwen-Image-2.0-RL, section 2. Conventions of other trainers: flow_grpo (sum_then_normalise, global_std),
GDPO (arXiv 2601.05242), Dr. GRPO (arXiv 2503.20783, no_std).
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose

# a spread below this is rounding of equal scores, whatever the floor
ROUNDING = 1e-12
CONVENTIONS = ("per_reward", "sum_then_normalise", "gdpo", "global_std", "no_std")


def _group_mean(values, mask, group, groups):
    """Mean over the masked entries of each group, [groups, K], gathered back to [N, K]; and the counts [groups, K]."""
    count = values.new_zeros(groups, values.shape[1]).index_add_(0, group, mask.to(values.dtype))
    total = torch.zeros_like(count).index_add_(0, group, torch.where(mask, values, 0))
    return (total / count.clamp_min(1))[group], count


def _z(values, mask, group, groups, floor, std_mask=None):
    """(R - mu) / sigma inside groups, 0 where sigma is under the floor [K] or the entry is masked out."""
    mean, _ = _group_mean(values, mask, group, groups)
    centred = torch.where(mask, values - mean, 0)
    if std_mask is None:
        std = torch.sqrt(_group_mean(centred**2, mask, group, groups)[0])
    else:
        count = std_mask.sum(0).clamp_min(1)  # the spread of the raw values over the whole batch
        around = torch.where(std_mask, values - torch.where(std_mask, values, 0).sum(0) / count, 0)
        std = torch.sqrt((around**2).sum(0) / count).expand_as(values)
    return torch.where((std >= floor) & (std > ROUNDING), centred / std.clamp_min(1e-30), 0)


def reference(scores, applies, group, weights, noise, floor, clip, convention, scale):
    scores = scores.double()
    groups = int(group.max()) + 1 if len(group) else 0
    failed = (applies & scores.isnan()).any(1)
    # a component that failed wherever it applied in a group takes the whole group with it
    alive = applies & ~failed[:, None]
    applied = scores.new_zeros(groups, scores.shape[1]).index_add_(0, group, applies.double())
    worked = torch.zeros_like(applied).index_add_(0, group, (applies & ~scores.isnan()).double())
    lost = ((applied > 0) & (worked == 0)).any(1)
    size = scores.new_zeros(groups).index_add_(0, group, (~failed).double())
    valid = ~failed & ~lost[group] & (size[group] >= 2)
    mask = alive & valid[:, None]

    share = torch.where(applies, weights.double(), 0)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
    floors = torch.maximum(torch.full_like(noise.double(), floor), noise.double())
    filled = torch.where(mask, scores, 0)
    if convention in ("per_reward", "gdpo"):
        advantage = (share * _z(filled, mask, group, groups, floors)).sum(1)
        if convention == "gdpo":
            inside = valid.double()
            mean = (advantage * inside).sum() / inside.sum().clamp_min(1)
            std = torch.sqrt((((advantage - mean) * inside) ** 2).sum() / inside.sum().clamp_min(1))
            advantage = torch.where(std > ROUNDING, (advantage - mean) / std.clamp_min(1e-30), 0)
    else:
        total = (share * filled).sum(1, keepdim=True)
        one = valid[:, None]
        if convention == "no_std":
            advantage = (total - _group_mean(total, one, group, groups)[0])[:, 0]
        else:
            over_all = one if convention == "global_std" else None
            advantage = _z(total, one, group, groups, torch.full((1,), floor).double(), over_all)[:, 0]
    return torch.where(valid, (scale * advantage).clamp(-clip, clip), 0).float(), valid


def group_advantage(
    scores: torch.Tensor,
    applies: torch.Tensor,
    group: torch.Tensor,
    weights: torch.Tensor,
    noise: torch.Tensor | None = None,
    floor: float = 0.005,
    clip: float = 5.0,
    convention: str = "per_reward",
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages float32 [N], clipped to +-clip and 0 where dropped, and valid bool [N].

    scores [N, K] in [0, 1], NaN where scoring failed; applies bool [N, K]; group int64 [N] in 0 .. groups-1 (by prompt
    id, not text); weights [N, K] >= 0 by the sample's category; noise [K], read noise of each component; scale [N], a factor
    on each sample's advantage before it is clipped (1 where not given).
    Raises ValueError for an unknown convention, floating-point groups (ids beyond 2^24 would merge) or misfit shapes.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention '{convention}' is unknown; use one of {', '.join(CONVENTIONS)}")
    if group.is_floating_point():
        raise ValueError(f"group ids are {group.dtype}: float ids merge neighbours; gather integer ids")
    if not scores.shape == applies.shape == weights.shape or group.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores.shape)}, applies {tuple(applies.shape)}, weights {tuple(weights.shape)} and "
            f"group {tuple(group.shape)} do not fit; give [N, K] three times and [N]"
        )
    if scale is not None and scale.shape != group.shape:
        raise ValueError(
            f"scale {tuple(scale.shape)} does not fit group {tuple(group.shape)}; give one factor a sample"
        )
    noise = torch.zeros(scores.shape[1]) if noise is None else noise
    scale = torch.ones(len(scores)) if scale is None else scale
    run = choose("group_advantage", reference=reference)
    return run(
        scores,
        applies,
        group,
        weights,
        noise.to(scores.device),
        floor,
        clip,
        convention,
        scale.to(scores.device).double(),
    )
