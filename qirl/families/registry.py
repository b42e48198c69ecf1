"""Which family a run's model belongs to."""

from __future__ import annotations

from pathlib import Path

from qirl.config_sections import Model
from qirl.config_sections import World as Options
from qirl.errors import UserError
from qirl.families import Family
from qirl.families.digits import Digits
from qirl.families.pipelines import INDEX, read_json
from qirl.families.qwen_image import PIPELINES, QwenImageFamily
from qirl.families.qwen_image_21 import QwenImage21Family
from qirl.models.folders import find_model, local, world_facts
from qirl.parallel.data import run_device

FAMILIES = {"QwenImage21Pipeline": QwenImage21Family, **dict.fromkeys(PIPELINES, QwenImageFamily)}


def family_of(options: Options, model: Model | None = None, device: str = "auto") -> Family:
    """The digits' own, or that of the pipeline at model.path, or of the one that a trained model came from.

    device: where its encoders and autoencoder run, as `run.device`. Raises UserError where there is no such device, no
    pipeline, or one of another class.
    """
    place = run_device(device)
    if options.name == "digits":
        return Digits(options.text_dim)
    if model is None or model.path is None:
        raise UserError(
            f"world.name={options.name} needs model.path: the folder of a Qwen-Image pipeline, or a run on one"
        )
    folder = _pipeline(model)
    name = read_json(folder / INDEX).get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"{folder} is a {name}; qirl trains {', '.join(FAMILIES)}")
    return FAMILIES[name](folder, options, model, place)


def is_pipeline(path: str, facts: dict) -> bool:
    """Whether a model path is a pipeline, or one that came from one (facts: what its folder says of its world)."""
    return (local(path) / INDEX).exists() or "pipeline" in facts


def _pipeline(model: Model) -> Path:
    named = model.pipeline or (model.path if (local(model.path) / INDEX).exists() else None)
    named = named or world_facts(find_model(model.path)).get("pipeline")
    if named is None:
        raise UserError(
            f"{model.path} holds a transformer without the encoders that go with it; set model.pipeline to a pipeline's folder"
        )
    folder = local(named)
    if not (folder / INDEX).exists():
        raise UserError(f"{named} is no pipeline (no {INDEX}); set model.pipeline to where it lies now")
    return folder
