"""samples/step_*.png of a distillation run: prompts of every task with their own fixed noise, without guidance."""

from __future__ import annotations

import torch

from qirl.families import images_of, targets_of
from qirl.flow.rollout import rollout
from qirl.kernels.philox import stream
from qirl.models.execution import at_rest
from qirl.packing import cut
from qirl.policy.monitor import MONITOR_ITERATION, without_noise
from qirl.run.folder import write_json
from qirl.run.plots import row


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
    images = images_of(distiller.family, draw(distiller, prompts), targets_of(distiller.family, prompts))
    if engine.ranks.first:
        stem = engine.folder.samples / f"step_{step:06d}"
        row(images).save(stem.with_suffix(".png"))
        write_json(stem.with_suffix(".json"), {"step": step, "prompts": [p.text for p in prompts], "guidance": 1.0})


def draw(distiller, prompts) -> list[torch.Tensor]:
    """Finished latents of one image per prompt, always from the same noise."""
    config, family, ranks = distiller.config, distiller.family, distiller.engine.ranks
    flow, latents = without_noise(config.flow), []
    draws = stream(config.run.seed, [p.id for p in prompts], list(range(len(prompts))), MONITOR_ITERATION, ranks.device)
    sizes = [t.tokens for t in targets_of(family, prompts)]
    with at_rest(distiller.engine.model):
        for run in cut(sizes, flow.rollout_tokens, "flow.rollout_tokens"):
            own = [prompts[i] for i in run]
            targets, conditions = targets_of(family, own), [family.condition(p) for p in own]
            rows = draws.rows(torch.tensor(run, device=ranks.device))
            latents += rollout(distiller.engine.runner, conditions, targets, rows, flow).latents()
    return latents
