"""Distillation runs small enough for tests; as a program, what the tests of several ranks and of killed runs start."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_runs import BASE, TEXT_DIM, full, merge

from qirl import config as configuration
from qirl.models.weights import load_model, save_model

DISTILL = {
    "run": BASE["run"],
    "world": {"text_dim": TEXT_DIM},
    "optimizer": {"lr": 1e-3},
    "flow": {"steps": 4},
    "distill": {"prompts": 3, "group": 2},
}


def save_teacher(base: Path, folder: Path, seed: int, size: float = 0.1) -> Path:
    """The base with other weights: what RL may have made of it."""
    model, generator = load_model(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator) * p.std())
    save_model(model.config, model.state_dict(), folder)
    (folder / "qirl.json").write_text((base / "qirl.json").read_text())
    return folder


def values(out, base, teachers: dict, *parts: dict) -> dict:
    """The values of a config; teachers: name to path, or to a dict of options."""
    own = {name: t if isinstance(t, dict) else {"path": str(t)} for name, t in teachers.items()}
    where = {"run": {"out": str(out)}, "model": {"path": str(base)}, "distill": {"teachers": own}}
    return merge(DISTILL, where, *parts)


def config(out, base, teachers: dict, *parts: dict) -> configuration.DistillConfig:
    return configuration.load("distill", values(out, base, teachers, *parts))


def observe(given: dict) -> dict:
    """A whole run on however many ranks: gradients of every step, whole, and the final weights."""
    from qirl.distillation import trainer as training

    seen: dict = {"gradients": [], "packs": []}
    open_distiller, accumulate = training.open_distiller, training.sweep

    def opened(*args):
        distiller = seen["distiller"] = open_distiller(*args)
        optimizer, step = distiller.engine.optimizer, distiller.engine.optimizer.step

        def watched(number):
            weights = distiller.engine.weights.current
            seen["gradients"].append({n: full(p.grad) for n, p in weights.items() if p.grad is not None})
            return step(number)

        optimizer.step = watched
        return distiller

    def swept(*args):
        seen["packs"].append(args[5] > 0)  # its weight
        return accumulate(*args)

    training.open_distiller, training.sweep = opened, swept
    try:
        training.distill(configuration.load("distill", given), quiet=True)
    finally:
        training.open_distiller, training.sweep = open_distiller, accumulate
    engine = seen.pop("distiller").engine
    packs = [seen["packs"]]
    if engine.ranks.world > 1:
        packs = [None] * engine.ranks.world
        torch.distributed.all_gather_object(packs, seen["packs"])
    return {**seen, "packs": packs, "weights": {n: full(p) for n, p in engine.weights.current.items()}}


def main(command: str, path: str, *rest: str) -> None:
    given = json.loads(Path(path).read_text())
    if command == "distill":
        from qirl.distillation.trainer import distill

        distill(configuration.load("distill", given), quiet=True)
    elif command == "observe":
        found = {name: observe(own) for name, own in given.items()}
        if os.environ.get("RANK", "0") == "0":
            torch.save(found, rest[0])
    else:
        raise SystemExit(f"unknown command {command}")


if __name__ == "__main__":
    from qirl.cli_common import ended

    with ended():
        main(*sys.argv[1:])
