"""One optimizer step of RL over packed (sample, node) pairs (algorithm page, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qirl.config import TrainConfig
from qirl.flow.rollout import Kept
from qirl.kernels import policy_loss
from qirl.kernels.flow_step import MODES, Noise, Step, flow_step, guide, log_prob, mean_std
from qirl.kernels.philox import LOSS, Stream, normal
from qirl.models.architecture import Transformer
from qirl.models.fp8 import exact
from qirl.packing import Condition, PackedBatch, Target, send
from qirl.policy.packs import Layout, Pair, Prefix

STATS = ("loss", "ratio", "clipped", "kl", "valid")


@dataclass
class Experience:
    """What one rank sampled in one step, per sample: target, nodes, latents, transitions, advantage."""

    conditions: Sequence[Condition]
    negatives: Sequence[Condition]  # their unconditional twins where the objective is guided, else empty
    targets: Sequence[Target]
    stream: Stream
    grid: torch.Tensor  # float32 [R, steps + 1]
    nodes: Sequence[tuple[int, ...]]
    x0: Sequence[torch.Tensor]
    kept: dict[tuple[int, int], Kept]
    ids: torch.Tensor  # int64 [R], unique over ranks
    advantage: torch.Tensor  # float32 [R]
    valid: torch.Tensor  # bool [R]
    valid_by_slot: torch.Tensor | None = (
        None  # int64 [prompts of the step]: valid samples of each group, over all ranks
    )

    def pairs(self, prompts: Sequence[int]) -> list[Pair]:
        """The trained pairs of these prompts (indices of `conditions`), renumbered from 0, sorted by prompt."""
        place = {prompt: index for index, prompt in enumerate(prompts)}
        return [
            Pair(i, node, place[t.prompt], t.height, t.width)
            for i, t in enumerate(self.targets)
            if t.prompt in place
            for node in self.nodes[i]
        ]


@dataclass
class Batch:
    """One pack ready to run: inputs of the model and of the loss, all on the device."""

    body: PackedBatch
    x: torch.Tensor
    t: torch.Tensor
    row: torch.Tensor
    weight: torch.Tensor  # float64 [pairs]: 1 / (number of valid pairs of the step, over all ranks), or 0
    advantage: torch.Tensor
    ids: torch.Tensor
    lengths: tuple[int, ...]  # tokens of every pair
    guided: bool  # the targets are followed by their unconditional twins, and the objective sees guided velocities
    live: bool  # False: a repeat with weight 0, run because another rank has more packs
    x0: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    step: Step | None = None
    x_next: torch.Tensor | None = None
    drawn: Noise | None = None  # of the transition, for the residual form of hybrid CFG
    v_rollout: torch.Tensor | None = None
    v_old: torch.Tensor | None = None
    v_ref: torch.Tensor | None = None


def make_batch(exp: Experience, layout: Layout, members: Sequence[int], config: TrainConfig, weight: float, live: bool):
    """The batch of the pairs `members`; weight is that of a valid pair; live=False gives all of them weight 0."""
    device = exp.grid.device
    pairs = [layout.pairs[i] for i in members]
    body = layout.body(members, device)
    chosen = torch.tensor([[p.sample for p in pairs], [p.node for p in pairs]])
    samples, nodes = send(chosen, device)  # the host keeps its own: reading them back would wait for the device
    lengths = tuple(p.tokens for p in pairs)
    row, token = body.target_row[: sum(lengths)], body.token_in_target[: sum(lengths)]
    weights = send(exp.valid[chosen[0]], device).double() * (weight if live else 0.0)
    common = dict(
        body=body,
        row=row,
        weight=weights,
        advantage=send(exp.advantage[chosen[0]], device),
        ids=exp.ids[chosen[0]] * config.flow.steps + chosen[1],
        lengths=lengths,
        guided=bool(layout.negatives),
        live=live,
    )
    t = exp.grid[samples, nodes]
    if config.policy.loss == "nft":
        x0 = torch.cat([exp.x0[p.sample] for p in pairs])
        noise = normal(exp.stream.rows(samples), row, token, x0.shape[1], nodes, LOSS).to(x0.dtype)
        along = t[row, None].to(x0.dtype)
        return Batch(x=(1 - along) * x0 + along * noise, t=t, x0=x0, noise=noise, **common)
    mode = torch.full((len(pairs),), MODES.index(config.flow.sampler), device=device)
    step = Step(t, exp.grid[samples, nodes + 1], exp.grid[samples, 1], mode, config.flow.level)
    kept = [exp.kept[p.sample, p.node] for p in pairs]
    x, x_next = (torch.cat([getattr(k, name) for k in kept]) for name in ("x", "x_next"))
    batch = Batch(x=x, t=t, step=step, x_next=x_next, **common)
    hybrid = config.flow.guidance != 1.0 and config.guidance.scope == "rollout"
    if hybrid and config.guidance.form == "residual":  # the drawn noise around the conditional mean
        batch.drawn = Noise(exp.stream.rows(samples), token, nodes)
    if config.policy.old == "rollout":
        batch.v_rollout = torch.cat([k.v for k in kept])
    return batch


@torch.no_grad()
def velocities(model: Transformer, layout: Layout, batches: Sequence[Batch], config: TrainConfig) -> list[torch.Tensor]:
    """The objective's velocity of every batch, over the same packs as the update."""
    prefix = Prefix(model, layout, batches[0].x.device)
    return [velocity(model, b, prefix, config) for b in batches]


