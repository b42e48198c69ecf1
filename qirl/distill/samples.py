"""samples/step_*.png of a distillation run: prompts of every task with their own fixed noise, without guidance."""

from __future__ import annotations

import torch

from qirl.flow.rollout import rollout
from qirl.kernels.philox import stream
from qirl.packing import Target, cut
from qirl.parallel.data import gathered
from qirl.policy.monitor import MONITOR_ITERATION, without_noise
from qirl.run.folder import write_json
from qirl.run.plots import grid


def write(distiller, step: int) -> None:
    """Draws the monitor prompts, run.monitor_prompts of them over all tasks. Every rank draws, the first one writes."""
    config, engine = distiller.config, distiller.engine
    if not config.run.samples_every:
        return
    prompts = []
    for place, sampler in enumerate(distiller.prompts.values()):
        prompts += [
            p for p, _ in sampler.step(0, len(range(place, config.run.monitor_prompts, len(distiller.prompts))))
        ]
    images = distiller.world.decode(draw(distiller, prompts))
    if engine.ranks.first:
        stem = engine.folder.samples / f"step_{step:06d}"
        grid(images[None], scale=4).save(stem.with_suffix(".png"))
        write_json(stem.with_suffix(".json"), {"step": step, "prompts": [p.text for p in prompts], "guidance": 1.0})


def draw(distiller, prompts) -> list[torch.Tensor]:
    """Finished latents of one image per prompt, always from the same noise."""
    config, world, ranks = distiller.config, distiller.world, distiller.engine.ranks
    flow, latents = without_noise(config.flow), []
    draws = stream(config.run.seed, [p.id for p in prompts], list(range(len(prompts))), MONITOR_ITERATION, ranks.device)
    sizes = [world.height * world.width] * len(prompts)
    with gathered(distiller.engine.model):
        for run in cut(sizes, flow.rollout_tokens, "flow.rollout_tokens"):
            targets = [Target(i, world.height, world.width) for i in range(len(run))]
            conditions = [world.condition(prompts[i]) for i in run]
            rows = draws.rows(torch.tensor(run, device=ranks.device))
            latents += rollout(distiller.engine.model, conditions, targets, rows, flow).latents()
    return latents
