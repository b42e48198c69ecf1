"""A world: the family of a run's transformer, and the data that it is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from qirl.config_sections import World as Options
from qirl.data.digit_set import DigitSet
from qirl.families import Family
from qirl.families.digits import Digits


@dataclass(frozen=True)
class World:
    family: Family
    data: DigitSet


def make_world(options: Options) -> World:
    """The world of a config's section."""
    family = Digits(options.text_dim)
    return World(family, DigitSet(options.task, family.check))
