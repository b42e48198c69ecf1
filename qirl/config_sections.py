"""Every option, section by section: its type, default, limits and what it does. qirl.config says which runs have which."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qirl.paths import HUB


class Section(BaseModel):
    """Types are strict: no bool is taken for a number, no number for a text."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, values):
        """YAML knows no tuples and reads 1e-4 as text and off as false: bring such values into the form that is meant."""
        if not isinstance(values, dict):
            return values
        return {k: _meant(cls.model_fields[k].annotation, v) if k in cls.model_fields else v for k, v in values.items()}


def _meant(kind: Any, value: Any) -> Any:
    """`value` in the form of the type `kind` where nothing but the notation differs; else as it is."""
    args = get_args(kind)
    if type(None) in args:  # "x | None"
        return value if value is None else _meant(args[0], value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(
            _meant(args[min(i, len(args) - 1)] if args[-1] is not ... else args[0], v) for i, v in enumerate(value)
        )
    if get_origin(kind) is dict and isinstance(value, dict):
        return {k: _meant(args[1], v) for k, v in value.items()}
    if get_origin(kind) is Literal and value is False and "off" in args:
        return "off"
    if kind in (int, float) and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def option(default, text: str, **limits):
    return Field(default, description=text, **limits)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"  # what an option may name as a device


class Run(Section):
    out: str = option("runs/run", "run folder: everything the run writes; the same command continues it")
    seed: int = option(0, "seed of every random draw, 0 to 2^64-1", ge=0, lt=2**64)
    steps: int = option(100, "training steps", ge=1, lt=2**20 - 1)
    checkpoint_every: int = option(25, "steps between checkpoints; the last step always writes one", ge=1)
    keep: int = option(2, "checkpoints kept", ge=1)
    samples_every: int = option(10, "steps between sample grids of the monitor prompts; 0 for none", ge=0)
    monitor_prompts: int = option(12, "prompts in the sample grids", ge=1)
    device: str = option(
        "auto",
        "where it computes: auto (a GPU if there is one), cpu, cuda, cuda:1, ...; torchrun's ranks take one each",
        pattern=DEVICE,
    )
    threads: int = option(
        0, "CPU threads of torch; 0 leaves it to torch (a run repeats bit for bit only at the same number)", ge=0
    )
    graphs: bool = option(
        False,
        "calls of the transformer as CUDA graphs, for one GPU and weights that are not sharded: the host no longer limits",
    )
    report: bool = option(True, "write report.html and summary.json at the end")
    tracker: Literal["none", "tensorboard", "wandb"] = option("none", "where metrics go besides metrics.jsonl")


class World(Section):
    name: Literal["digits", "prompts"] = option(
        "digits",
        "digits: the miniature, with data, encoders and rewards of its own; prompts: a file of yours for a model of Qwen-Image",
    )
    task: Literal["t2i", "edit", "mixed"] = option(
        "t2i", "which prompts: text-to-image, edits of source images, or both"
    )
    prompts: str | None = option(
        None, "file of training prompts (.txt, or .jsonl with text, category, id); null: the built-in ones"
    )
    text_dim: int = option(64, "width of the digits world's word vectors", ge=4)
    resolution: int = option(
        1024,
        "side in pixels of the images of prompts without a size of their own; edits take their last source's shape",
        ge=64,
    )
    categories: str | None = option(
        None, "YAML file of categories and the patterns of their prompts, for prompts that name no category"
    )
    decoder: Literal["pil", "dali", "auto"] = option(
        "pil",
        "what decodes many images at once: Pillow, or for JPEG DALI (auto: where it is installed); the pixels are the same",
    )
    max_bad: float = option(0.0, "share of the prompt file's lines that may be left out as unusable", ge=0, lt=1)
    negative: str = option(" ", "prompt of the unconditional twin under guidance")


class Architecture(Section):
    layers: int = option(4, "transformer blocks", ge=1)
    heads: int = option(4, "attention heads", ge=1)
    head_dim: int = option(32, "channels per head", ge=6)
    mlp_ratio: int = option(3, "feed-forward width over model width", ge=1)
    rope_axes: tuple[int, int, int] = option(
        (8, 12, 12), "rotary channels of the frame, height and width axes; they sum to head_dim"
    )

    @model_validator(mode="after")
    def _axes_fill_the_head(self):
        axes = self.rope_axes
        require(
            sum(axes) == self.head_dim and all(a >= 0 and a % 2 == 0 for a in axes),
            f"model.architecture.rope_axes={list(axes)} must be even and sum to head_dim={self.head_dim}",
        )
        return self


class Lora(Section):
    rank: int = option(0, "LoRA rank; 0 trains all parameters", ge=0)
    alpha: float = option(16.0, "LoRA scale is alpha / rank", gt=0)
    targets: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "out"), "modules of each block that get an adapter"
    )


