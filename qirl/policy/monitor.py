"""What a run shows of itself: reward metrics, grids of the same prompts and seeds, best and worst of a group."""

from __future__ import annotations

import math

import torch

from qirl.families import images_of, targets_of
from qirl.kernels.philox import stream
from qirl.policy.advantages import ABSENT
from qirl.policy.sampling import sample_in_batches

MONITOR_ITERATION = 2**20 - 1  # the monitor's own noise, the same at every step and never a training step's


def reward_metrics(scores, components, categories, weights, group, advantage, valid) -> dict:
    """Means per component and category, the composite's range inside groups, and what was dropped."""
    record: dict[str, float] = {}
    applies = (scores != ABSENT) & ~scores.isnan()
    names = sorted(set(categories))
    for k, component in enumerate(components):
        for label, member in [("", torch.ones(len(categories), dtype=torch.bool))] + [
            (f"/{name}", torch.tensor([c == name for c in categories])) for name in names
        ]:
            chosen = scores[:, k][applies[:, k] & member]
            if len(chosen):
                record[f"reward/{component}{label}"] = float(chosen.mean())
    share = torch.where(applies, weights.double(), 0)
    composite = (share * torch.where(applies, scores, 0)).sum(1) / share.sum(1).clamp_min(1e-30)
    groups = [composite[group == g] for g in group.unique().tolist()]
    signal = [advantage[group == g].abs().max() for g in group.unique().tolist()]
    return record | {
        "range": float(torch.stack([g.max() - g.min() for g in groups]).mean()),
        "advantage_abs": float(advantage.abs().mean()),
        "dropped_samples": int((~valid).sum()),
        "zero_signal_groups": sum(int(s == 0) for s in signal),
        "valid_samples": int(valid.sum()),
    }


def write_samples(trainer, step: int) -> None:
    """samples/step_*.png: the monitor prompts with their own fixed noise, at the run's guidance."""
    from qirl.run.folder import write_json
    from qirl.run.plots import row

    config, family, engine = trainer.config, trainer.family, trainer.engine
    if not config.run.samples_every:
        return
    prompts = [p for p, _ in trainer.prompts.step(0, config.run.monitor_prompts)]
    flow = without_noise(config.flow)
    targets = targets_of(family, prompts)
    draws = stream(
        config.run.seed, [p.id for p in prompts], list(range(len(prompts))), MONITOR_ITERATION, engine.ranks.device
    )
    x0, _ = sample_in_batches(trainer, prompts, targets, draws, None, flow)
    if engine.ranks.first:
        stem = engine.folder.samples / f"step_{step:06d}"
        row(images_of(family, x0, targets)).save(stem.with_suffix(".png"))
        write_json(
            stem.with_suffix(".json"), {"step": step, "prompts": [p.text for p in prompts], "guidance": flow.guidance}
        )


def without_noise(flow):
    """The same sampler without randomness, for pictures that can be compared over training."""
    return flow.model_copy(update={"sampler": "ode"})


def write_group(trainer, step: int, images, scores, exp, chosen, slots) -> None:
    """samples/group_*: the first group of the step, best to worst by advantage."""
    from PIL import Image

    from qirl.run.folder import write_json

    run = trainer.config.run
    if not (run.samples_every and step % run.samples_every == 0 and trainer.engine.ranks.first):
        return
    group = trainer.config.policy.group
    place = (step // run.samples_every) % len(slots)  # another group each time
    members = sorted(range(place * group, (place + 1) * group), key=lambda i: -float(exp.advantage[i]))
    folder, names = trainer.engine.folder.samples, []
    for rank, i in enumerate(members):
        names.append(f"group_{step:06d}_{rank:02d}.png")
        Image.fromarray(images[i]).save(folder / names[-1])
    plain = [{k: None if math.isnan(v) else v for k, v in scores[i].items()} for i in members]
    write_json(
        folder / f"group_{step:06d}.json",
        {"step": step, "prompt": chosen[slots[place]][0].text, "images": names, "scores": plain,
         "advantages": [float(exp.advantage[i]) for i in members]},
    )  # fmt: skip
