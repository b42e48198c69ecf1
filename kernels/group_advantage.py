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

import functools

import torch

from qirl.kernels import _native, tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.tritons import jit, tl, triton

# a spread below this is rounding of equal scores, whatever the floor
ROUNDING = 1e-12
SORTED_WITHIN = 16384  # samples: csrc's sort compares all pairs on a GPU, in one launch; beyond, torch's is faster
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


def reference(scores, applies, group, weights, floors, floor, clip, convention, scale):
    # groups by the place of their first sample in sorted order: below N, which the host knows
    group, groups = torch.searchsorted(group.sort().values, group), len(group)
    failed = (applies & scores.isnan()).any(1)
    # a component that failed wherever it applied in a group takes the whole group with it
    alive = applies & ~failed[:, None]
    applied = scores.new_zeros(groups, scores.shape[1]).index_add_(0, group, applies.double())
    worked = torch.zeros_like(applied).index_add_(0, group, (applies & ~scores.isnan()).double())
    lost = ((applied > 0) & (worked == 0)).any(1)
    size = scores.new_zeros(groups).index_add_(0, group, (~failed).double())
    valid = ~failed & ~lost[group] & (size[group] >= 2)
    mask = alive & valid[:, None]

    share = torch.where(applies, weights, 0)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
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
            advantage = _z(total, one, group, groups, total.new_full((1,), floor), over_all)[:, 0]
    return torch.where(valid, (scale * advantage).clamp(-clip, clip), 0).float(), valid


def _of_sorted(op, scores, applies, group, weights, floors, floor, clip, convention, scale):
    """The same by an op that takes the samples sorted by group."""
    group, order = torch.sort(group, stable=True)
    return _call(op, scores, applies, order, group, weights, floors, scale, floor, clip, convention)


def _of_any_order(op, scores, applies, group, weights, floors, floor, clip, convention, scale):
    """The same by an op that can sort on its own."""
    if len(group) > SORTED_WITHIN:
        return _of_sorted(op, scores, applies, group, weights, floors, floor, clip, convention, scale)
    return _call(op, scores, applies, None, group, weights, floors, scale, floor, clip, convention)


def _call(op, *given):
    *tensors, floor, clip, convention = given
    return op(*tritons.contiguous(*tensors), floor, clip, CONVENTIONS.index(convention))


@jit
def _mean_std(values, has):
    """Mean and population standard deviation of the entries of a block that count."""
    count = tl.maximum(tl.sum(has.to(tl.float64)), 1)
    mean = tl.sum(tl.where(has, values, 0)) / count
    away = tl.where(has, values - mean, 0)
    return mean, tl.sqrt(tl.sum(away * away) / count)


@jit
def _gain(std, least):
    """1 / std, or 0 where the spread is under the floor or is the rounding of equal scores."""
    return tl.where((std >= least) & (std > 1e-12), 1 / tl.maximum(std, 1e-30), 0.0)


