"""Every option of every run: typed, documented and checked here, before anything is loaded.

A run is one YAML file with the sections below; the last words of a command, `section.option=value`, override it.
Unknown names, wrong types and options that contradict each other are refused in one line that says what to write.
"""

from __future__ import annotations

import copy
import math
import re
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
    steps: int = option(100, "training steps", ge=1, lt=2**20 - 1)
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
    path: str | None = option(None, "a finished run, a model folder, or the adapter folder of a LoRA run on model.path")
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
        _require(ok, f"evaluation.guidance={list(self.guidance)} must name scales of 0 or more, such as [1, 4]")
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
        _require(ok, f"curate.balance={self.balance} is below 1: even the smallest category would lose prompts; use 0 or 1")
        return self


class Calibrate(Section):
    method: Literal["calibrated", "table"] = option(
        "calibrated", "weights that give every component its wanted share, or the hand weights of `advantage`"
    )
    shares: dict[str, float] = option({}, "wanted share of the advantage's variance per component; empty: equal shares")
    category_shares: dict[str, dict[str, float]] = option({}, "wanted shares per prompt category, over `shares`")
    ledger: str | None = option(None, "ledger.jsonl of `qirl curate` (or its folder); null: draws its own probe")
    only_kept: bool = option(True, "of such a ledger use the prompts that it keeps")


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
    scoring: Scoring = Scoring()
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
    if advantage.calibration is not None:
        given = "advantage.weights" if advantage.weights else "advantage.category_weights"
        _require(
            not (advantage.weights or advantage.category_weights),
            f"advantage.calibration and {given} both say how much a component weighs; remove one of the two",
        )
        _require(
            advantage.convention == "per_reward",
            f"advantage.calibration is for advantage.convention=per_reward, not {advantage.convention}; remove one of the two",
        )
    for section, weights in (("weights", advantage.weights), *_by_category(advantage)):
        for name, value in weights.items():
            _require(value >= 0, f"advantage.{section}.{name}={value} is negative; weights are 0 or more")


def _by_category(advantage: Advantage):
    return ((f"category_weights.{category}", weights) for category, weights in advantage.category_weights.items())


class DistillConfig(Section):
    """`qirl distill`: several task teachers taught to one student that needs no guidance."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    flow: Flow = Flow()
    distill: Distill = Distill()

    @model_validator(mode="before")
    @classmethod
    def _task_of_the_teachers(cls, values):
        """world.task follows from the teachers; the config as resolved says it."""
        distill = values.get("distill") if isinstance(values, dict) else None
        teachers = distill.get("teachers") if isinstance(distill, dict) else None
        world = values.get("world", {}) if isinstance(values, dict) else None
        if not isinstance(teachers, dict) or not isinstance(world, dict) or "task" in world:
            return values
        tasks = {str(t.get("task", "t2i")) for t in teachers.values() if isinstance(t, dict)}
        if not tasks or tasks - {"t2i", "edit"}:
            return values
        return values | {"world": world | {"task": tasks.pop() if len(tasks) == 1 else "mixed"}}

    @model_validator(mode="after")
    def _consistent(self):
        _require(
            self.model.path is not None,
            "model.path is missing: the student starts from the base that the teachers were trained from; name its folder",
        )
        _check_source(self.model)
        _check_teachers(self.distill.teachers, self.world)
        flow = self.flow
        _require(
            flow.guidance == 1 and not flow.rescale,
            f"flow.guidance={flow.guidance:g}, flow.rescale={str(flow.rescale).lower()}: the student learns to need no "
            "guidance; set flow.guidance=1 and flow.rescale=false (a teacher's scale is distill.teachers.NAME.guidance)",
        )
        _require(
            self.distill.nodes <= flow.steps,
            f"distill.nodes={self.distill.nodes} is more than flow.steps={flow.steps}; use {flow.steps} or fewer, 0 for all",
        )
        _require(
            flow.sampler != "cps" or flow.level <= 1,
            f"flow.level={flow.level}: cps takes a level in (0, 1]; use 1 or less",
        )
        return self


def _check_teachers(teachers: dict[str, Teacher], world: World) -> None:
    _require(
        len(teachers) > 0,
        "distill.teachers is empty: there is nothing to learn from; name one, such as distill.teachers.t2i.path=runs/t2i",
    )
    for name, teacher in teachers.items():
        _require(
            re.fullmatch(r"[\w-]+", name) is not None,
            f"distill.teachers: '{name}' is no name; use letters, digits, - and _, such as t2i",
        )
        _require(
            teacher.path is not None,
            f"distill.teachers.{name}.path is missing; name a finished run, its model folder or its adapter folder",
        )
    tasks = sorted({t.task for t in teachers.values()})
    wanted = tasks[0] if len(tasks) == 1 else "mixed"
    _require(
        world.task == wanted,
        f"world.task={world.task} does not fit teachers of {' and '.join(tasks)}; use {wanted}, or remove world.task",
    )


class EvaluateConfig(Section):
    """`qirl evaluate`: rewards, held-out judge and diversity at several guidance scales."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    flow: Flow = Flow()
    evaluation: Evaluation = Evaluation()
    arena: Arena = Arena()

    @model_validator(mode="after")
    def _arena_knows_its_models(self):
        models, arena = self.evaluation.models, self.arena
        known = ", ".join(models) or "none"
        _require(
            not arena.battles or len(models) > 1,
            f"arena.battles needs two models or more in evaluation.models; there are {known}: name them, or set it to false",
        )
        _require(
            arena.anchor is None or arena.anchor in models,
            f"arena.anchor={arena.anchor} is not among evaluation.models ({known}); name one of them",
        )
        for name, scale in arena.guidance.items():
            _require(
                name in models, f"arena.guidance.{name} is not among evaluation.models ({known}); name one of them"
            )
            _require(scale >= 0, f"arena.guidance.{name}={scale:g} is negative; a guidance scale is 0 or more")
        return self


