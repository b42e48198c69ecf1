"""On-policy distillation: several task teachers, one student that needs no guidance (algorithm page, section 6).

A step has one teacher and prompts of its task. It is a pure function of (config, seed, step, weights), so a run continues
bit for bit from a checkpoint. The student starts from the base, not from a teacher.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qirl.config import DistillConfig
from qirl.config_sections import Timesteps
from qirl.data.sampler import PromptSampler
from qirl.distillation import samples
from qirl.distillation.schedule import teacher_of, turn_of
from qirl.distillation.sweep import STATS, Guide, Lesson, cut_samples, sweep
from qirl.distillation.teachers import Base, Teachers, find_base, find_sources
from qirl.engine import Engine, model_config
from qirl.errors import UserError
from qirl.families import Family, largest_target, targets_of
from qirl.flow.rollout import DTYPES, grids
from qirl.kernels.philox import stream
from qirl.models.folders import find_model, world_facts
from qirl.parallel.data import Ranks, agree, world_size
from qirl.policy.nodes import draw_nodes
from qirl.policy.trainer import check_noise_counters
from qirl.world import World, make_world


@dataclass
class Distiller:
    """One distillation run on this rank; prompts by task."""

    config: DistillConfig
    engine: Engine
    family: Family
    prompts: dict[str, PromptSampler]
    teachers: Teachers
    base: Base | None


def distill(config: DistillConfig, quiet: bool = False) -> Engine:
    """Trains (or continues) the student in config.run.out and exports it to its model/ folder.

    Raises UserError for a config, teacher or folder that does not fit; SystemExit 143 after a SIGTERM, on a checkpoint.
    """
    distiller = open_distiller(config)
    engine = distiller.engine

    def shown(record: dict) -> dict:
        losses = {k: v for k, v in record.items() if k.startswith("loss/")}
        return losses | {"images/s": record["images_per_second"]}

    engine.run(
        "distill", lambda step: distill_step(distiller, step), shown, lambda step: samples.write(distiller, step), quiet
    )
    knows = world_facts(find_model(config.model.path)).get("unconditional", True)
    engine.finish({**distiller.family.facts(), "unconditional": knows})
    return engine


def prompts_by_task(config: DistillConfig, world: World) -> dict[str, PromptSampler]:
    """The training prompts of each task that has a teacher. Raises UserError for a task without prompts."""
    everything, prompts = world.data.prompts("train", config.world.prompts), {}
    for task in sorted({teacher.task for teacher in config.distill.teachers.values()}):
        own = [p for p in everything if p.task == task]
        if not own:
            raise UserError(
                f"world.prompts={config.world.prompts} has no {task} prompt for the {task} teacher; add some"
            )
        prompts[task] = PromptSampler(own, config.run.seed)
    return prompts


def open_distiller(config: DistillConfig) -> Distiller:
    """Everything that can be refused is refused here, before weights are loaded and before the run folder is touched."""
    options, ranks = config.distill, world_size()
    world = make_world(config.world, config.model, config.run.device)
    prompts = prompts_by_task(config, world)
    if options.prompts < ranks:
        raise UserError(f"distill.prompts={options.prompts} is smaller than the {ranks} ranks; use {ranks} or more")
    for sampler in prompts.values():
        check_noise_counters("distill", options.prompts, options.group, sampler)
    sources = find_sources(config)
    model_config(config, world.family)
    everything = [p for sampler in prompts.values() for own in sampler.by_category.values() for p in own]
    world.family.prepare(everything, any(teacher.guidance != 1 for teacher in options.teachers.values()))
    need = largest_target(world.family, everything) + max(map(world.family.condition_tokens, everything))
    if options.micro_tokens < need:
        raise UserError(
            f"distill.micro_tokens={options.micro_tokens} tokens is smaller than one sample of {need} tokens (its "
            f"prompt's included); set it to {need} or more"
        )
    engine = Engine.open(config, world.family)
    folder = find_model(config.model.path)
    teachers = Teachers(sources, folder, DTYPES[config.model.dtype], engine.ranks, config.model.variant)
    base = find_base(config, engine.model, teachers, folder, engine.ranks) if options.anchor else None
    return Distiller(config, engine, world.family, prompts, teachers, base)


def shares_of(config: DistillConfig) -> dict[str, int]:
    return {name: teacher.share for name, teacher in config.distill.teachers.items()}


def distill_step(distiller: Distiller, step: int) -> dict:
    """One update on distill.prompts x distill.group trajectories; returns the metrics record of step + 1."""
    config, engine, shares = distiller.config, distiller.engine, shares_of(distiller.config)
    options, clock = config.distill, [time.monotonic()]
    name = teacher_of(step, shares)
    distiller.teachers.activate(name)
    if step + 1 < config.run.steps:
        distiller.teachers.prefetch(teacher_of(step + 1, shares))
    clock.append(time.monotonic())
    lesson = lesson_of(config, distiller.family, distiller.prompts, step, engine.ranks, engine.runner.pad)
    stats = accumulate(distiller, lesson, name)
    clock.append(time.monotonic())
    norm = engine.update(step)
    loss, match, pull = stats.sum(0).tolist()  # the host waits from here on
    outcome = engine.outcome(step, [norm])
    clock.append(time.monotonic())
    phases = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    total = clock[-1] - clock[0]
    return {
        "step": step + 1, "loss": loss, f"loss/{name}": loss, "match": match, **({"anchor": pull} if options.anchor else {}),
        **outcome, "lr": engine.optimizer.lr(step), "time/teacher": phases[0],
        "time/sweep": phases[1], "time/update": phases[2], "time/step": total,
        "images_per_second": options.prompts * options.group / total,
    }  # fmt: skip


def lesson_of(
    config: DistillConfig, family: Family, prompts: Mapping[str, PromptSampler], step: int, ranks: Ranks, pad: int = 1
) -> Lesson:
    """One rank's samples of a step: its share of the prompts, from noise that never returns. pad: that of the student."""
    shares, options = shares_of(config), config.distill
    teacher = options.teachers[teacher_of(step, shares)]
    chosen = prompts[teacher.task].step(turn_of(step, shares), options.prompts)
    own = chosen[ranks.rank :: ranks.world]
    texts = [prompt for prompt, _ in own]
    targets = targets_of(family, texts, options.group)
    numbers = [again * options.group + g for _, again in own for g in range(options.group)]
    draws = stream(config.run.seed, [p.id for p in texts for _ in range(options.group)], numbers, step, ranks.device)
    grid = grids(targets, config.flow, ranks.device)
    if options.nodes:
        some = Timesteps(count=options.nodes, power=options.power, skip_last=0.0)
        nodes = draw_nodes(draws, grid, some, last_step=True)
    else:
        nodes = [tuple(range(config.flow.steps))] * len(targets)
    negatives = [family.negative(p) for p in texts] if teacher.guidance != 1 else ()
    return Lesson([family.condition(p) for p in texts], negatives, targets, draws, grid, nodes, pad)


