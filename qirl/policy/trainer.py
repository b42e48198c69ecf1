"""The RL run: sample groups of images, score them, update the policy; the same modules do both (section 3).

Every step is a pure function of (config, seed, step, weights), so a run continues bit for bit from a checkpoint.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qirl.config import TrainConfig
from qirl.curation.calibration import Calibration, check_fit, load_calibration
from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.engine import Engine, model_config
from qirl.errors import UserError
from qirl.families import Family, largest_sample, largest_target, targets_of
from qirl.flow.rollout import grids, without_failed
from qirl.kernels.philox import stream
from qirl.models.folders import find_model, world_facts
from qirl.parallel.data import agree, data_ranks, gather_rows
from qirl.policy import monitor
from qirl.policy.advantages import (
    advantages,
    check_components,
    contributions,
    declared_components,
    shuffle_inside,
    weigh,
)
from qirl.policy.nodes import draw_nodes
from qirl.policy.packs import Layout, lay_out
from qirl.policy.refill import Drawn, refill
from qirl.policy.sampling import sample_in_batches
from qirl.policy.scoring import StepScores, gather_scores
from qirl.policy.update import STATS, Batch, Experience, accumulate, drift, make_batch, rounding, velocities
from qirl.rewards.protocol import Reward
from qirl.rewards.registry import rewards_of
from qirl.rewards.scorer import Scorer
from qirl.world import make_world

# per optimizer step, its layouts and their batches
Parts = list[list[tuple[Layout, list[Batch]]]]


@dataclass
class Trainer:
    """One RL run on this rank."""

    config: TrainConfig
    engine: Engine
    family: Family
    rewards: Sequence[Reward]
    scorer: Scorer
    prompts: PromptSampler
    guided: bool
    calibration: Calibration | None = None

    @property
    def components(self) -> list[str]:
        """The reward components seen so far, sorted: the columns of the score table."""
        return self.engine.notes.get("components", [])

    @property
    def old(self) -> str | None:
        """The copy of the weights that samples: an average for nft with old_decay, else the weights themselves."""
        return "old" if self.config.policy.loss == "nft" and self.config.policy.nft.old_decay else None


def train(config: TrainConfig, rewards: Sequence[Reward] = (), quiet: bool = False) -> Engine:
    """Trains (or continues) the run in config.run.out and exports it to its model/ folder.

    rewards: callables of qirl.rewards.protocol; none: those of config.rewards, or else the world's own. Raises UserError for a config, prompt file or
    folder that does not fit, and where too many samples fail; SystemExit 143 after a SIGTERM, on a checkpoint.
    """
    trainer = open_trainer(config, rewards)
    engine = trainer.engine

    def shown(record: dict) -> dict:
        own = {k: v for k, v in record.items() if k.count("/") == 1 and k.startswith("reward/")}
        rewards = {k.removeprefix("reward/"): v for k, v in own.items()}
        return {"loss": record["loss"], **rewards, "s/step": record["time/step"]}

    with trainer.scorer:
        engine.run(
            "train",
            lambda step: train_step(trainer, step),
            shown,
            lambda step: monitor.write_samples(trainer, step),
            quiet,
        )
    engine.finish({**trainer.family.facts(), "unconditional": trainer.guided})
    return engine


def open_trainer(config: TrainConfig, rewards: Sequence[Reward]) -> Trainer:
    """Everything that can be refused is refused here, before the first step and before the run folder is touched."""
    world = make_world(config.world, config.model, config.run.device)
    family, prompts = world.family, world.data.prompts("train", config.world.prompts)
    guided = world_facts(find_model(config.model.path)).get("unconditional", True)
    if config.flow.guidance != 1 and not guided:
        raise UserError(
            f"flow.guidance={config.flow.guidance} needs an unconditional embedding and {config.model.path} was trained "
            "without one (pretrain.drop_condition=0); set flow.guidance=1"
        )
    share, ranks = config.policy.prompts // config.policy.minibatches, data_ranks(config.parallel)
    if share % ranks:
        raise UserError(
            f"policy.prompts / policy.minibatches = {share} is not a multiple of the {ranks} ranks; "
            f"use {ranks * config.policy.minibatches * max(1, share // ranks)} prompts"
        )
    sampler = PromptSampler(prompts, config.run.seed)
    check_noise_counters("policy", config.policy.prompts, config.policy.group, sampler)
    rewards = rewards_of(config, world.data, rewards)
    if declared := declared_components(rewards):
        check_components(config.advantage, declared, sampler.categories)
    calibration = None
    if config.advantage.calibration is not None:
        calibration = load_calibration(config.advantage.calibration)
        check_fit(calibration, sampler.categories, declared)
    model_config(config, family)  # what does not fit is refused before anything slow
    family.prepare(prompts, config.flow.guidance != 1)
    check_budgets(config, family, prompts)
    engine = Engine.open(config, family)
    if config.policy.kl and not engine.weights.lora:
        engine.weights.keep("reference")
    trainer = Trainer(config, engine, family, rewards, Scorer(rewards, config.scoring), sampler, guided, calibration)
    if trainer.old:
        engine.weights.keep("old")
    return trainer


def check_budgets(config: TrainConfig, family: Family, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where one sample is larger than a pack may be."""
    twice = 2 if config.flow.guidance != 1 else 1
    for name, budget, need in (
        ("policy.micro_tokens", config.policy.micro_tokens, largest_sample(family, prompts)),
        ("flow.rollout_tokens", config.flow.rollout_tokens, largest_target(family, prompts) * twice),
    ):
        if budget < need:
            raise UserError(
                f"{name}={budget} tokens is smaller than one sample of {need} tokens; set it to {need} or more"
            )


