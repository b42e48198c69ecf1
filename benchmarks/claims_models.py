"""What the claims need beside runs and evaluations; commands, so that they run as arms.

python benchmarks/claims_models.py export RUN STEP OUT      the weights of a checkpoint as a model folder, in OUT/model
python benchmarks/claims_models.py drift BASE RUN OUT.json  how far the velocities of RUN's model went from BASE's
python benchmarks/claims_models.py everything CURATE OUT    all prompts of a curation, as a prompt file
python benchmarks/claims_models.py one_vector_weights CALIBRATE OUT    a calibration with one vector of weights for all
                                                            categories of a task: their mean; the scales stay
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

import torch

from qirl.config_sections import World
from qirl.curation.curate import write_prompts
from qirl.curation.ledger import NAME as LEDGER
from qirl.curation.ledger import Ledger
from qirl.data import edits
from qirl.data.digits import UNIFORMS
from qirl.errors import UserError
from qirl.families import targets_of
from qirl.models.folders import WORLD_FILE, find_model, world_facts
from qirl.models.weights import load_config, load_model, save_model
from qirl.packing import pack
from qirl.run import checkpoint
from qirl.run.folder import write_json
from qirl.world import make_world

STATES = 512  # examples at which velocities are compared
SEED = 1_000_003


def export(run: Path, step: int, out: Path) -> None:
    """OUT/model: the weights that `run` (finished, all parameters trained) had at a kept checkpoint.

    Raises UserError for a checkpoint that is not there or is not whole.
    """
    finished = find_model(str(run))
    model = load_model(finished)
    names = checkpoint.describe(path := run / f"checkpoints/step_{step:06d}")["tensors"]
    part = "copies/ema" if any(name.startswith("copies/ema/") for name in names) else "weights"
    state = {name: p.detach() for name, p in model.named_parameters()}
    if missing := [name for name in state if f"{part}/{name}" not in names]:
        raise UserError(f"{path} has no '{missing[0]}'; its run trained adapters (set model.lora.rank=0)")
    checkpoint.load(path, {part.split("/")[0]: {"ema": state} if part != "weights" else state})
    shutil.rmtree(out / "model", ignore_errors=True)
    save_model(load_config(finished), state, out / "model")
    shutil.copy(finished / WORLD_FILE, out / "model")


@torch.no_grad()
def drift(base: Path, run: Path, out: Path, task: str = "t2i") -> None:
    """OUT: {"velocity": mean squared difference of the conditional velocities, "relative": over the base's mean square}.

    States are (1 - t) x + t noise of examples of the world that no run draws, t uniform in (0, 1).
    """
    facts = world_facts(find_model(str(base)))
    world = make_world(World(task=task, text_dim=facts.get("text_dim", World().text_dim)))
    family = world.family
    generator = torch.Generator().manual_seed(SEED)
    prompts, images = world.data.examples(torch.rand(STATES, UNIFORMS, generator=generator).numpy())
    clean = torch.stack(family.encode(images))
    t = torch.rand(STATES, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    x = (1 - t)[:, None, None] * clean + t[:, None, None] * noise
    models = [load_model(find_model(str(path))).eval() for path in (base, run)]
    away = size = 0.0
    for first in range(0, STATES, 32):
        own = range(first, first + 32)
        chosen = [prompts[i] for i in own]
        body = pack([family.condition(p) for p in chosen], targets_of(family, chosen))
        before, after = (model(body, x[first : first + 32].flatten(0, 1), t[first : first + 32]) for model in models)
        away += float((after - before).square().mean())
        size += float(before.square().mean())
    write_json(out, {"velocity": away / (STATES // 32), "relative": away / size})


def everything(curated: Path, out: Path) -> None:
    """OUT: the prompts of a curation, those that it kept and those that it dropped."""
    _, rows = Ledger(curated / LEDGER).read()
    known = {row["id"] for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(out, [p for p in make_world(World(task="mixed")).data.prompts("train") if p.id in known])


def one_vector_weights(calibrated: Path, out: Path) -> None:
    """OUT: the calibration with every category's weights replaced by their mean over the categories of the same components.

    A component that does not apply to a category (the colours of plain digits) gives its weight to the others.
    """
    record = json.loads((calibrated / "calibration.json").read_text())
    given: dict[tuple[bool, str], list[float]] = {}
    for category, own in record["categories"].items():
        for name, component in own["components"].items():
            given.setdefault((category in edits.CATEGORIES, name), []).append(component["weight"])
    for category, own in record["categories"].items():
        mean = {name: statistics.fmean(given[category in edits.CATEGORIES, name]) for name in own["components"]}
        for name, component in own["components"].items():
            component["weight"] = mean[name] / sum(mean.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)


COMMANDS = {"export": export, "drift": drift, "everything": everything, "one_vector_weights": one_vector_weights}


def main(command: str, *arguments: str) -> None:
    COMMANDS[command](*(int(x) if x.isdigit() else Path(x) for x in arguments))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"claims: {error}") from None