def velocity(model: Transformer, batch: Batch, prefix: Prefix, config: TrainConfig) -> torch.Tensor:
    """What the objective compares, [N, C]: the conditional velocity, or the guided one where guidance is in scope."""
    if not batch.guided:
        return model(batch.body, batch.x, batch.t, prefix.leaves)
    v = model(batch.body, torch.cat([batch.x, batch.x]), torch.cat([batch.t, batch.t]), prefix.leaves)
    return guide(*v.chunk(2), config.flow.guidance, config.flow.rescale)


def loss_and_stats(v: torch.Tensor, batch: Batch, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted loss of the pack, per-pair STATS [pairs, 5])."""
    policy = config.policy
    if batch.v_old is not None:
        v_old = batch.v_old
    else:
        v_old = batch.v_rollout if batch.v_rollout is not None else v.detach()
    if policy.loss == "nft":
        r = policy_loss.nft_weight(batch.advantage, config.advantage.clip)
        loss, kl = policy_loss.nft(
            v, v_old, batch.x0, batch.noise, batch.row, batch.t, r, batch.lengths, policy.nft.beta,
            policy.nft.x0_weighted, config.advantage.clip, batch.v_ref,
        )  # fmt: skip
        ratio, clipped = torch.ones_like(loss), torch.zeros_like(loss)
    else:
        x_next = batch.x_next
        if (
            batch.drawn is not None
        ):  # x'_c = mean(v_old) + std z: the transition that z would have made without guidance
            x_next, _ = flow_step(batch.x, v_old, batch.row, batch.step, noise=batch.drawn)
        loss, kl, ratio, clipped = policy_loss.policy_ratio(
            v, v_old, batch.x, x_next, batch.row, batch.step, batch.advantage, batch.lengths,
            policy.clip_low, policy.clip_high, policy.loss == "guard", batch.v_ref,
        )  # fmt: skip
    if policy.kl and policy.kl_form == "transition":
        kl = kl * policy_loss.transition_factor(batch.step)
    valid = (batch.weight > 0).to(loss.dtype)
    stats = torch.stack([loss.detach(), ratio, clipped.to(loss.dtype), kl.detach(), valid], 1)
    total = loss + policy.kl * kl if policy.kl else loss
    return (total * batch.weight.to(total.dtype)).sum(), stats


def accumulate(model: Transformer, layout: Layout, batches: Sequence[Batch], config: TrainConfig) -> torch.Tensor:
    """Adds the gradients of all packs; returns the per-pair stats of the live ones, [pairs, 5]."""
    prefix = Prefix(model, layout, batches[0].x.device)
    stats = []
    for batch in batches:
        loss, own = loss_and_stats(velocity(model, batch, prefix, config), batch, config)
        loss.backward()
        if batch.live:
            stats.append(own)
    prefix.backward()
    return torch.cat(stats)


def drift(v: torch.Tensor, v_rollout: torch.Tensor, batch: Batch) -> torch.Tensor:
    """|log-probability by v - by v_rollout| per pair: what `old: rollout` adds to every log ratio."""
    values = []
    for velocity in (v, v_rollout):
        mean, std = mean_std(batch.x, velocity, batch.row, batch.step)
        values.append(log_prob(batch.x_next, mean, std, batch.step.mode, batch.lengths))
    return (values[0] - values[1]).abs()


def rounding(model: Transformer, layout: Layout, batch: Batch, config: TrainConfig) -> dict[str, torch.Tensor]:
    """What products in 8 bits change on one pack, against the same weights in the model's dtype: the velocity's relative
    error (norms), and with transitions the mean of |log ratio| between the two policies."""
    [rounded] = velocities(model, layout, [batch], config)
    with exact(model):
        [v] = velocities(model, layout, [batch], config)
    found = {"fp8/velocity_error": (rounded - v).float().norm() / v.float().norm()}
    if batch.step is not None:
        found["fp8/log_ratio_abs"] = drift(rounded, v, batch).mean()
    return found


__all__ = ["STATS", "Batch", "Experience", "accumulate", "drift", "make_batch", "rounding", "velocities"]
