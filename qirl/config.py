"""Every option of every run: typed, documented and checked here, before anything is loaded.

A run is one YAML file with the sections below; the last words of a command, `section.option=value`, override it.
Unknown names, wrong types and options that contradict each other are refused in one line that says what to write.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qirl import config_file
from qirl.errors import UserError


class Section(BaseModel):
    """Types are strict: no bool is taken for a number, no number for a text."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, values):
        """YAML knows no tuples and reads 1e-4 as text: bring such values into the form that is meant."""
        if not isinstance(values, dict):
            return values
        return {k: _meant(cls.model_fields[k].annotation, v) if k in cls.model_fields else v for k, v in values.items()}


def _meant(kind: Any, value: Any) -> Any:
    """`value` in the form of the type `kind` where nothing but the notation differs; else as it is."""
    args = get_args(kind)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(
            _meant(args[min(i, len(args) - 1)] if args[-1] is not ... else args[0], v) for i, v in enumerate(value)
        )
    if get_origin(kind) is dict and isinstance(value, dict):
        return {k: _meant(args[1], v) for k, v in value.items()}
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Run(Section):
    out: str = option("runs/run", "run folder: everything the run writes; the same command continues it")
    seed: int = option(0, "seed of every random draw, 0 to 2^64-1", ge=0, lt=2**64)
    steps: int = option(100, "training steps", ge=1, lt=2**20)
    checkpoint_every: int = option(25, "steps between checkpoints; the last step always writes one", ge=1)
    keep: int = option(2, "checkpoints kept", ge=1)
    samples_every: int = option(10, "steps between sample grids of the monitor prompts; 0 for none", ge=0)
    monitor_prompts: int = option(12, "prompts in the sample grids", ge=1)
    threads: int = option(
        0, "CPU threads of torch; 0 leaves it to torch (a run repeats bit for bit only at the same number)", ge=0
    )
    report: bool = option(True, "write report.html and summary.json at the end")
    tracker: Literal["none", "tensorboard", "wandb"] = option("none", "where metrics go besides metrics.jsonl")


class World(Section):
    name: Literal["digits"] = option("digits", "data, condition encoder, autoencoder and built-in rewards")
    task: Literal["t2i", "edit", "mixed"] = option(
        "t2i", "which prompts: text-to-image, edits of source images, or both"
    )
    prompts: str | None = option(
        None, "file of training prompts (.txt, or .jsonl with text, category, id); null: the built-in ones"
    )
    text_dim: int = option(64, "width of the digits world's word vectors", ge=4)


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
        _require(
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
    path: str | None = option(None, "model to start from: a diffusers folder or a finished run folder")
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "float32", "compute dtype; bfloat16 keeps float32 weights beside"
    )
    architecture: Architecture = option(Architecture(), "size of a model that starts from nothing (pretrain)")
    lora: Lora = option(Lora(), "low-rank adapters instead of all parameters")