@jit
def _groups_kernel(
    scores, applies, order, group, weights, floors, total, value, valid, samples, components, floor,
    CONVENTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The work of one group, by the program of its first sample; BLOCK holds all samples."""
    begin = tl.program_id(0)
    own = tl.load(group + begin)
    if (begin == 0) | (tl.load(group + tl.maximum(begin - 1, 0)) != own):
        place = begin + tl.arange(0, BLOCK)
        member = (place < samples) & (tl.load(group + place, place < samples, other=-1) == own)
        i = tl.load(order + place, member, other=0)
        fails, lost, share = tl.zeros([BLOCK], tl.int32), begin * 0, tl.zeros([BLOCK], tl.float64)
        for k in range(components):
            at = i * components + k
            uses = member & (tl.load(applies + at, member, other=0) != 0)
            score = tl.load(scores + at, member, other=0)
            fails += (uses & (score != score)).to(tl.int32)
            share += tl.where(uses, tl.load(weights + at, member, other=0), 0)
            worked = tl.sum((uses & (score == score)).to(tl.int32))
            lost += tl.where((tl.sum(uses.to(tl.int32)) > 0) & (worked == 0), 1, 0)
        alive = member & (fails == 0)
        size = tl.where(lost > 0, 0, tl.sum(alive.to(tl.int32)))
        alive = alive & (size + fails >= 2)
        share = tl.maximum(share, 1e-30)
        composite, advantage = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for k in range(components):
            at = i * components + k
            uses = alive & (tl.load(applies + at, member, other=0) != 0)
            score = tl.where(uses, tl.load(scores + at, uses, other=0), 0)
            part = tl.load(weights + at, member, other=0) / share
            composite += tl.where(uses, part * score, 0)
            if (CONVENTION == 0) | (CONVENTION == 2):
                mean, std = _mean_std(score, uses)
                advantage += tl.where(uses, part * ((score - mean) * _gain(std, tl.load(floors + k))), 0)
        if (CONVENTION != 0) & (CONVENTION != 2):
            mean, std = _mean_std(composite, alive)
            advantage = tl.where(alive, composite - mean, 0)
            if CONVENTION == 1:
                advantage *= _gain(std, tl.load(floor))
        tl.store(total + i, composite, member)
        tl.store(value + i, advantage, member)
        tl.store(valid + i, alive, member)


@jit
def _batch_kernel(
    total, value, valid, scale, advantage, samples, floor, clip, CONVENTION: tl.constexpr, BLOCK: tl.constexpr
):
    """After all groups: the batch's mean and spread where the convention wants them, then scale and clip."""
    i = tl.arange(0, BLOCK)
    inside = i < samples
    alive = tl.load(valid + i, inside, other=0) != 0
    own = tl.load(value + i, inside, other=0)
    if CONVENTION == 2:
        mean, std = _mean_std(own, alive)
        own = (own - mean) * _gain(std, 0.0)
    if CONVENTION == 3:
        _, std = _mean_std(tl.load(total + i, inside, other=0), alive)
        own *= _gain(std, tl.load(floor))
    own = tl.minimum(tl.maximum(own * tl.load(scale + i, inside, other=0), -clip), clip)
    tl.store(advantage + i, tl.where(alive, own, 0).to(tl.float32), inside)


@torch.library.custom_op(
    "qirl::group_advantage_triton",
    mutates_args=(),
    schema="(Tensor scores, Tensor applies, Tensor order, Tensor group, Tensor weights, Tensor floors, Tensor scale, "
    "float floor, float clip, int convention) -> (Tensor, Tensor)",
)
def _triton(scores, applies, order, group, weights, floors, scale, floor, clip, convention):
    advantage, valid = _fake(scores)
    samples, components = scores.shape
    if samples:
        total, value = torch.empty_like(scale), torch.empty_like(scale)
        block = max(16, triton.next_power_of_2(samples))
        sizes = dict(CONVENTION=convention, BLOCK=block, num_warps=min(16, max(4, block // 64)))
        floor = floors.new_full((1,), floor)  # a number would arrive as float32
        rest = samples, components, floor
        _groups_kernel[(samples,)](scores, applies, order, group, weights, floors, total, value, valid, *rest, **sizes)
        _batch_kernel[(1,)](total, value, valid, scale, advantage, samples, floor, clip, **sizes)
    return advantage, valid


def _fake(scores, *rest):
    samples = len(scores)
    return scores.new_empty(samples, dtype=torch.float32), scores.new_empty(samples, dtype=torch.bool)


_triton.register_fake(_fake)
_native.register("group_advantage", _fake)


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

    scores [N, K] in [0, 1], NaN where scoring failed; applies bool [N, K]; group int64 [N], any ids (by prompt
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
    scores, weights = scores.double(), weights.double()
    scale = scores.new_ones(len(scores)) if scale is None else scale.to(scores)
    floors = scores.new_full(scores.shape[1:], floor)
    if noise is not None:
        floors = torch.maximum(floors, noise.to(scores))
    own = {name: functools.partial(_of_sorted, op) for name, op in tritons.on(_triton, group).items()}
    native = _native.on("group_advantage", scores, applies, group, weights)
    own |= {name: functools.partial(_of_any_order, op) for name, op in native.items()}
    run = choose("group_advantage", reference=reference, **own)
    return run(scores, applies, group, weights, floors, floor, clip, convention, scale)
