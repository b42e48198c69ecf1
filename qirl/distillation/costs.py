"""What a distillation run will cost, for `qirl distill --dry-run`: student, teachers and base, on the meta device."""

from __future__ import annotations

from qirl.config import DistillConfig
from qirl.costs import Flops, activation_bytes, describe_packs, forward_flops, training_flops
from qirl.distillation.schedule import order
from qirl.distillation.sweep import Lesson, cut_samples
from qirl.distillation.teachers import find_sources, meta_teacher
from qirl.distillation.trainer import lesson_of, prompts_by_task, shares_of
from qirl.flow.rollout import DTYPES
from qirl.models.architecture import Transformer
from qirl.packing import Pack, pack
from qirl.parallel.data import Ranks
from qirl.policy.packs import Layout
from qirl.world import World


def distillation(config: DistillConfig, world: World, model: Transformer, ranks: int):
    """(tokens, flops, memory) for qirl.plan.plan: of a step with each teacher, in its first turn."""
    prompts, period = prompts_by_task(config, world), order(shares_of(config))
    tokens, flops, largest = {}, {}, None
    for name in config.distill.teachers:
        lesson = lesson_of(config, world.family, prompts, period.index(name), Ranks(world=ranks))
        packs = [lesson.take(members) for members in cut_samples(lesson, config.distill.micro_tokens)]
        bodies = [own.part(range(len(own.targets))).body for own in packs]
        prefixes = [pack(own.conditions, []) for own in packs]
        student, teacher = Flops(), Flops()
        for own, prefix in zip(packs, prefixes, strict=True):
            parts = _pack_flops(config, model, own, prefix)
            student, teacher = student + parts[0], teacher + parts[1]
            tokens_of_pack = _tokens(prefix) + sum(own.part(range(len(own.targets))).body.lengths)
            if largest is None or tokens_of_pack > largest[0]:
                largest = tokens_of_pack, own
        tokens[f"teacher {name}"] = describe_packs(bodies, max(map(_tokens, prefixes)))
        flops |= {f"student, teacher {name}": student, f"teacher {name}": teacher}
    own = largest[1]
    layout = Layout(own.conditions, (), [], 0, seam=True)
    body = own.part(range(len(own.targets))).body
    return tokens, flops, _teachers_memory(config, ranks) | {"activations": activation_bytes(model, layout, body)}


def _tokens(prefix: Pack | None) -> int:
    """0 where nothing is shared."""
    return prefix.tokens if prefix else 0


def _pack_flops(config: DistillConfig, model: Transformer, lesson: Lesson, prefix) -> tuple[Flops, Flops]:
    """The student's sweep with its backward, and the forwards of teacher and base at the trained nodes."""
    c = model.config
    once = forward_flops(c, prefix)
    student = training_flops(config, model, once, _tokens(prefix))
    teacher = forward_flops(c, pack(lesson.with_twins([])[0], [])) + once * int(config.distill.anchor > 0)
    for node in range(config.flow.steps):
        trained = [i for i, own in enumerate(lesson.nodes) if node in own]
        passing = [i for i, own in enumerate(lesson.nodes) if node not in own]
        if passing:
            student += forward_flops(c, lesson.part(passing).body)
        if trained:
            part = lesson.part(trained)
            forward = forward_flops(c, part.body)
            student += training_flops(config, model, forward, part.body.tokens)
            teacher += forward_flops(c, part.guided or part.body) + forward * int(config.distill.anchor > 0)
    return student, teacher


def _teachers_memory(config: DistillConfig, ranks: int) -> dict[str, int]:
    """Bytes per rank: the active teacher (sharded as the student is), the one on its way, and those in host memory."""
    sources = find_sources(config)
    adapters = [s.adapter for s in sources.values() if s.adapter is not None]
    teacher = meta_teacher(config.model.path, adapters)
    size = DTYPES[config.model.dtype].itemsize
    share = lambda count: -(-count * size // ranks)  # noqa: E731
    slots = sum(p.numel() for name, p in teacher.named_parameters() if ".lora_" in name)
    whole = sum(p.numel() for p in teacher.parameters())
    swapped = slots if len(adapters) == len(sources) else whole
    parts = {"teacher": share(whole)}
    if len(sources) > 1:
        parts |= {"teacher on its way": share(swapped)}
        # adapters beside whole models share one copy of the base
        shared = whole - slots if adapters and swapped == whole else 0
        parts |= {f"host, teacher {name}": share(swapped - (shared if s.adapter else 0)) for name, s in sources.items()}
        parts |= {"host, base of adapters": share(shared)} if shared else {}
    if config.distill.anchor and not config.model.lora.rank and len(adapters) < len(sources):
        parts["base"] = share(whole - slots)
    if ranks > 1:  # FSDP gathers one block at a time, and what is outside of blocks
        blocks = [sum(p.numel() for p in block.parameters()) for block in teacher.transformer_blocks]
        parts["gathered teacher"] = size * (whole - sum(blocks) + blocks[0])
    return parts