class CurateConfig(Section):
    """`qirl curate`: which prompts the base model can learn from, by the range of its rewards."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    flow: Flow = Flow()
    probe: Probe = Probe()
    scoring: Scoring = Scoring()
    advantage: Advantage = Advantage()
    curate: Curate = Curate()

    @model_validator(mode="after")
    def _consistent(self):
        _check_probe(self)
        return self


class CalibrateConfig(Section):
    """`qirl calibrate`: reward weights and scale per prompt category."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    flow: Flow = Flow()
    probe: Probe = Probe()
    scoring: Scoring = Scoring()
    advantage: Advantage = Advantage()
    calibrate: Calibrate = Calibrate()

    @model_validator(mode="after")
    def _consistent(self):
        _check_probe(self)
        weights, shares = self.advantage.weights or self.advantage.category_weights, self.calibrate.shares
        shares = shares or self.calibrate.category_shares
        if self.calibrate.method == "table":
            _require(not shares, "calibrate.shares belongs to method calibrated; the table's weights are advantage.weights")
        else:
            _require(not weights, "advantage.weights belongs to method table; calibrated takes calibrate.shares")
        for section, own in (("shares", self.calibrate.shares), *self.calibrate.category_shares.items()):
            for name, value in own.items():
                _require(value >= 0, f"the wanted share {section}.{name}={value} is negative; shares are 0 or more")
        return self


def _check_probe(config: CurateConfig | CalibrateConfig) -> None:
    model, flow, timesteps = config.model, config.flow, config.probe.timesteps
    _require(model.path is not None, "model.path is missing: name the base that draws the images")
    _check_source(model)
    _check_weights(config.advantage)
    _require(
        config.advantage.calibration is None,
        "advantage.calibration belongs to `qirl train`; here weights are advantage.weights, remove it",
    )
    _require(
        flow.sampler != "cps" or flow.level <= 1, f"flow.level={flow.level}: cps takes a level in (0, 1]; use 1 or less"
    )
    trainable = min(timesteps.trainable(flow.steps), flow.steps - 1)
    _require(
        flow.sampler == "ode" or timesteps.count <= trainable,
        f"probe.timesteps.count={timesteps.count} is more than the {trainable} trainable nodes of flow.steps={flow.steps}; "
        f"use {trainable} or fewer, as policy.timesteps of the training",
    )


KINDS = {
    "pretrain": PretrainConfig, "train": TrainConfig, "distill": DistillConfig, "evaluate": EvaluateConfig,
    "curate": CurateConfig, "calibrate": CalibrateConfig,
}  # fmt: skip


def load(kind: str, source: str | Path | dict | None, overrides: tuple[str, ...] | list[str] = ()) -> Section:
    """The config of a run: a YAML file (or a dict) and dotted overrides such as `policy.group=16`.

    kind: a key of KINDS, such as "train". Raises UserError, one line, for a missing file, bad YAML, an unknown
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
