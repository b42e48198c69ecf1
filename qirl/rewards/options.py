"""`rewards:` of a config: {name: options}, each of a kind. The options of every kind, light to import."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from qirl.config_sections import Section, option, require
from qirl.rewards.parts.options import PARTS
from qirl.rewards.remote import Remote
from qirl.rewards.vlm.options import JudgeOptions


class PythonOptions(Section):
    kind: Literal["python"] = option("python", "a function of yours, as qirl.train takes it")
    target: str | None = option(None, "its module:function, importable where the command runs", pattern=r"^[\w.]+:\w+$")

    @model_validator(mode="after")
    def _has_a_target(self):
        require(self.target is not None, "a reward of kind python needs `target`: module:function")
        return self


class ServerOptions(Remote):
    kind: Literal["server"] = option("server", "a scorer server, `qirl reward serve`")
    servers: tuple[str, ...] = option(
        (), "addresses of scorer servers of one config, such as http://host:8100", min_length=1
    )
    components: tuple[str, ...] = option((), "components to take; empty: all that the servers have")
    batch: int = option(16, "samples in one request", ge=1)
    cache: int = option(4096, "samples whose scores are kept, by the content of images and prompt; 0: none", ge=0)


RewardOptions = Annotated[Union[(JudgeOptions, PythonOptions, ServerOptions, *PARTS)], Field(discriminator="kind")]
