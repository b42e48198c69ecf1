"""Options of a judge as a reward: what it is asked, by which protocol, and where it answers."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from qirl.config_sections import option, require
from qirl.rewards.remote import Remote

Mode = Literal["expected_cot", "expected_direct", "parsed"]


class JudgeOptions(Remote):
    kind: Literal["judge"] = option("judge", "a vision-language model that scores from 1 to 5")
    rubric: str = option("alignment", "what it is asked: a rubric that ships with qirl, or a text file")
    omit: tuple[str, ...] = option((), "optional lines of the rubric to leave out, such as attractiveness")
    mode: Mode = option(
        "expected_cot",
        "expected_cot: reasoning, then the expectation over the five score tokens; expected_direct: the expectation "
        "without reasoning; parsed: the digit that it writes",
    )
    chains: int = option(1, "chains of reasoning per image, averaged; their spread is the read noise", ge=1, le=64)
    servers: tuple[str, ...] = option(
        (), "addresses of OpenAI-compatible servers (vLLM, SGLang) that serve one model, such as http://host:8000/v1"
    )
    model: str | None = option(None, "the model's name on the servers; without servers: its folder, read in process")
    temperature: float = option(0.7, "temperature of the reasoning", ge=0, le=2)
    reasoning_tokens: int = option(512, "longest reasoning; a longer one is cut off and does not count", ge=1)
    pixels: int = option(1_048_576, "an image of more pixels is scaled down to this many", ge=256)

    @model_validator(mode="after")
    def _has_a_model(self):
        require(
            self.model is not None,
            "a judge needs `model`: its name on the servers, or a folder to read it in process",
        )
        require(
            self.mode != "expected_direct" or self.chains == 1,
            f"chains={self.chains}: without reasoning every chain reads the same; use 1, or mode expected_cot",
        )
        return self