def check_noise_counters(section: str, prompts: int, group: int, sampler: PromptSampler) -> None:
    """Raises UserError if a prompt comes so often in one step that its samples' noise counters would wrap."""
    places = -(-prompts // len(sampler.categories))
    often = max(-(-places // len(own)) + 1 for own in sampler.by_category.values())
    if often * group > 1 << 12:
        raise UserError(
            f"{section}.prompts={prompts} repeats a prompt up to {often} times a step, {often} x group="
            f"{group} is more than the 4096 samples a prompt can have; use more prompts or smaller groups"
        )


def train_step(trainer: Trainer, step: int) -> dict:
    """One rollout and its updates; returns the metrics record of step + 1."""
    config, engine = trainer.config, trainer.engine
    clock = [time.monotonic()]
    chosen = trainer.prompts.step(step, config.policy.prompts)
    scoring = StepScores(trainer, chosen, step)
    exp, slots = sample(trainer, chosen, step, scoring.submit)
    clock.append(time.monotonic())
    scores, images, record = scoring.collect(exp.ids)
    table = gather_scores(trainer, exp.ids, scores, chosen, step, lost=scoring.lost)
    drawn = Drawn(chosen, slots, exp, scores, images, table)
    if config.policy.refill:
        record |= refill(trainer, drawn, step, sample)
    exp = drawn.exp
    record |= assign_advantages(trainer, exp, drawn.table, drawn.chosen, step)
    monitor.write_group(trainer, step + 1, drawn.images, drawn.scores, exp, drawn.chosen, slots)
    clock.append(time.monotonic())
    record |= update(trainer, exp, slots, step)
    clock.append(time.monotonic())
    phases = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    total = clock[-1] - clock[0]
    return {
        "step": step + 1, **record, "lr": engine.optimizer.lr(step), "time/rollout": phases[0], "time/reward": phases[1],
        "time/update": phases[2], "time/step": total,
        "images_per_second": config.policy.prompts * config.policy.group / total,
    }  # fmt: skip


def sample(
    trainer: Trainer, chosen: Sequence[tuple[Prompt, int]], step: int, done=None, slots: list[int] | None = None
) -> tuple[Experience, list[int]]:
    """Draws this rank's groups. Returns them without advantages, and the slots of `chosen` they belong to.

    done(ids, latents) is called for every micro-group of samples as soon as it is finished. slots: draw these; on every
    rank at least one.
    """
    config, engine, family = trainer.config, trainer.engine, trainer.family
    slots = slots or list(range(engine.ranks.rank, len(chosen), engine.ranks.world))
    group, device = config.policy.group, engine.ranks.device
    prompts = [chosen[slot][0] for slot in slots]
    targets = targets_of(family, prompts, group)
    sample_index = [chosen[slot][1] * group + g for slot in slots for g in range(group)]
    draws = stream(config.run.seed, [p.id for p in prompts for _ in range(group)], sample_index, step, device)
    grid = grids(targets, config.flow, device)
    nodes = draw_nodes(draws, grid, config.policy.timesteps, last_step=config.policy.loss == "nft")
    ids = torch.tensor([slot * group + g for slot in slots for g in range(group)])

    def finished(run: list[int], latents: list[torch.Tensor]) -> None:
        if done:
            done(ids[run].tolist(), latents)

    with engine.weights.using(trainer.old):
        x0, kept = without_failed(*sample_in_batches(trainer, prompts, targets, draws, nodes, done=finished))
    unset = torch.zeros(len(targets))
    conditions = [family.condition(p) for p in prompts]
    in_objective = config.guidance.scope == "both" and config.flow.guidance != 1
    negatives = [family.negative(p) for p in prompts] if in_objective else []
    return Experience(conditions, negatives, targets, draws, grid, nodes, x0, kept, ids, unset, unset > 0), slots


def assign_advantages(trainer: Trainer, exp: Experience, everything: torch.Tensor, chosen, step: int) -> dict:
    """Fills exp.advantage and exp.valid from all ranks' raw scores [prompts * group, K]; returns metrics."""
    config, group = trainer.config, trainer.config.policy.group
    slot = torch.arange(len(everything)) // group
    categories = [chosen[s][0].category for s in slot.tolist()]
    weights, scale, noise = weigh(trainer, everything, categories)
    control = shuffle_inside(slot, step, config.run.seed) if config.advantage.shuffle else None
    advantage, valid = advantages(everything, slot, weights, config.advantage, noise, control, scale)
    if control is not None:  # a failed sample that is given another's scores has failed all the same
        valid &= ~everything.isnan().any(1)
        advantage = torch.where(valid, advantage, 0)
    exp.advantage, exp.valid = advantage[exp.ids], valid[exp.ids]
    exp.valid_by_slot = valid.view(-1, group).sum(1)
    components = trainer.components
    record = monitor.reward_metrics(everything, components, categories, weights, slot, advantage, valid)
    if trainer.calibration:
        shown = everything if control is None else everything[control]
        parts = contributions(shown, slot, weights, config.advantage.floor, noise, scale)
        record |= trainer.calibration.share_metrics(*parts, slot, categories, components)
    return record


def update(trainer: Trainer, exp: Experience, slots: Sequence[int], step: int) -> dict:
    """All optimizer steps of one rollout; returns their metrics."""
    config, engine, policy = trainer.config, trainer.engine, trainer.config.policy
    parts = prepare(trainer, exp, slots)
    layout, batches = parts[0][0]
    record = rounding(engine.runner, layout, batches[0], config) if config.model.fp8 != "off" else {}
    rows, norms = [], []
    pairs = policy.prompts * policy.group * config.flow.steps
    for epoch in range(policy.epochs):
        for part in parts:
            stats = torch.cat([accumulate(engine.runner, layout, batches, config) for layout, batches in part])
            norms.append(engine.update(step))
            rows.append((torch.cat([b.ids for _, batches in part for b in batches if b.live]) + epoch * pairs, stats))
    if trainer.old:
        engine.weights.blend("old", min(policy.nft.old_decay, policy.nft.old_ramp * step))
    ids, stats = gather_rows(torch.cat([i for i, _ in rows]), torch.cat([s for _, s in rows]).cpu(), engine.ranks)
    monitored = {name: float(value) for name, value in record.items()}
    return {**_summary(stats, policy.epochs), **monitored, **engine.outcome(step, norms)}


def prepare(trainer: Trainer, exp: Experience, slots: Sequence[int]) -> Parts:
    """Per minibatch its layouts with their batches, with old and reference velocities where the loss needs them."""
    config, engine, policy = trainer.config, trainer.engine, trainer.config.policy
    size = policy.prompts // policy.minibatches
    updates, parts = policy.epochs * policy.minibatches, []
    for number in range(policy.minibatches):
        prompts = [i for i, slot in enumerate(slots) if slot // size == number]
        layouts = lay_out(
            [exp.conditions[i] for i in prompts],
            exp.pairs(prompts),
            policy.micro_tokens,
            lambda s, n: agree(s, n, engine.ranks),
            [exp.negatives[i] for i in prompts] if exp.negatives else (),
            engine.runner.pad,
        )
        valid_pairs = int(exp.valid_by_slot[number * size : (number + 1) * size].sum()) * policy.timesteps.count
        weight = 1.0 / max(1, valid_pairs)
        parts.append([(layout, _batches(exp, layout, config, weight)) for layout in layouts])
    recompute = policy.old == "recompute" or trainer.old or (policy.old == "auto" and updates > 1)
    if recompute:
        with engine.weights.using(trainer.old):
            _fill(engine.runner, parts, "v_old", config)
    if policy.old == "rollout":
        _check_drift(trainer, parts)
    if policy.kl:
        with engine.weights.reference():
            _fill(engine.runner, parts, "v_ref", config)
    return parts


def _batches(exp: Experience, layout: Layout, config: TrainConfig, weight: float) -> list[Batch]:
    return [make_batch(exp, layout, p, config, weight, live=i < layout.live) for i, p in enumerate(layout.packs)]


def _fill(model, parts, name: str, config: TrainConfig) -> None:
    for layout, batches in itertools.chain(*parts):
        for batch, v in zip(batches, velocities(model, layout, batches, config), strict=True):
            setattr(batch, name, v)


def _check_drift(trainer: Trainer, parts: Parts) -> None:
    """`old: rollout` at its first use: the batches of rollout and update differ, so the ratio does not start at 1."""
    if trainer.engine.notes.get("drift_checked"):
        return
    trainer.engine.notes["drift_checked"] = True
    values = [
        drift(v, b.v_rollout, b)
        for layout, batches in itertools.chain(*parts)
        for v, b in zip(velocities(trainer.engine.runner, layout, batches, trainer.config), batches, strict=True)
    ]
    every = torch.cat(values).double()
    total = torch.stack([every.sum(), torch.full_like(every, 1).sum()])
    total = trainer.engine.ranks.data.all_reduce(total)  # ranks start together or not at all
    mean = float(total[0] / total[1])
    limit = (
        1e-6
        if trainer.config.model.dtype != "bfloat16"
        else min(trainer.config.policy.clip_low, trainer.config.policy.clip_high) / 4
    )
    if not mean <= limit:
        raise UserError(
            f"policy.old=rollout: log-probabilities differ by {mean:.1e} before the first update, more than {limit:.1e}; use recompute"
        )


def _summary(stats: torch.Tensor, epochs: int) -> dict:
    """Means over the valid pairs of every pass."""
    stats = stats[stats[:, STATS.index("valid")] > 0]
    if not len(stats):  # every group was dropped
        return {"valid_pairs": 0, "loss": 0.0}
    column = {name: stats[:, i] for i, name in enumerate(STATS)}
    ratio = column["ratio"]
    return {
        "valid_pairs": len(stats) // epochs, "loss": float(column["loss"].mean()), "kl": float(column["kl"].mean()), "ratio_mean": float(ratio.mean()),
        "ratio_min": float(ratio.min()), "ratio_max": float(ratio.max()), "clip_fraction": float(column["clipped"].mean()),
        "log_ratio_abs": float(ratio.log().abs().mean()),
    }  # fmt: skip