def accumulate(distiller: Distiller, lesson: Lesson, name: str) -> torch.Tensor:
    """Adds the gradients of all packs of all ranks; returns the global STATS per node, float64 [steps, 3]."""
    config, engine = distiller.config, distiller.engine
    options, teacher = config.distill, config.distill.teachers[name]
    guide = Guide(distiller.teachers.model, teacher.guidance, teacher.rescale)
    pairs = options.prompts * options.group * (options.nodes or config.flow.steps)
    packs = [lesson.take(members) for members in cut_samples(lesson, options.micro_tokens)]
    _, count = agree(False, len(packs), engine.ranks)
    live, packs = len(packs), packs + packs[:1] * (count - len(packs))
    schedules = agree_on_schedules([pack.schedule() for pack in packs], engine.ranks)
    total = torch.zeros(config.flow.steps, len(STATS), dtype=torch.float64, device=engine.ranks.device)
    for place, (pack, schedule) in enumerate(zip(packs, schedules, strict=True)):
        weight = 1 / pairs if place < live else 0.0
        total += sweep(engine.runner, guide, pack, config.flow, options, weight, distiller.base, schedule)
    return engine.ranks.data.all_reduce(total)


def agree_on_schedules(schedules: list[list[tuple[bool, bool]]], ranks) -> list[list[tuple[bool, bool]]]:
    """Per pack and node, what any rank runs there: all run the same collectives in one order."""
    if ranks.world == 1:
        return schedules
    table = torch.tensor(schedules, dtype=torch.int64, device=ranks.device)
    ranks.data.all_reduce(table, torch.distributed.ReduceOp.MAX)
    return [[(bool(a), bool(b)) for a, b in nodes] for nodes in table.tolist()]
