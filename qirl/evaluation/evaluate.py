"""Scores of a model on held-out prompts and fresh noise: rewards, held-out judge and diversity, per guidance scale.

The noise depends on (evaluation.seed, prompt, sample) only, so two models are compared on the same draws. Standard errors
are over prompts: images of one prompt are not independent.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qirl.config import EvaluateConfig, Flow, World, to_dict
from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.data.words import parse
from qirl.data.world import DigitsWorld, make_world
from qirl.engine import DTYPES, find_model, model_config, world_facts
from qirl.errors import UserError
from qirl.evaluation.diversity import in_group_diversity
from qirl.flow.rollout import rollout
from qirl.kernels.philox import stream
from qirl.models.qwen_image_21 import QwenImage21
from qirl.models.weights import load_model
from qirl.packing import Target, cut
from qirl.rewards.protocol import Sample, score
from qirl.run.cache import content_key
from qirl.run.folder import check_writable, write_json
from qirl.run.progress import Live


def evaluate(config: EvaluateConfig, quiet: bool = False) -> dict:
    """Results per guidance scale: {"1": {"judge_accuracy", "judge_accuracy_se", "rewards", "gap", "diversity", ...}}.

    Also written to evaluation.json in config.run.out or, where that is not given, in the model's run folder. Raises
    UserError for a model that is missing or does not fit, and for guidance other than 1 with a model that has no
    unconditional embedding.
    """
    world = make_world(config.world)
    options = config.evaluation
    need = world.height * world.width * (2 if any(g != 1 for g in options.guidance) else 1)
    if options.batch_tokens < need:
        raise UserError(
            f"evaluation.batch_tokens={options.batch_tokens} tokens is smaller than one sample of {need} tokens; "
            f"set it to {need} or more"
        )
    model = open_model(config, world, options.guidance)
    out = out_folder(config)
    check_writable(out)
    prompts = balanced(world.prompts("held_out", config.world.prompts), options.prompts, options.seed)
    rewards, judge = world.rewards(), world.judge()
    results = {}
    with Live("evaluate", len(options.guidance), show=not quiet) as live:
        for done, guidance in enumerate(options.guidance, start=1):
            flow = config.flow.model_copy(update={"steps": options.steps, "guidance": guidance, "sampler": "ode"})
            images = draw(model, world, prompts, options.group, flow, options.seed, options.batch_tokens)
            results[f"{guidance:g}"] = measure(images, [p for p, _ in prompts], rewards, judge)
            live.update(done, {"guidance": guidance, "judge": results[f"{guidance:g}"]["judge_accuracy"]})
    out.mkdir(parents=True, exist_ok=True)
    record = {"model": str(config.model.path), "key": evaluation_key(config), "guidance": results}
    write_json(out / "evaluation.json", record)
    return results


def evaluation_key(config: EvaluateConfig) -> str:
    """What decides an evaluation's numbers: the config (folders aside), the weights, and the code that runs."""
    import qirl
    import qirl.kernels

    weights = [zlib.crc32(p.read_bytes()) for p in sorted(find_model(config.model.path).glob("*.safetensors"))]
    plain = {k: v for k, v in to_dict(config).items() if k not in ("run", "model")}
    return content_key(plain, weights, qirl, qirl.kernels)


def known_results(config: EvaluateConfig) -> dict | None:
    """The results of an evaluation that was done before with the same key, or None."""
    path = out_folder(config) / "evaluation.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record["guidance"] if record.get("key") == evaluation_key(config) else None


def out_folder(config: EvaluateConfig) -> Path:
    """config.run.out where it is given, else the run folder of the model."""
    if "out" in config.run.model_fields_set:
        return Path(config.run.out)
    folder = find_model(config.model.path)
    return folder.parent if folder.name == "model" else folder


