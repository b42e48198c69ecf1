"""What a run will cost, before it starts: parameters, tokens per pack, FLOPs and memory. `--dry-run` prints it.

The models are built on the meta device: no weights are read and nothing is written. Counted are the model, its training, the
encoders and the weights of rewards that run in this process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml

from qirl.config import (
    KINDS,
    CalibrateConfig,
    CurateConfig,
    DistillConfig,
    EvaluateConfig,
    PretrainConfig,
    TrainConfig,
    load,
    to_dict,
)
from qirl.config_sections import Flow, Section
from qirl.costs import Flops, activation_bytes, describe_packs, forward_flops, training_flops
from qirl.curation.probe import batches, candidates
from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.distillation.costs import distillation
from qirl.engine import DTYPES, model_config, parallel_of
from qirl.errors import UserError
from qirl.families import Family, Sketched, targets_of
from qirl.flow.rollout import with_negatives
from qirl.models.architecture import Transformer, recompute
from qirl.models.folders import find_model
from qirl.models.lora import add_lora
from qirl.models.quantised import LARGEST, quantise
from qirl.models.weights import check_weights, new_model
from qirl.packing import Target, cut, pack
from qirl.parallel.apply import sharding_of
from qirl.parallel.data import Ranks, run_device
from qirl.parallel.mesh import Axis, Degrees
from qirl.policy.packs import Layout, Pair, lay_out
from qirl.rewards.costs import reward_bytes
from qirl.world import World, make_world

# what is there one after the other: while a run trains and draws, and before its model is loaded
PHASES = ("activations", "keys and values in the rollout", "autoencoder on a step's images")
BEFORE = ("text encoder, before all else", "autoencoder on sources, before all else")
DRAWING = (EvaluateConfig, CurateConfig, CalibrateConfig)  # commands that train nothing


def meta_model(config: Section, world: World) -> Transformer:
    """The run's model on the meta device, with adapters, after its files' headers were checked."""
    with torch.device("meta"):
        model = new_model(model_config(config, world.family)).to(DTYPES[config.model.dtype])
        if config.model.path is not None:
            check_weights(model, find_model(config.model.path), config.model.variant)
        if config.model.base in LARGEST and not isinstance(config, DRAWING):
            quantise(model, config.model.base)
        recompute(model, config.model.checkpointing)
    lora = config.model.lora
    if lora.rank and not isinstance(config, DRAWING):
        with torch.device("meta"):
            add_lora(model, lora.rank, lora.alpha, lora.targets, config.run.seed)
    return model


def plan(config: Section, world_size: int = 1) -> dict:
    """{"config", "world_size", "parameters", "tokens", "flops", "memory"} of a run on `world_size` ranks.

    tokens: one data parallel rank's packs of the first step. flops: of a step (evaluate, curate, calibrate: of the whole), all ranks together.
    memory: bytes per rank; what is called "host ..." waits in host memory and is not in the total.
    Raises UserError for a model that is missing or does not fit, and budgets too small.
    """
    if isinstance(config, EvaluateConfig) and config.evaluation.models:
        return _plan_of_models(config)
    layout = Degrees() if isinstance(config, DRAWING) else Degrees.of(parallel_of(config), world_size)
    world = make_world(config.world, config.model)
    world = replace(world, family=Sketched(world.family))
    model = meta_model(config, world)
    layout.check(model.config)
    total, trainable, _ = _counts(config, model)
    work = {
        PretrainConfig: _pretrain, TrainConfig: _train, DistillConfig: distillation, EvaluateConfig: _evaluate,
        CurateConfig: _probe, CalibrateConfig: _probe,
    }[type(config)]  # fmt: skip
    tokens, flops, memory = work(config, world, model, layout.dp)
    sharding = sharding_of(model.config, Ranks(tp=Axis(size=layout.tp)))
    for adapters in (False, True):
        sharding.cut(model, adapters)
    memory = {
        **_weights_memory(config, *_counts(config, model), layout.dp),
        **_eight_bits(config, model),
        **memory,
        **_images_memory(config, world),
    }
    memory |= reward_bytes(getattr(config, "rewards", {}))
    return {
        "config": to_dict(config),
        "world_size": layout.dp * layout.tp,
        "parameters": {"total": total, "trainable": trainable},
        "tokens": tokens,
        "flops": {name: (count * layout.dp).as_dict() for name, count in flops.items()},
        "memory": {**memory, "total": _peak(memory)},
    }


def _counts(config: Section, model: torch.nn.Module) -> tuple[int, int, int]:
    """Parameters, trained ones, and bytes of those that are not."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad and not isinstance(config, DRAWING)]
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return sum(p.numel() for p in model.parameters()), sum(trained), frozen