class Optimizer(Section):
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

    @model_validator(mode="after")
    def _betas_are_decays(self):
        ok = all(0 <= b < 1 for b in self.betas)
        _require(ok, f"optimizer.betas={list(self.betas)} must both be in [0, 1), such as [0.9, 0.999]")
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
        _require(
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
    floor: float = option(0.005, "a component with less spread inside a group gives no signal", ge=0)
    clip: float = option(5.0, "advantages are clipped to +-clip", gt=0)
    max_failed: float = option(0.2, "largest share of failed samples in a step before the run stops", ge=0, le=1)
    shuffle: bool = option(False, "control experiment: rewards are shuffled inside each group")


class Pretrain(Section):
    batch: int = option(64, "images per step", ge=1)
    drop_condition: float = option(
        0.1, "share of images trained without a prompt; guidance needs it above 0", ge=0, le=1
    )
    logit_mean: float = option(0.0, "t = sigmoid(normal(mean, std))")
    logit_std: float = option(1.0, "see logit_mean", gt=0)
    micro_tokens: int = option(16384, "tokens of one pack", ge=1)


class Evaluation(Section):
    guidance: tuple[float, ...] = option((1.0, 2.0, 4.0, 6.0), "guidance scales to evaluate at")
    prompts: int = option(96, "held-out prompts", ge=1)
    group: int = option(6, "images per prompt", ge=2)
    steps: int = option(20, "denoising steps", ge=2)
    seed: int = option(1_000_003, "seed of the fresh noise", ge=0, lt=2**64)
    batch_tokens: int = option(32768, "target tokens of one batch, unconditional ones included", ge=1)

    @model_validator(mode="after")
    def _scales(self):
        ok = self.guidance and min(self.guidance) >= 0
        _require(ok, f"evaluation.guidance={list(self.guidance)} must name scales of 0 or more, such as [1, 4]")
        return self


class PretrainConfig(Section):
    """`qirl pretrain`: a base model by flow matching."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    flow: Flow = Flow()
    pretrain: Pretrain = Pretrain()

    @model_validator(mode="after")
    def _consistent(self):
        _check_source(self.model)
        _require(
            self.model.path is not None or not self.model.lora.rank,
            f"model.lora.rank={self.model.lora.rank} needs a trained model below it: set model.path, or rank 0",
        )
        _require(
            self.world.prompts is None,
            f"world.prompts={self.world.prompts}: pretraining draws its own labelled examples; remove it",
        )
        return self


class TrainConfig(Section):
    """`qirl train`: reinforcement learning of a model against rewards."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    flow: Flow = Flow()
    guidance: Guidance = Guidance()
    policy: Policy = Policy()
    advantage: Advantage = Advantage()

    @model_validator(mode="after")
    def _consistent(self):
        _require(
            self.model.path is not None,
            "model.path is missing: RL starts from a base; name a model folder (qirl pretrain makes one)",
        )
        _check_source(self.model)
        _check_groups(self.policy, self.flow)
        _check_sampler(self.policy, self.flow)
        _check_old(self.policy, self.flow)
        _require(
            self.guidance.scope != "none" or self.flow.guidance == 1,
            f"guidance.scope=none samples without guidance and flow.guidance={self.flow.guidance} asks for it; set "
            "flow.guidance=1, or scope rollout",
        )
        _check_weights(self.advantage)
        return self


def _check_source(model: Model) -> None:
    _require(
        model.path is None or model.architecture == Architecture(),
        f"model.architecture is the size of a model that starts from nothing, model.path={model.path} brings its own; "
        "remove one of the two",
    )


def _check_groups(p: Policy, flow: Flow) -> None:
    _require(p.group >= 2, f"policy.group={p.group}: a group of one sample has no advantage; use 2 or more")
    _require(
        p.prompts % p.minibatches == 0,
        f"policy.prompts={p.prompts} is not a multiple of policy.minibatches={p.minibatches}; "
        f"use {max(1, p.prompts // p.minibatches) * p.minibatches} prompts",
    )
    trainable = p.timesteps.trainable(flow.steps)
    trainable = min(trainable, flow.steps - 1) if p.loss != "nft" else trainable
    _require(
        p.timesteps.count <= trainable,
        f"policy.timesteps.count={p.timesteps.count} is more than the {trainable} trainable nodes of "
        f"flow.steps={flow.steps} with skip_last={p.timesteps.skip_last}; "
        + (f"use {trainable} or fewer" if trainable else "use more steps or a smaller skip_last"),
    )


def _check_sampler(p: Policy, flow: Flow) -> None:
    if p.loss == "nft":
        _require(
            flow.sampler == "ode",
            f"policy.loss=nft rolls out by ode; flow.sampler={flow.sampler} belongs to grpo and guard, use ode",
        )
        _require(p.kl_form == "velocity", "policy.kl_form=transition needs an sde; nft uses velocity")
        return
    _require(
        flow.sampler != "ode",
        f"policy.loss={p.loss} needs a stochastic sampler; set flow.sampler=sde (or cps, dance)",
    )
    if flow.sampler == "cps":
        _require(p.loss == "grpo", "policy.loss=guard needs a transition density; cps drops it, use flow.sampler=sde")
        _require(p.kl_form == "velocity", "policy.kl_form=transition needs a density; cps drops it, use velocity")
        _require(flow.level <= 1, f"flow.level={flow.level}: cps takes a level in (0, 1]; use 1 or less")


def _check_old(p: Policy, flow: Flow) -> None:
    _require(
        p.loss != "nft" or p.old in ("auto", "detach"),
        f"policy.old={p.old} belongs to grpo and guard; nft uses policy.nft.old_decay, leave policy.old=auto",
    )
    updates = p.epochs * p.minibatches
    _require(
        p.old != "detach" or updates == 1,
        f"policy.old=detach is exact for one update per rollout, not {updates}; use recompute",
    )
    _require(
        p.old != "rollout" or flow.guidance == 1,
        "policy.old=rollout with guidance: the old log-probability would be guided; use recompute",
    )


def _check_weights(advantage: Advantage) -> None:
    for section, weights in (("weights", advantage.weights), *_by_category(advantage)):
        for name, value in weights.items():
            _require(value >= 0, f"advantage.{section}.{name}={value} is negative; weights are 0 or more")


def _by_category(advantage: Advantage):
    return ((f"category_weights.{category}", weights) for category, weights in advantage.category_weights.items())


class EvaluateConfig(Section):
    """`qirl evaluate`: rewards, held-out judge and diversity at several guidance scales."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    flow: Flow = Flow()
    evaluation: Evaluation = Evaluation()


KINDS = {"pretrain": PretrainConfig, "train": TrainConfig, "evaluate": EvaluateConfig}


def load(kind: str, source: str | Path | dict | None, overrides: tuple[str, ...] | list[str] = ()) -> Section:
    """The config of a run: a YAML file (or a dict) and dotted overrides such as `policy.group=16`.

    kind: "pretrain", "train" or "evaluate". Raises UserError, one line, for a missing file, bad YAML, an unknown
    option (with the nearest name), a wrong type or options that contradict each other.
    """
    schema = KINDS[kind]
    values = config_file.read(source) if isinstance(source, (str, Path)) else copy.deepcopy(dict(source or {}))
    for text in overrides:
        config_file.override(schema, values, text)
    for name in values:
        others = [other for other, config in KINDS.items() if name in config.model_fields]
        if others and kind not in others:
            raise UserError(
                f"'{name}' belongs to `qirl {others[0]}`, not to `qirl {kind}`; run that, or remove '{name}'"
            )
    config_file.check_names(schema, values)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(config_file.one_line(schema, error)) from None


def to_dict(config: Section) -> dict:
    """The resolved config as plain data, as config.yaml holds it."""
    return config.model_dump(mode="json")


def describe(kind: str) -> list[tuple[str, str, str, str]]:
    """(name, type, default, text) of every option of a kind of run, in order: the source of `--help`."""
    return config_file.describe(KINDS[kind])
