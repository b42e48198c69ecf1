"""A world: the family of a run's transformer, and the data that it is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from qirl.config_sections import Model
from qirl.config_sections import World as Options
from qirl.data.digit_set import DigitSet
from qirl.data.prompt_file import PromptFile
from qirl.families import Family
from qirl.families.registry import family_of


@dataclass(frozen=True)
class World:
    family: Family
    data: DigitSet | PromptFile


def make_world(options: Options, model: Model | None = None, device: str = "auto") -> World:
    """The world of a config's sections; device: where its encoders run. Raises UserError for a model of no known family, and
    for a device that is not there."""
    family = family_of(options, model, device)
    own = (
        DigitSet(options.task, family.check)
        if options.name == "digits"
        else PromptFile(options.task, family, options.max_bad, options.categories)
    )
    return World(family, own)
