"""`rewards:` of a config: {name: options}, each of a kind, how they are served, and what `qirl reward` has besides."""

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


class Categorise(Remote):
    servers: tuple[str, ...] = option(
        (), "addresses of OpenAI-compatible servers (vLLM, SGLang) that serve one model, such as http://host:8000/v1"
    )
    model: str | None = option(None, "the vision-language model's name on the servers")
    categories: dict[str, str] = option({}, "categories by name: a line that says which prompts belong there")
    other: str = option("other", "category of a prompt to which the model answers none of those names", min_length=1)
    answer_tokens: int = option(32, "longest answer; one that is cut off is none of the names", ge=1)
    pixels: int = option(262_144, "a source image of more pixels is scaled down to this many", ge=256)


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


class Judge(Section):
    path: str | None = option(None, "Qwen2.5-VL or Qwen3-VL model folder to start from")
    records: str | None = option(None, ".jsonl file of rated images: images, rubric, prompt or instruction, score, ...")
    max_missing: float = option(
        0.0, "largest share of records whose images are missing or none; those are left out", ge=0, le=1
    )
    omit: tuple[str, ...] = option((), "optional lines of the rubrics to leave out, such as attractiveness")
    loss: Literal["pointwise", "soft", "pairwise"] = option(
        "pointwise",
        "squared error of the expected score, KL to the raters' distribution, or Bradley-Terry inside a prompt (the baseline)",
    )
    language: float = option(
        0.2, "weight of the reasoning's cross-entropy, with the probability that a digit comes at all", ge=0
    )
    batch: int = option(32, "records per step, over all ranks", ge=1)
    per_prompt: int = option(2, "of them so many of one prompt, where it has them: what pairwise compares", ge=1)
    micro: int = option(8, "records of one forward pass, rounded down to whole prompts", ge=1)
    pixels: int = option(262_144, "an image of more pixels is scaled down to this many", ge=256)
    dtype: Literal["float32", "bfloat16"] = option("float32", "compute dtype; bfloat16 keeps float32 weights beside")
    vision: bool = option(True, "train the image encoder too (without LoRA)")
    rank: int = option(0, "LoRA rank on the language part; 0 trains all parameters", ge=0)
    alpha: float = option(16.0, "LoRA scale is alpha / rank", gt=0)
    mode: Literal["expected_direct", "expected_cot"] = option(
        "expected_direct", "how validation reads scores; expected_cot lets the judge reason first, which takes long"
    )
    chains: int = option(1, "chains of reasoning per image of validation (expected_cot)", ge=1)
    validate_every: int = option(0, "steps between validations; the end always has one; 0: the end alone", ge=0)