def _peak(memory: dict[str, int]) -> int:
    """Bytes at once: what stays, and the largest of the phases; or what runs before the model is loaded, beside the rewards."""
    phases, before = (max(memory.get(name, 0) for name in names) for names in (PHASES, BEFORE))
    here = {name: size for name, size in memory.items() if not name.startswith("host")}
    rewards = sum(size for name, size in here.items() if name.startswith("reward "))
    return max(sum(size for name, size in here.items() if name not in (*PHASES, *BEFORE)) + phases, rewards + before)


def _has_images(config: Section) -> bool:
    """Whether a calibration's images are drawn and scored already."""
    return isinstance(config, CalibrateConfig) and config.calibrate.ledger is not None


def _images_memory(config: Section, world: World) -> dict[str, int]:
    """Bytes of the encoders of prompts, and of the autoencoder on the largest image that it decodes (pretraining: encodes)."""
    family = world.family
    split = "held_out" if isinstance(config, EvaluateConfig) else "train"
    prompts = world.data.prompts(split, config.world.prompts)
    largest = max(map(family.size, prompts), key=math.prod)
    found = {PHASES[2]: family.autoencoder_bytes(largest, encoding=isinstance(config, PretrainConfig))}
    found[BEFORE[0]] = family.encoder_bytes()
    if found[PHASES[2]] and (edit := next((p for p in prompts if p.sources), None)):
        sizes = [size for what, *size in family.condition(edit).layout if what == "image"]
        found[BEFORE[1]] = family.autoencoder_bytes(tuple(max(sizes, key=math.prod)), encoding=True)
    return {name: size for name, size in found.items() if size}


def _plan_of_models(config: EvaluateConfig) -> dict:
    """One evaluation after the other: parameters and memory of the largest model, tokens and flops of each."""
    from qirl.evaluation.compare import config_of

    plans = {name: plan(config_of(config, name)) for name in config.evaluation.models}
    each = {
        part: {f"{name}, {phase}": numbers for name, own in plans.items() for phase, numbers in own[part].items()}
        for part in ("tokens", "flops")
    }
    return max(plans.values(), key=lambda own: own["memory"]["total"]) | each | {"config": to_dict(config)}