def open_model(config: EvaluateConfig, world: DigitsWorld, guidance: Sequence[float]) -> QwenImage21:
    """The model of config.model.path, after the checks."""
    if config.model.path is None:
        raise UserError("model.path is missing: name the model folder or the finished run to evaluate")
    folder = find_model(config.model.path)
    model_config(config, world)
    if any(g != 1 for g in guidance) and not world_facts(folder).get("unconditional", True):
        raise UserError(
            f"guidance {list(guidance)} needs an unconditional embedding and {config.model.path} was trained without one "
            "(pretrain.drop_condition=0); evaluate at guidance 1"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(folder, DTYPES[config.model.dtype], device).eval()


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
    model: QwenImage21,
    world: DigitsWorld,
    prompts: Sequence[tuple[Prompt, int]],
    group: int,
    flow: Flow,
    seed: int,
    budget: int,
) -> np.ndarray:
    """uint8 [prompts, group, H, W, 3] by ode; prompts come with the number of earlier groups of the same prompt."""
    tokens = world.height * world.width * (2 if flow.guidance != 1 else 1)
    images = []
    for run in cut([tokens * group] * len(prompts), max(budget, tokens * group), "evaluation.batch_tokens"):
        own = [prompts[i] for i in run]
        targets = [Target(i, world.height, world.width) for i in range(len(own)) for _ in range(group)]
        ids = [p.id for p, _ in own for _ in range(group)]
        samples = [before * group + g for _, before in own for g in range(group)]
        draws = stream(seed, ids, samples, 0, next(model.parameters()).device)
        conditions = [world.condition(p) for p, _ in own]
        negatives = [world.negative(p) for p, _ in own]
        out = rollout(model, conditions, targets, draws, flow, negatives=negatives)
        images.append(world.decode(out.latents()))
    flat = np.concatenate(images)
    return flat.reshape(len(prompts), group, *flat.shape[1:])


def measure(images: np.ndarray, prompts: Sequence[Prompt], rewards, judge) -> dict:
    """Means and standard errors of one guidance scale; images uint8 [P, G, H, W, 3]."""
    count, group = images.shape[:2]
    flat = images.reshape(-1, *images.shape[2:])
    specs = [parse(p.text) for p in prompts for _ in range(group)]
    samples = [
        Sample(i, prompts[i // group].id, prompts[i // group].text, image, prompts[i // group].category)
        for i, image in enumerate(flat)
    ]
    scores = score(rewards, samples)
    correct = judge.digits_correct(flat, specs).reshape(count, group).astype(float)
    diversity = np.array([in_group_diversity(own) for own in images])
    clusters = np.array([p.id for p in prompts])
    accuracy, error = mean_and_error(correct.mean(1), clusters)
    result = {"judge_accuracy": accuracy, "judge_accuracy_se": error, "rewards": {}, "rewards_se": {}}
    for name in sorted({name for own in scores for name in own}):
        own = [scores[i : i + group] for i in range(0, len(scores), group)]
        own = np.array([np.nanmean([s.get(name, np.nan) for s in g]) if name in g[0] else np.nan for g in own])
        applies = ~np.isnan(own)
        result["rewards"][name], result["rewards_se"][name] = mean_and_error(own[applies], clusters[applies])
    result["diversity"], result["diversity_se"] = mean_and_error(diversity, clusters)
    result["gap"] = result["rewards"].get("digit", float("nan")) - accuracy
    categories = sorted({p.category for p in prompts})
    member = {c: np.array([p.category == c for p in prompts]) for c in categories}
    result["judge_by_category"] = {c: float(correct[member[c]].mean()) for c in categories}
    result["judge_attributes"] = float(judge.attributes_correct(flat, specs).mean())
    return result | {"pairs": count * group}


def mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean of per-group values and its standard error, clustered: groups of one prompt are not independent."""
    n, names = len(values), np.unique(clusters)
    if len(names) < 2:
        return float(values.mean()), float("nan")
    sums = np.array([(values[clusters == c] - values.mean()).sum() for c in names])
    return float(values.mean()), float(np.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()) / n)


def sample(
    model: str,
    prompts: Sequence[str],
    guidance: float = 4.0,
    steps: int = 20,
    seed: int = 0,
    text_dim: int | None = None,
) -> np.ndarray:
    """One image per prompt, uint8 [n, H, W, 3]; prompt i draws the noise of (seed, i)."""
    folder = find_model(model)
    width = text_dim or world_facts(folder).get("text_dim", World().text_dim)
    config = EvaluateConfig(world=World(text_dim=width), model={"path": model})
    world = make_world(config.world)
    for text in prompts:
        parse(text)
    network = open_model(config, world, [guidance])
    listed = [(Prompt(i, text), 0) for i, text in enumerate(prompts)]
    return draw(network, world, listed, 1, Flow(steps=steps, guidance=guidance), seed, config.evaluation.batch_tokens)[
        :, 0
    ]