class Model(Section):
    path: str | None = option(
        None, "model to start from: a folder of diffusers, a finished run, or hf://OWNER/NAME@REVISION"
    )
    pipeline: str | None = option(
        None,
        "pipeline whose encoders and autoencoder go with the model; null: the one at model.path, or that it came from",
    )
    revision: str | None = option(
        None, "branch, tag or commit of a model.path at hf://OWNER/NAME, as @REVISION there says it too", min_length=1
    )
    variant: str | None = option(
        None, "variant of its weight files, such as fp16; null: those without one, else the only variant in the folder"
    )
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "float32", "compute dtype; bfloat16 keeps float32 weights beside"
    )
    base: Literal["dtype", "float32", "int8", "fp8"] = option(
        "dtype",
        "weights that LoRA leaves frozen: in `dtype`, in float32 beside bfloat16 as trained ones are, or the blocks' in 8 bits",
    )
    checkpointing: Literal["none", "attention", "block"] = option(
        "none", "what runs again in the backward instead of being kept: nothing, attention, or whole blocks"
    )
    attention: Literal["auto", "fastest", "cudnn", "flash", "flash_attn", "efficient", "dense", "cpu"] = option(
        "auto", "attention kernels of the blocks; auto: the fastest that serve the device, the dtype and the head size"
    )
    fp8: Literal["off", "torch", "te"] = option(
        "off", "matrix products of the blocks in 8-bit floats: by torch or by Transformer Engine (H100 and later)"
    )
    architecture: Architecture = option(Architecture(), "size of a model that starts from nothing (pretrain)")
    lora: Lora = option(Lora(), "low-rank adapters instead of all parameters")

    @model_validator(mode="before")
    @classmethod
    def _revision_in_the_path(cls, values):
        """The path as hf://OWNER/NAME@REVISION: the one form that models are looked up by."""
        path, revision = (
            (values.get(name) for name in ("path", "revision")) if isinstance(values, dict) else (None, None)
        )
        if not revision or not isinstance(revision, str):
            return values
        require(
            isinstance(path, str) and path.startswith(HUB),
            f"model.revision={revision} is of a repository of the hub, model.path={path or 'null'} is none; write model.path={HUB}"
            "OWNER/NAME, or remove model.revision",
        )
        name, _, own = path.partition("@")
        require(
            own in ("", revision),
            f"model.path={path} and model.revision={revision} name two revisions; remove one of the two",
        )
        return values | {"path": f"{name}@{revision}"}

    @model_validator(mode="after")
    def _only_a_frozen_base_has_8_bits(self):
        require(
            self.base not in ("int8", "fp8") or self.lora.rank,
            f"model.base={self.base} is for a base that LoRA leaves frozen; set model.lora.rank, or base=dtype",
        )
        return self

    @property
    def frozen(self) -> bool:
        """Whether the weights that are trained are adapters alone, and the others have no float32 of their own."""
        return bool(self.lora.rank) and self.base != "float32"