def _weights_memory(config: Section, total: int, trainable: int, frozen: int, ranks: int) -> dict[str, int]:
    """Bytes of what stays all run long; frozen: bytes of the weights that are not trained, in their own dtype. Several ranks, or bfloat16 over float32: sharded, and gathered to compute."""
    size = DTYPES[config.model.dtype].itemsize
    if isinstance(config, DRAWING):
        return {"weights": total * size}
    master = max(size, 4)
    share = lambda count: -(-count * master // ranks)  # noqa: E731
    kept = -(-frozen // ranks) if config.model.frozen else share(total - trainable)
    parts = {
        "weights": share(trainable) + kept, "gradients": share(trainable), "optimizer": _moments(config, trainable, ranks),
    }  # fmt: skip
    parts |= {f"copy: {name}": share(trainable) for name in _copies(config)}
    gathered = ranks > 1 or config.model.dtype == "bfloat16" and not config.model.frozen
    return parts | ({"gathered weights": total * size} if gathered else {})


def _eight_bits(config: Section, model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the weights that `model.fp8=torch` keeps in 8 bits beside the frozen ones: for the forward, where those have
    more bits, and transposed for the backward. Trained ones are quantised in passing."""
    frozen = isinstance(config, DRAWING) or config.model.lora.rank
    if config.model.fp8 != "torch" or not frozen:
        return {}
    weights = sum(
        p.numel() for name, p in model.named_parameters()
        if re.fullmatch(r"transformer_blocks\.\d+\..*weight", name) and "lora_" not in name and p.ndim == 2 and "_mod." not in name
    )  # fmt: skip
    forward, backward = config.model.base != "fp8", not isinstance(config, DRAWING)
    return {"weights in 8 bits": weights * (forward + backward)}


def _moments(config: Section, trainable: int, ranks: int) -> int:
    """Bytes of AdamW's two moments; in 8 bits with a float32 scale for every 256 of them."""
    if config.optimizer.kind == "adamw_8bit":
        return 2 * (trainable + 4 * (trainable // 256))
    return 2 * -(-trainable * max(DTYPES[config.model.dtype].itemsize, 4) // ranks)


def _copies(config: PretrainConfig | TrainConfig | DistillConfig) -> list[str]:
    names = ["ema"] if config.optimizer.ema else []
    if isinstance(config, TrainConfig):
        if config.policy.kl and not config.model.lora.rank:
            names.append("reference")
        if config.policy.loss == "nft" and config.policy.nft.old_decay:
            names.append("old")
    return names


def _pretrain(config: PretrainConfig, world: World, model: Transformer, ranks: int):
    """Texts of training prompts stand for the examples' own; dropped conditions make packs a little smaller."""
    batch = -(-config.pretrain.batch // ranks)
    family = world.family
    prompts = [
        p for p, _ in PromptSampler(world.data.prompts("train", config.world.prompts), config.run.seed).step(0, batch)
    ]
    prompts = sorted(prompts, key=lambda p: family.condition(p).tokens)
    conditions, targets = [family.condition(p) for p in prompts], targets_of(family, prompts)
    costs = [c.tokens + t.tokens for c, t in zip(conditions, targets, strict=True)]
    runs = cut(costs, config.pretrain.micro_tokens, "pretrain.micro_tokens")
    bodies = [
        pack([conditions[i] for i in run], [replace(targets[i], prompt=place) for place, i in enumerate(run)])
        for run in runs
    ]
    layout = Layout([conditions[i] for i in runs[0]], (), [], 0, seam=False)
    largest = max(bodies, key=lambda b: b.tokens)
    forward = sum((forward_flops(model.config, b) for b in bodies), Flops())
    flops = {"update": training_flops(config, model, forward, sum(b.tokens for b in bodies))}
    memory = {"activations": activation_bytes(model, layout, largest)}
    return {"update": describe_packs(bodies)}, flops, memory


def _train(config: TrainConfig, world: World, model: Transformer, ranks: int):
    policy, flow = config.policy, config.flow
    slots = list(range(0, policy.prompts, ranks))
    sampler = PromptSampler(world.data.prompts("train", config.world.prompts), config.run.seed)
    chosen = sampler.step(0, policy.prompts)
    prompts = [chosen[slot][0] for slot in slots]
    rolled, rollout, past = _rollout(model, world.family, prompts, policy.group, flow, flow.rollout_tokens)
    size = policy.prompts // policy.minibatches
    shares = [[i for i, slot in enumerate(slots) if slot // size == m] for m in range(policy.minibatches)]
    layouts = [layout for share in shares for layout in _layouts(config, world.family, [prompts[i] for i in share])]
    bodies = [[layout.body(members, "cpu") for members in layout.packs] for layout in layouts]
    forward, tokens = Flops(), 0
    for layout, own in zip(layouts, bodies, strict=True):
        packs = [*own, layout.prefix("cpu")] if layout.seam else own
        forward = sum((forward_flops(model.config, b) for b in packs), forward)
        tokens += sum(b.tokens for b in packs)
    updates = policy.epochs * policy.minibatches
    again = policy.old == "recompute" or (policy.old == "auto" and updates > 1) or "old" in _copies(config)
    extra = int(again) + int(policy.kl > 0)  # old and reference velocities: forwards without gradient
    update = training_flops(config, model, forward, tokens) * policy.epochs + forward * extra
    place, largest = max(((m, b) for m, own in enumerate(bodies) for b in own), key=lambda found: found[1].tokens)
    memory = {
        "kept states": _kept_bytes(config, world.family, prompts),
        "activations": activation_bytes(model, layouts[place], largest),
        PHASES[1]: past,
    }
    everything = [b for own in bodies for b in own]
    prefix = layouts[place].prefix("cpu").tokens if layouts[place].seam else None
    described = {"rollout": rolled, "update": describe_packs(everything, prefix)}
    described["update"] |= {
        "tokens": tokens,
        "pairs": policy.group * len(slots) * policy.timesteps.count,
        "updates": updates,
    }
    return described, {"rollout": rollout, "update": update}, memory


def _layouts(config: TrainConfig, family: Family, prompts: Sequence[Prompt]) -> list[Layout]:
    policy = config.policy
    own = [
        Pair(place * policy.group + g, node, place, *family.size(prompt))
        for place, prompt in enumerate(prompts)
        for g in range(policy.group)
        for node in range(policy.timesteps.count)
    ]
    guided = config.guidance.scope == "both" and config.flow.guidance != 1
    return lay_out(
        [family.condition(p) for p in prompts],
        own,
        policy.micro_tokens,
        lambda seam, packs: (seam, packs),
        [family.negative(p) for p in prompts] if guided else (),
    )


def _kept_bytes(config: TrainConfig, family: Family, prompts: Sequence[Prompt]) -> int:
    """Finished latents of a rank's samples; for grpo and guard also x, x' and the velocity of every trained node."""
    policy, size = config.policy, DTYPES[config.model.dtype].itemsize
    values = sum(t.tokens for t in targets_of(family, prompts, policy.group)) * family.channels
    transition = 2 * DTYPES[config.flow.storage].itemsize + size if policy.loss != "nft" else 0
    return values * (max(size, 4) + policy.timesteps.count * transition)


def _rollout(model: Transformer, family: Family, prompts, group: int, flow: Flow, budget: int, whole=False):
    """Batches, FLOPs and bytes of the prefixes' keys and values of sampling `group` images per prompt; whole: a prompt's
    images stay in one batch."""
    guided = flow.guidance != 1
    twice, targets = 2 if guided else 1, targets_of(family, prompts, 1 if whole else group)
    costs = [t.tokens * twice * (group if whole else 1) for t in targets]
    runs = cut(costs, max(budget, *costs) if whole else budget, "flow.rollout_tokens")
    bodies, flops = [], Flops()
    for run in runs:
        places = [p for p in run for _ in range(group)] if whole else [i // group for i in run]
        used = sorted(set(places))
        own = [Target(used.index(p), *family.size(prompts[p])) for p in places]
        everything = [family.condition(prompts[p]) for p in used]
        twins = []
        if guided:
            everything, twins = with_negatives(everything, own, [family.negative(prompts[p]) for p in used])
        body = pack(everything, [*own, *twins])
        bodies.append(body)
        prefill = forward_flops(model.config, pack(everything, []))
        flops += prefill + forward_flops(model.config, body.without_prefix()) * flow.steps
    kept = max(body.prefix_tokens for body in bodies) * 2 * model.config.num_layers * model.config.width
    return describe_packs(bodies), flops, kept * model.dtype.itemsize


def _evaluate(config: EvaluateConfig, world: World, model: Transformer, ranks: int):
    options = config.evaluation
    sampler = PromptSampler(world.data.prompts("held_out", config.world.prompts), options.seed)
    prompts = [p for p, _ in sampler.step(0, options.prompts)]
    tokens, flops, kept = {}, {}, 0
    for guidance in options.guidance:
        flow = config.flow.model_copy(update={"steps": options.steps, "guidance": guidance})
        *found, past = _rollout(model, world.family, prompts, options.group, flow, options.batch_tokens, whole=True)
        tokens[f"guidance {guidance:g}"], flops[f"guidance {guidance:g}"] = found
        kept = max(kept, past)
    return tokens, flops, {PHASES[1]: kept}


def _probe(config: CurateConfig | CalibrateConfig, world: World, model: Transformer, ranks: int):
    if _has_images(config):
        return {}, {}, {}
    prompts, probe, flow = candidates(config, world), config.probe, config.flow
    found = [
        _rollout(model, world.family, [prompts[i] for i in run], probe.group, flow, flow.rollout_tokens)
        for run in batches(config, world.family, prompts)
    ]
    numbers = [own for own, *_ in found]
    largest = max(numbers, key=lambda own: own["prefix"] + own["targets"])
    tokens = largest | {name: sum(own[name] for own in numbers) for name in ("packs", "tokens")}
    return (
        {"probe": tokens},
        {"probe": sum((flops for _, flops, _ in found), Flops())},
        {PHASES[1]: max(past for *_, past in found)},
    )


def gpu_memory(config: Section) -> int | None:
    """Bytes of the GPU that `config` runs on here, None on a CPU. Raises UserError for one that is not there."""
    device = run_device(config.run.device)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def refuse_too_large(config: Section, ranks: int) -> None:
    """Raises UserError, with settings that would fit, where a run needs more than a GPU has."""
    room = gpu_memory(config)
    if room is None:
        return
    need = plan(config, ranks)["memory"]["total"]
    if need > room:
        raise UserError(
            f"this run needs about {_unit(need, 1024)}B on each GPU (--dry-run lists them), which has {_unit(room, 1024)}B; "
            f"{_advice(config, ranks, room)}"
        )


def _advice(config: Section, ranks: int, room: int) -> str:
    """The first of some settings, one added to the other, with which a run fits."""
    values, told = to_dict(config), []
    for name, value in _remedies(config):
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
        told.append(f"{name}={value}")
        try:
            if plan(load(_kind(config), values), ranks)["memory"]["total"] <= room:
                return f"set {' '.join(told)}"
        except UserError:  # below one sample
            place[last] = 2 * value
            told.pop()
    return "use more ranks, or a recipe for a smaller GPU"


def _kind(config: Section) -> str:
    return next(kind for kind, schema in KINDS.items() if type(config) is schema)


def _remedies(config: Section) -> Iterator[tuple[str, Any]]:
    if config.model.checkpointing != "block":
        yield "model.checkpointing", "block"
    section = {TrainConfig: "policy", DistillConfig: "distill", PretrainConfig: "pretrain"}[type(config)]
    tokens = getattr(config, section).micro_tokens
    for _ in range(5):
        tokens //= 2
        yield f"{section}.micro_tokens", tokens
    if config.model.lora.rank:
        yield "model.base", "int8"
    elif config.model.path is not None:
        yield "model.lora.rank", 32


def print_plan(config: Section, world_size: int = 1) -> None:
    """The plan on standard output: the config as YAML, then one line a number."""
    room, found = gpu_memory(config), plan(config, world_size)
    print(yaml.safe_dump(found["config"], sort_keys=False, default_flow_style=None, width=120))
    per_step = "" if isinstance(config, DRAWING) else ", per step"
    rows = [("ranks", str(found["world_size"]))]
    rows += [(f"parameters, {name}", f"{count:,}") for name, count in found["parameters"].items()]
    for phase, numbers in found["tokens"].items():
        rows.append((f"packs of {phase}, per rank", _sentence(numbers)))
    for phase, numbers in found["flops"].items():
        shares = f"{numbers['matmul'] / max(1, numbers['total']):.0%} linear layers, rest attention"
        rows.append((f"FLOPs of {phase}{per_step}", f"{_unit(numbers['total'], 1000)}FLOP ({shares})"))
    rows += [(f"memory per rank, {name}", f"{_unit(size, 1024)}B") for name, size in found["memory"].items()]
    if room is not None:
        need = found["memory"]["total"]
        fits = (
            "enough"
            if need <= room or isinstance(config, DRAWING)
            else f"too little; {_advice(config, world_size, room)}"
        )
        rows.append(("memory of this GPU", f"{_unit(room, 1024)}B: {fits}"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    print("FLOPs: 2 x weights x tokens of linear layers + 4 x width x (query, key) pairs; backward counts twice.")
    print(
        "Activations: what autograd keeps for the largest pack. Rewards count by the weights that run here; data does not."
    )


def _sentence(numbers: dict[str, int]) -> str:
    seam = "; each prompt's prefix runs once" if numbers["seam"] else ""
    return (
        f"{numbers['packs']}{seam}; the largest: {numbers['prefix']} prefix and {numbers['targets']} target tokens "
        f"({numbers['samples']} targets); {numbers['tokens']:,} tokens in all"
    )


def _unit(value: float, base: int) -> str:
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while value >= base and prefix != "T":
        value, prefix = value / base, next(prefixes)
    return f"{value:.1f} {prefix}{'i' if base == 1024 and prefix else ''}"
