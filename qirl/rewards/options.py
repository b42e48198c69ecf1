"""`rewards:` of a config: {name: options}, each of a kind. The options of every kind, light to import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qirl.config_sections import Section, option, require
from qirl.rewards.vlm.options import JudgeOptions


class PythonOptions(Section):
    kind: Literal["python"] = option("python", "a function of yours, as qirl.train takes it")
    target: str | None = option(None, "its module:function, importable where the command runs", pattern=r"^[\w.]+:\w+$")

    @model_validator(mode="after")
    def _has_a_target(self):
        require(self.target is not None, "a reward of kind python needs `target`: module:function")
        return self


RewardOptions = Annotated[JudgeOptions | PythonOptions, Field(discriminator="kind")]
