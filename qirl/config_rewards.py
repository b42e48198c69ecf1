"""`rewards:` of a config: {name: options}, each of a kind, and how they are served. Light to import."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from qirl.config_parts import PARTS
from qirl.config_sections import DEVICE, Section, option, require

Mode = Literal["expected_cot", "expected_direct", "parsed"]


class Remote(Section):
    """What every kind that asks servers has."""

    servers: tuple[str, ...] = option((), "addresses of servers that do the same, asked in turn")
    token_variable: str | None = option(None, "environment variable that holds the servers' bearer token")
    concurrency: int = option(32, "requests under way at the same time", ge=1)
    timeout: float = option(120.0, "seconds that one request may take", gt=0)
    retries: int = option(4, "further tries of a request after an error of a server, on the next one", ge=0)
    backoff: float = option(
        0.5, "seconds before the first of them, doubled for each one after it, times 0.5 to 1.5", ge=0
    )


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
    device: str = option("auto", "where a model without servers runs; auto: where the run computes", pattern=DEVICE)
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


class Ranged(Section):
    """A reward whose scores may have any scale."""

    range: tuple[float, float] | None = option(
        None, "[low, high] of its scores, which are then mapped to [0, 1]; none: they stay as they are"
    )

    @model_validator(mode="after")
    def _range_is_one(self):
        require(
            self.range is None or self.range[0] < self.range[1],
            f"range={list(self.range or ())}: the first number must be below the second, as in [0, 1]",
        )
        return self


class PythonOptions(Ranged):
    kind: Literal["python"] = option("python", "a function of yours, as qirl.train takes it")
    target: str | None = option(
        None, "its module:function, importable where the command runs, or file.py:function", pattern=r"^[\w./-]+:\w+$"
    )

    @model_validator(mode="after")
    def _has_a_target(self):
        require(self.target is not None, "a reward of kind python needs `target`: module:function")
        return self


class ServerOptions(Remote, Ranged):
    kind: Literal["server"] = option("server", "a scorer server, `qirl reward serve`")
    servers: tuple[str, ...] = option(
        (), "addresses of scorer servers of one config, such as http://host:8100", min_length=1
    )
    components: tuple[str, ...] = option((), "components to take; empty: all that the servers have")
    batch: int = option(16, "samples in one request", ge=1)
    cache: int = option(4096, "samples whose scores are kept, by the content of images and prompt; 0: none", ge=0)


RewardOptions = Annotated[Union[(JudgeOptions, PythonOptions, ServerOptions, *PARTS)], Field(discriminator="kind")]


class Serve(Section):
    host: str = option("127.0.0.1", "address to listen on; another than loopback needs a token")
    port: int = option(8100, "port to listen on; 0: any free one", ge=0, le=65535)
    token_variable: str | None = option(None, "environment variable that holds the bearer token of clients")
    batch: int = option(32, "samples that rewards score at a time, of any requests", ge=1)
    wait: float = option(0.005, "seconds that a batch waits for more samples", ge=0, le=10)
    queue: int = option(2048, "samples that may wait; a request beyond that is told to come again (429)", ge=1)
    timeout: float = option(300.0, "seconds that a reward may take for a batch; then its components fail", gt=0)
    max_body: int = option(256 * 2**20, "bytes of a request", ge=1024)
    max_images: int = option(256, "images of a request, sources included", ge=1)
    max_pixels: int = option(2**24, "pixels of an image", ge=256)
    device: str = option("auto", "where rewards run that name none: auto, cpu, cuda, cuda:1, ...", pattern=DEVICE)
