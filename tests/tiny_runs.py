"""Runs small enough for tests: a random 2-layer model of the digits world, smooth rewards that need no classifier.

As a program (what the tests of several ranks and of killed runs start): python tiny_runs.py COMMAND ARGUMENTS.
"""

import importlib
import json
import math
import sys
from pathlib import Path

import torch

from qirl import config as configuration
from qirl.data import latents
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.models.weights import save_model

TEXT_DIM = 8
CHANNELS = latents.CHANNELS
BASE = {
    "run": {"seed": 3, "steps": 4, "samples_every": 0, "checkpoint_every": 2, "threads": 1, "report": False},
    "world": {"text_dim": TEXT_DIM},
    "optimizer": {"lr": 1e-3},
    "flow": {"steps": 4},
    "policy": {"prompts": 4, "group": 3, "timesteps": {"count": 2}},
}
SDE = {"flow": {"sampler": "sde"}, "policy": {"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2}}
FLOAT64 = {"model": {"dtype": "float64"}, "flow": {"storage": "float64"}}
BFLOAT16 = {"model": {"dtype": "bfloat16"}, "flow": {"storage": "bfloat16"}}
FLOAT32: dict = {}
GUARD = {**SDE, "policy": {**SDE["policy"], "loss": "guard"}}
GUIDED = {"flow": {"guidance": 2.0}}
PRETRAIN = {
    "run": {**BASE["run"], "steps": 8},
    "world": {"text_dim": TEXT_DIM},
    "model": {"architecture": {"layers": 2, "heads": 2, "head_dim": 16, "rope_axes": (4, 6, 6), "mlp_ratio": 2}},
    "optimizer": {"lr": 1e-3, "ema": 0.9},
    "pretrain": {"batch": 6},
}


def architecture() -> QwenImage21Config:
    return QwenImage21Config(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=TEXT_DIM, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def save_random_model(folder: Path) -> Path:
    """Weights of a size that makes velocities of order one, so that no branch of the model is silent."""
    torch.manual_seed(0)
    model = QwenImage21(architecture())
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    save_model(model.config, model.state_dict(), folder)
    (folder / "qirl.json").write_text(json.dumps({"world": "digits", "text_dim": TEXT_DIM, "unconditional": True}))
    return folder


def merge(*parts: dict) -> dict:
    """Nested dicts, later ones over earlier ones."""
    out: dict = {}
    for part in parts:
        for key, value in part.items():
            nested = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if nested else value
    return out


def train_config(out, model, *parts: dict) -> configuration.TrainConfig:
    values = merge(BASE, {"run": {"out": str(out)}, "model": {"path": str(model)}}, *parts)
    return configuration.load("train", values)


def pretrain_config(out, *parts: dict) -> configuration.PretrainConfig:
    return configuration.load("pretrain", merge(PRETRAIN, {"run": {"out": str(out)}}, *parts))


def colours(samples):
    """Smooth in the pixels, different in every image."""
    return [
        {
            "red": float(s.image[..., 0].mean() / 255),
            "edge": float(abs(s.image[::2] - s.image[1::2] * 1.0).mean() / 255),
        }
        for s in samples
    ]


def patchy(samples):
    """One component that some samples fail and one that does not apply to plain prompts."""
    out = []
    for s in samples:
        own = {"red": math.nan if s.id % 7 == 3 else float(s.image[..., 0].mean() / 255)}
        if s.category != "plain":
            own["blue"] = float(s.image[..., 2].mean() / 255)
        out.append(own)
    return out


def luck(samples):
    """Of the sample's id only: the same whatever rounding the images carry."""
    return [{"luck": s.id * 37 % 11 / 10} for s in samples]


def moody(samples):
    """No signal for two prompts of every three."""
    return [{"red": 0.5 if s.prompt_id % 3 else row["red"]} for s, row in zip(samples, colours(samples), strict=True)]


def uncertain(samples):
    """Scores that say how noisy their reading was, differently for every sample: about half of the groups are silent."""
    from qirl.rewards.protocol import NoisyScore

    rows = colours(samples)
    return [{"red": NoisyScore(row["red"], s.id * 37 % 11 / 100)} for s, row in zip(samples, rows, strict=True)]


REWARDS = {"colours": colours, "patchy": patchy, "luck": luck, "moody": moody, "uncertain": uncertain}


def experience(trainer, step=0):
    """A rollout with its advantages: (experience, chosen prompts, slots)."""
    from qirl.policy import trainer as training
    from qirl.policy.scoring import StepScores, gather_scores

    chosen = trainer.prompts.step(step, trainer.config.policy.prompts)
    scoring = StepScores(trainer, chosen, step)
    exp, slots = training.sample(trainer, chosen, step, scoring.submit)
    scores, _, _ = scoring.collect(exp.ids)
    everything = gather_scores(trainer, exp.ids, scores, chosen, step)
    training.assign_advantages(trainer, exp, everything, chosen, step)
    return exp, chosen, slots


def gradients(trainer):
    found = {n: p.grad.clone() for n, p in trainer.engine.model.named_parameters() if p.grad is not None}
    trainer.engine.model.zero_grad(set_to_none=True)
    return found


def perturb(trainer, size=0.05):
    """Moves the weights away from the base, so that the distance to it is not zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in trainer.engine.weights.current.values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def observe(config, reward: str | None) -> dict:
    """A whole run on however many ranks: gradients of every optimizer step, packs of every rank, latents of new images.

    Everything is whole and in global order, so that it can be compared between numbers of ranks.
    """
    base = importlib.import_module("qirl.pretraining")
    from qirl.policy import trainer as training

    seen: dict = {"gradients": [], "packs": []}

    def watch(engine) -> None:
        step = engine.optimizer.step

        def watched(number):
            grads = {n: p.grad for n, p in engine.weights.current.items() if p.grad is not None}
            seen["gradients"].append({n: g.clone() for n, g in engine.sharding.wholes(grads)})
            return step(number)

        engine.optimizer.step = watched

    if reward is None:
        engine_open = base.Engine.open

        def opened(*args):
            engine = engine_open(*args)
            watch(engine)
            return engine

        base.Engine.open = opened
        try:
            base.pretrain(config, quiet=True)
        finally:
            base.Engine.open = engine_open
        return seen

    open_trainer, prepare = training.open_trainer, training.prepare

    def opened(*args):
        seen["trainer"] = open_trainer(*args)
        watch(seen["trainer"].engine)
        return seen["trainer"]

    def prepared(*args):
        parts = prepare(*args)
        for part in parts:
            seen["packs"].append(
                [(layout.seam, sum(b.live for b in batches), len(batches)) for layout, batches in part]
            )
        return parts

    training.open_trainer, training.prepare = opened, prepared
    try:
        training.train(config, [REWARDS[reward]], quiet=True)
    finally:
        training.open_trainer, training.prepare = open_trainer, prepare
    trainer = seen.pop("trainer")
    exp, _ = training.sample(trainer, trainer.prompts.step(99, config.policy.prompts), 99)
    own = list(zip(exp.ids.tolist(), exp.x0, strict=True))
    data = trainer.engine.ranks.data
    parts, packs = data.gather_objects(own), data.gather_objects(seen["packs"])
    latents = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    return {**seen, "packs": packs, "latents": torch.cat([x for _, x in latents])}


def observe_all(cases: dict, out: Path) -> None:
    """cases: name to (config values, reward or None). Rank 0 writes {name: what observe returned}."""
    import os

    found = {}
    for name, (values, reward) in cases.items():
        found[name] = observe(configuration.load("train" if reward else "pretrain", values), reward)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, out)


def main(command: str, config: str, *rest: str) -> None:
    values = json.loads(Path(config).read_text())
    if command == "pretrain":
        from qirl.pretraining import pretrain

        pretrain(configuration.load("pretrain", values), quiet=True)
    elif command == "train":
        from qirl.policy.trainer import train

        train(configuration.load("train", values), [REWARDS[rest[0]]], quiet=True)
    elif command == "observe":
        observe_all(values, Path(rest[0]))
    else:
        raise SystemExit(f"unknown command {command}")


if __name__ == "__main__":
    from qirl.cli_common import ended

    with ended():
        main(*sys.argv[1:])
