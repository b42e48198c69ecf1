"""Evaluation of a model: it draws held-out prompts from fresh noise at several guidance scales, and is measured.

The noise depends on (evaluation.seed, prompt, sample) only, so two models are compared on the same draws.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qirl.config import EvaluateConfig, load, to_dict
from qirl.config_sections import Flow
from qirl.config_sections import World as WorldOptions
from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.engine import DTYPES, model_config
from qirl.errors import UserError
from qirl.evaluation.measure import measure
from qirl.families import Family, images_of, largest_target, targets_of
from qirl.families.registry import is_pipeline
from qirl.flow.rollout import not_finite, rollout
from qirl.kernels.philox import stream
from qirl.models.architecture import Transformer
from qirl.models.execution import compute_as, runner_of
from qirl.models.folders import find_model, world_facts
from qirl.models.weight_files import weight_files
from qirl.models.weights import load_model
from qirl.packing import cut
from qirl.parallel.data import use_device
from qirl.rewards.judge import held_out_judge
from qirl.rewards.protocol import Reward
from qirl.rewards.registry import identity, rewards_of
from qirl.run.cache import content_key
from qirl.run.folder import check_writable, write_json
from qirl.run.progress import Live
from qirl.world import make_world


@dataclass(frozen=True)
class Exam:
    """What every model of an evaluation is asked, and who reads the answers; judge: of the digits, None elsewhere."""

    family: Family
    prompts: list[tuple[Prompt, int]]  # with the number of earlier groups of the same prompt
    rewards: list[Reward]
    judge: Any

    @classmethod
    def of(cls, config: EvaluateConfig, rewards: Sequence[Reward] = ()) -> Exam:
        world, options = make_world(config.world, config.model, config.run.device), config.evaluation
        chosen = balanced(world.data.prompts("held_out", config.world.prompts), options.prompts, options.seed)
        judge = held_out_judge() if world.data.name == "digits" else None
        return cls(world.family, chosen, rewards_of(config, world.data, rewards), judge)


def evaluate(config: EvaluateConfig, rewards: Sequence[Reward] = (), quiet: bool = False) -> dict:
    """Results of config.model.path per guidance scale: {"1": {"judge_accuracy", "rewards", "gap", ...}} (see `measure`).

    rewards: callables of qirl.rewards.protocol; none: those of config.rewards, or else the world's own. Also written to
    evaluation.json in config.run.out or, where that is not given, in the model's run folder. Raises UserError for a model
    that is missing or does not fit, and for guidance other than 1 with a model that has no unconditional embedding.
    """
    check(config)
    check_writable(out_folder(config))
    scales = config.evaluation.guidance
    exam = Exam.of(config, rewards)
    exam.family.prepare([p for p, _ in exam.prompts], any(g != 1 for g in scales))
    results = {f"{guidance:g}": found for guidance, _, found in scan(config, exam, scales, quiet)}
    keep_results(config, results, rewards)
    return results


def check(config: EvaluateConfig) -> None:
    """Raises the UserErrors of an evaluation before anything slow begins."""
    world, options = make_world(config.world, config.model, config.run.device), config.evaluation
    prompts = world.data.prompts("held_out", config.world.prompts)
    need = largest_target(world.family, prompts) * (2 if any(g != 1 for g in options.guidance) else 1)
    if options.batch_tokens < need:
        raise UserError(
            f"evaluation.batch_tokens={options.batch_tokens} tokens is smaller than one sample of {need} tokens; "
            f"set it to {need} or more"
        )
    check_model(config, world.family, options.guidance)


def scan(
    config: EvaluateConfig, exam: Exam, scales: Sequence[float], quiet: bool = False
) -> Iterator[tuple[float, list[list[np.ndarray]], dict]]:
    """(guidance, images uint8 [H, W, 3] of each prompt's group, results) of config.model.path, one guidance scale after the other."""
    options = config.evaluation
    model = open_model(config, exam.family, scales)
    with Live("evaluate", len(scales), show=not quiet) as live:
        for done, guidance in enumerate(scales, start=1):
            flow = config.flow.model_copy(update={"steps": options.steps, "guidance": guidance, "sampler": "ode"})
            images = draw(model, exam.family, exam.prompts, options.group, flow, options.seed, options.batch_tokens)
            found = measure(images, [p for p, _ in exam.prompts], exam.rewards, exam.judge, config.scoring)
            live.update(done, {"guidance": guidance, "judge": found["judge_accuracy"]})
            yield guidance, images, found


def evaluation_key(config: EvaluateConfig, rewards: Sequence[Reward] = ()) -> str:
    """What decides an evaluation's numbers: the config (folders and scales aside), the weights, and the code that runs.

    Of `rewards` nobody knows whether they are the same as last time, so with them every key is a new one.
    """
    import qirl
    import qirl.kernels

    files = weight_files(find_model(config.model.path), config.model.variant)
    weights = [zlib.crc32(path.read_bytes()) for path in files]
    plain = {k: v for k, v in to_dict(config).items() if k in ("world", "flow", "evaluation")}
    plain["evaluation"] = {k: v for k, v in plain["evaluation"].items() if k not in ("guidance", "models")}
    plain |= {"rewards": uuid.uuid4().hex if rewards else identity(config.rewards)}
    return content_key(plain, config.model.dtype, config.model.fp8, weights, qirl, qirl.kernels)


def known_results(config: EvaluateConfig, rewards: Sequence[Reward] = ()) -> dict | None:
    """The results at config.evaluation.guidance where all of them were found before with the same key, or None."""
    known = _kept(config, evaluation_key(config, rewards))
    scales = [f"{guidance:g}" for guidance in config.evaluation.guidance]
    return {scale: known[scale] for scale in scales} if all(scale in known for scale in scales) else None


def keep_results(config: EvaluateConfig, results: dict, rewards: Sequence[Reward] = ()) -> None:
    """Writes evaluation.json; results at other scales stay there if their key is the same."""
    out, key = out_folder(config), evaluation_key(config, rewards)
    everything = _kept(config, key) | results
    out.mkdir(parents=True, exist_ok=True)
    record = {"model": str(config.model.path), "key": key}
    record["guidance"] = {scale: everything[scale] for scale in sorted(everything, key=float)}
    write_json(out / "evaluation.json", record)


def _kept(config: EvaluateConfig, key: str) -> dict:
    try:
        record = json.loads((out_folder(config) / "evaluation.json").read_text())
        return record["guidance"] if record["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of another version: evaluated again
        return {}


def out_folder(config: EvaluateConfig) -> Path:
    """config.run.out where it is given, else the run folder of the model."""
    if "out" in config.run.model_fields_set:
        return Path(config.run.out)
    folder = find_model(config.model.path)
    return folder.parent if folder.name == "model" else folder


def check_model(config: EvaluateConfig, family: Family, guidance: Sequence[float]) -> Path:
    """The folder of config.model.path, which fits the family and can be guided at these scales."""
    if config.model.path is None:
        raise UserError("model.path is missing: name the model folder or the finished run to evaluate")
    folder = find_model(config.model.path)
    model_config(config, family)
    if any(g != 1 for g in guidance) and not world_facts(folder).get("unconditional", True):
        raise UserError(
            f"guidance {list(guidance)} needs an unconditional embedding and {config.model.path} was trained without one "
            "(pretrain.drop_condition=0); evaluate at guidance 1"
        )
    return folder


def open_model(config: EvaluateConfig, family: Family, guidance: Sequence[float]) -> Transformer:
    """The model of config.model.path, after the checks."""
    folder = check_model(config, family, guidance)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = use_device(config.run.device)
    model = load_model(folder, DTYPES[config.model.dtype], device, variant=config.model.variant)
    return runner_of(compute_as(model, config.model).eval(), config)


def balanced(prompts: Sequence[Prompt], count: int, seed: int) -> list[tuple[Prompt, int]]:
    """`count` groups, the categories in turn, each prompt with how often it came before.

    A category with few prompts (the plain digits) uses them again, with further noise.
    """
    seen: Counter[int] = Counter()
    chosen = []
    for prompt, _ in PromptSampler(prompts, seed).step(0, count):
        chosen.append((prompt, seen[prompt.id]))
        seen[prompt.id] += 1
    return chosen


def draw(
    model: Transformer,
    family: Family,
    prompts: Sequence[tuple[Prompt, int]],
    group: int,
    flow: Flow,
    seed: int,
    budget: int,
) -> list[list[np.ndarray]]:
    """`group` images uint8 [H, W, 3] of each prompt, by ode; prompts come with the number of earlier groups of the same prompt.

    Raises UserError where latents are not finite.
    """
    twice = 2 if flow.guidance != 1 else 1
    costs = [t.tokens * twice * group for t in targets_of(family, [p for p, _ in prompts])]
    images = []
    for run in cut(costs, max(budget, *costs), "evaluation.batch_tokens"):
        own = [prompts[i] for i in run]
        targets = targets_of(family, [p for p, _ in own], group)
        ids = [p.id for p, _ in own for _ in range(group)]
        samples = [before * group + g for _, before in own for g in range(group)]
        draws = stream(seed, ids, samples, 0, next(model.parameters()).device)
        conditions = [family.condition(p) for p, _ in own]
        negatives = [family.negative(p) for p, _ in own] if flow.guidance != 1 else None
        latents = rollout(model, conditions, targets, draws, flow, negatives=negatives).latents()
        if failed := sum(not_finite(latents)):
            raise UserError(
                f"{failed} of {len(latents)} latents at guidance {flow.guidance:g} are not finite, so they are no "
                "images to judge; use model.dtype=float32 or a model that has not diverged"
            )
        found = images_of(family, latents, targets)
        images += [found[i : i + group] for i in range(0, len(found), group)]
    return images


def sample(
    model: str,
    prompts: Sequence[str],
    guidance: float = 4.0,
    steps: int = 20,
    seed: int = 0,
    text_dim: int | None = None,
    sources: Sequence[np.ndarray] = (),
    device: str = "auto",
    **world: Any,
) -> np.ndarray:
    """One image per prompt, uint8 [n, H, W, 3]; prompt i draws the noise of (seed, i).

    sources: images that every prompt edits. device: as `run.device`. world: further options of `world`, such as resolution.
    """
    facts = world_facts(find_model(model))
    own = {"text_dim": text_dim or facts.get("text_dim", WorldOptions().text_dim)}
    if is_pipeline(model, facts):
        own |= {"name": "prompts"}
    config = load("evaluate", {"world": own | world, "model": {"path": model}, "run": {"device": device}})
    family = make_world(config.world, config.model, config.run.device).family
    listed = [(Prompt(i, text, sources=tuple(sources)), 0) for i, text in enumerate(prompts)]
    for prompt, _ in listed:
        family.check(prompt)
    family.prepare([p for p, _ in listed], guidance != 1)
    network, flow = open_model(config, family, [guidance]), Flow(steps=steps, guidance=guidance, rescale=family.rescale)
    drawn = draw(network, family, listed, 1, flow, seed, config.evaluation.batch_tokens)
    return np.stack([image for (image,) in drawn])