class Optimizer(Section):
    kind: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "adamw_8bit keeps both moments in 8 bits, by torchao; on one rank"
    )
    impl: Literal["auto", "torch", "apex"] = option(
        "auto",
        "whose adamw, the same numbers: torch's, fused on a GPU, or NVIDIA apex's FusedAdam where it is installed",
    )
    lr: float = option(2e-4, "AdamW learning rate after warm-up", gt=0)
    warmup: int = option(0, "steps of linear warm-up", ge=0)
    decay: Literal["none", "cosine"] = option(
        "none", "learning rate after warm-up: constant, or a cosine to zero at run.steps"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW betas")
    eps: float = option(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = option(0.0, "AdamW weight decay", ge=0)
    clip: float = option(1.0, "gradient norm is clipped to this", gt=0)
    ema: float = option(
        0.0, "decay of the averaged weights that are evaluated and exported; 0: the weights themselves", ge=0, lt=1
    )
    max_skipped: int = option(
        10, "updates skipped in a row (the gradient is not finite) that end the run; 0: it never ends for that", ge=0
    )

    @model_validator(mode="after")
    def _betas_are_decays(self):
        ok = all(0 <= b < 1 for b in self.betas)
        require(ok, f"optimizer.betas={list(self.betas)} must both be in [0, 1), such as [0.9, 0.999]")
        require(
            self.kind == "adamw" or self.impl == "auto",
            f"optimizer.impl={self.impl} has no moments in 8 bits, kind={self.kind} is torchao's; remove one of the two",
        )
        return self


class Flow(Section):
    steps: int = option(10, "denoising steps of the rollout", ge=2, le=1000)
    guidance: float = option(1.0, "classifier-free guidance scale of the rollout; 1 runs no unconditional pass", ge=0)
    rescale: bool = option(False, "guidance with norm rescale (Qwen-Image 1.x)")
    sampler: Literal["ode", "sde", "cps", "dance"] = option(
        "ode", "transition of the trained steps; the others are ode"
    )
    level: float = option(0.7, "noise level: a of sde and cps, eta of dance", gt=0)
    stochastic: Literal["trained", "all"] = option(
        "trained", "which steps use the sampler: the trained nodes of each sample, or all but the last"
    )
    storage: Literal["float32", "bfloat16", "float64"] = option("float32", "dtype of the states kept for the update")
    rollout_tokens: int = option(16384, "target tokens of one rollout batch, unconditional ones included", ge=1)
    base_shift: float = option(0.5, "time shift at base_tokens")
    max_shift: float = option(0.9, "time shift at max_tokens")
    base_tokens: int = option(256, "target tokens with base_shift", ge=1)
    max_tokens: int = option(8192, "target tokens with max_shift", ge=2)
    terminal: float = option(0.02, "last sigma before 0", ge=0, lt=1)

    @model_validator(mode="after")
    def _shift_has_a_slope(self):
        low, high = self.base_tokens, self.max_tokens
        require(
            low < high, f"flow.base_tokens={low} is not below flow.max_tokens={high}; the defaults are 256 and 8192"
        )
        return self


class Guidance(Section):
    scope: Literal["rollout", "both", "none"] = option(
        "rollout",
        "where flow.guidance acts: in the rollout only (hybrid CFG: no unconditional pass in the update), in rollout and "
        "objective, or nowhere",
    )
    form: Literal["residual", "literal"] = option(
        "residual",
        "grpo and guard, scope rollout: train the drawn noise around the conditional mean, or the guided transition itself",
    )


class Timesteps(Section):
    count: int = option(4, "nodes trained per sample", ge=1)
    power: float = option(2.0, "nodes are drawn without replacement with probability proportional to t^power", ge=0)
    skip_last: float = option(0.25, "this last fraction of the grid is never trained", ge=0, lt=1)

    def trainable(self, steps: int) -> int:
        """How many nodes of a grid of `steps` may be trained."""
        return math.floor(steps * (1 - self.skip_last) + 1e-9)


class Nft(Section):
    beta: float = option(1.0, "interpolation of the positive and negative velocities", gt=0)
    x0_weighted: bool = option(True, "the published code's loss on x0 with self-normalising weight")
    old_decay: float = option(
        0.0, "largest decay of the sampling policy's average; 0: the weights at the rollout", ge=0, lt=1
    )
    old_ramp: float = option(0.001, "growth of that decay per step, up to old_decay", gt=0)


class Policy(Section):
    loss: Literal["nft", "grpo", "guard"] = option("nft", "policy loss")
    prompts: int = option(8, "prompts (groups) per step, over all ranks", ge=1)
    group: int = option(12, "images per prompt", ge=1)
    refill: int = option(
        0, "rounds in which groups without signal (all advantages 0) are replaced by the next prompts; 0: they stay", ge=0,
        le=100,
    )  # fmt: skip
    timesteps: Timesteps = option(Timesteps(), "which nodes are trained")
    nft: Nft = option(Nft(), "options of loss nft")
    clip_low: float = option(
        1e-4, "grpo and guard: ratio is clipped below 1 - clip_low (log-probabilities are means over elements)", gt=0
    )
    clip_high: float = option(1e-4, "grpo and guard: ratio is clipped above 1 + clip_high", gt=0)
    kl: float = option(0.0, "weight of the distance to the frozen base", ge=0)
    kl_form: Literal["velocity", "transition"] = option(
        "velocity", "squared velocity difference, or the closed form of sde transitions"
    )
    old: Literal["auto", "detach", "recompute", "rollout"] = option(
        "auto", "old log-probabilities; auto: detach with one update per rollout, recompute with more"
    )
    epochs: int = option(1, "passes over each rollout", ge=1)
    minibatches: int = option(1, "optimizer steps per pass, each on its share of the prompts", ge=1)
    micro_tokens: int = option(16384, "tokens of one pack in the update", ge=1)


class Advantage(Section):
    convention: Literal["per_reward", "sum_then_normalise", "gdpo", "global_std", "no_std"] = option(
        "per_reward", "how rewards become advantages; the others are presets of other trainers"
    )
    weights: dict[str, float] = option({}, "weight per reward component; a missing one weighs 1")
    category_weights: dict[str, dict[str, float]] = option({}, "weights per prompt category, over `weights`")
    calibration: str | None = option(
        None, "calibration.json of `qirl calibrate`: weights and scale per category, in place of the weights above"
    )
    floor: float = option(0.005, "a component with less spread inside a group gives no signal", ge=0)
    clip: float = option(5.0, "advantages are clipped to +-clip", gt=0)
    max_failed: float = option(0.2, "largest share of failed samples in a step before the run stops", ge=0, le=1)
    shuffle: bool = option(False, "control experiment: rewards are shuffled inside each group")


class Composition(Section):
    layers: tuple[str, ...] = option(
        (), "components from the lowest layer up: where one fails, those above it are capped"
    )
    failing: float = option(0.25, "a layer fails below this score", ge=0, le=1)
    cap: float = option(0.25, "most that the layers above a failed one can score", ge=0, le=1)
    gates: dict[str, float] = option({}, "limits of components that a sample must reach, such as {safety: 0.5}")
    gated: Literal["zero", "drop"] = option("zero", "a sample below one: all its components are 0, or it is dropped")


class Scoring(Section):
    workers: int = option(1, "micro-groups of images that are scored at the same time, in the background", ge=1)
    timeout: float = option(300.0, "seconds a reward may take for one micro-group", gt=0)
    retries: int = option(2, "further tries after an error or a timeout; then the samples count as failed", ge=0)
    backoff: float = option(1.0, "seconds before the first further try; doubled for each one after it", ge=0)


class Pretrain(Section):
    batch: int = option(64, "images per step", ge=1)
    drop_condition: float = option(
        0.1, "share of images trained without a prompt; guidance needs it above 0", ge=0, le=1
    )
    logit_mean: float = option(0.0, "t = sigmoid(normal(mean, std))")
    logit_std: float = option(1.0, "see logit_mean", gt=0)
    micro_tokens: int = option(16384, "tokens of one pack", ge=1)


class Teacher(Section):
    path: str | None = option(
        None, "a finished run, a model folder, or an adapter of model.path: peft's, diffusers' or kohya's"
    )
    task: Literal["t2i", "edit"] = option("t2i", "whose prompts it teaches")
    guidance: float = option(1.0, "classifier-free guidance scale it teaches with", ge=0)
    rescale: bool = option(False, "its guidance with norm rescale (Qwen-Image 1.x)")
    share: int = option(1, "its steps out of every sum of all teachers' shares", ge=1, le=1000)


class Distill(Section):
    teachers: dict[str, Teacher] = option({}, "teachers by name; a step has one of them, which follows from the step")
    prompts: int = option(8, "prompts per step, over all ranks", ge=1)
    group: int = option(4, "images per prompt", ge=1)
    nodes: int = option(0, "nodes of a trajectory that are trained; 0 for all", ge=0)
    power: float = option(2.0, "with nodes: drawn without replacement with probability proportional to t^power", ge=0)
    weight: Literal["one", "step", "sde"] = option(
        "one", "weight of a node: 1, its time step |dt|, or what |dv|^2 weighs in the KL of its sde transition"
    )
    anchor: float = option(0.0, "weight of the squared velocity distance to the frozen base beside the teacher", ge=0)
    micro_tokens: int = option(16384, "tokens of one pack of the student", ge=1)


class Evaluation(Section):
    models: dict[str, str] = option(
        {}, "models to compare by name: model folders or finished runs, over model.path; empty: model.path alone"
    )
    guidance: tuple[float, ...] = option((1.0, 2.0, 4.0, 6.0), "guidance scales to evaluate at")
    prompts: int = option(96, "held-out prompts", ge=1)
    group: int = option(6, "images per prompt", ge=2)
    steps: int = option(20, "denoising steps", ge=2)
    seed: int = option(1_000_003, "seed of the fresh noise", ge=0, lt=2**64)
    batch_tokens: int = option(32768, "target tokens of one batch, unconditional ones included", ge=1)

    @model_validator(mode="after")
    def _scales(self):
        ok = self.guidance and min(self.guidance) >= 0
        require(ok, f"evaluation.guidance={list(self.guidance)} must name scales of 0 or more, such as [1, 4]")
        return self


class Arena(Section):
    battles: bool = option(False, "every two of evaluation.models battle, judged by the held-out judge, and are rated")
    anchor: str | None = option(None, "model whose rating is fixed; null: the first one")
    rating: float = option(1000.0, "rating of the anchor, on the Elo scale")
    resamples: int = option(1000, "bootstrap resamples of the prompts, for 95 % intervals", ge=100, le=100_000)
    guidance: dict[str, float] = option(
        {}, "scale that a model plays at; one that is not named plays at the first of evaluation.guidance"
    )


class Probe(Section):
    group: int = option(16, "images per candidate prompt", ge=2, le=4096)
    prompts: int = option(0, "candidate prompts, the categories in turn; 0: all of them", ge=0)
    timesteps: Timesteps = option(
        Timesteps(), "policy.timesteps of the training: the random steps of a stochastic sampler"
    )


class Curate(Section):
    tau: float = option(
        0.02, "a prompt stays if the range of its composite reward is above tau x d2(group); at least twice its read noise",
        gt=0, le=1,
    )  # fmt: skip
    saturated: float = option(1.0, "a prompt whose mean composite reward is above this is dropped", gt=0, le=1)
    balance: float = option(
        0.0, "no category keeps more than this many times the prompts of the smallest one that keeps any; 0: no limit",
        ge=0,
    )  # fmt: skip

    @model_validator(mode="after")
    def _balance_is_a_ratio(self):
        ok = self.balance == 0 or self.balance >= 1
        require(
            ok, f"curate.balance={self.balance} is below 1: even the smallest category would lose prompts; use 0 or 1"
        )
        return self


class Calibrate(Section):
    method: Literal["calibrated", "table"] = option(
        "calibrated", "weights that give every component its wanted share, or the hand weights of `advantage`"
    )
    shares: dict[str, float] = option({}, "wanted share of the advantage's variance per component; empty: equal shares")
    category_shares: dict[str, dict[str, float]] = option({}, "wanted shares per prompt category, over `shares`")
    ledger: str | None = option(None, "ledger.jsonl of `qirl curate` (or its folder); null: draws its own probe")
    only_kept: bool = option(True, "of such a ledger use the prompts that it keeps")
