"""Every run's config: which sections it has, and what contradicts what, checked before anything is loaded.

A run is one YAML file with the sections of qirl.config_sections; the last words of a command, `section.option=value`,
override it. Unknown names, wrong types and options that contradict each other are refused in one line that says what to
write.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

from pydantic import ValidationError, model_validator

from qirl import config_file
from qirl.config_parallel import Parallel
from qirl.config_rewards import Categorise, Judge, RewardOptions, Serve
from qirl.config_sections import (
    Advantage,
    Architecture,
    Arena,
    Calibrate,
    Composition,
    Curate,
    Distill,
    Evaluation,
    Flow,
    Guidance,
    Model,
    Optimizer,
    Policy,
    Pretrain,
    Probe,
    Run,
    Scoring,
    Section,
    Teacher,
    World,
    option,
    require,
)
from qirl.errors import UserError

REWARDS = option({}, "rewards by name; empty: the world's own")


class ModelConfig(Section):
    """What every run with a diffusion transformer has."""

    run: Run = Run()
    world: World = World()
    model: Model = Model()
    flow: Flow = Flow()

    @model_validator(mode="after")
    def _one_source_and_a_level_that_the_sampler_takes(self):
        model, flow = self.model, self.flow
        require(
            model.path is None or model.architecture == Architecture(),
            f"model.architecture is the size of a model that starts from nothing, model.path={model.path} brings its "
            "own; remove one of the two",
        )
        require(
            flow.sampler != "cps" or flow.level <= 1,
            f"flow.level={flow.level}: cps takes a level in (0, 1]; use 1 or less",
        )
        return self


class PretrainConfig(ModelConfig):
    """`qirl pretrain`: a base model by flow matching."""

    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    pretrain: Pretrain = Pretrain()

    @model_validator(mode="after")
    def _consistent(self):
        require(
            self.model.path is not None or not self.model.lora.rank,
            f"model.lora.rank={self.model.lora.rank} needs a trained model below it: set model.path, or rank 0",
        )
        require(
            self.world.prompts is None or self.world.name != "digits",
            f"world.prompts={self.world.prompts}: pretraining on digits draws its own labelled examples; remove it",
        )
        return self


class RewardedConfig(ModelConfig):
    """What every run has whose images are scored and compared inside a group."""

    rewards: dict[str, RewardOptions] = REWARDS
    scoring: Scoring = Scoring()
    composition: Composition = Composition()
    advantage: Advantage = Advantage()

    @model_validator(mode="after")
    def _weights_fit(self):
        _check_weights(self.advantage)
        return self


class TrainConfig(RewardedConfig):
    """`qirl train`: reinforcement learning of a model against rewards."""

    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    guidance: Guidance = Guidance()
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _consistent(self):
        require(
            self.model.path is not None,
            "model.path is missing: RL starts from a base; name a model folder (qirl pretrain makes one)",
        )
        _check_groups(self.policy, self.flow)
        _check_sampler(self.policy, self.flow)
        _check_old(self.policy, self.flow)
        require(
            self.guidance.scope != "none" or self.flow.guidance == 1,
            f"guidance.scope=none samples without guidance and flow.guidance={self.flow.guidance} asks for it; set "
            "flow.guidance=1, or scope rollout",
        )
        return self


def _check_groups(p: Policy, flow: Flow) -> None:
    require(p.group >= 2, f"policy.group={p.group}: a group of one sample has no advantage; use 2 or more")
    require(
        p.prompts % p.minibatches == 0,
        f"policy.prompts={p.prompts} is not a multiple of policy.minibatches={p.minibatches}; "
        f"use {max(1, p.prompts // p.minibatches) * p.minibatches} prompts",
    )
    trainable = p.timesteps.trainable(flow.steps)
    trainable = min(trainable, flow.steps - 1) if p.loss != "nft" else trainable
    require(
        p.timesteps.count <= trainable,
        f"policy.timesteps.count={p.timesteps.count} is more than the {trainable} trainable nodes of "
        f"flow.steps={flow.steps} with skip_last={p.timesteps.skip_last}; "
        + (f"use {trainable} or fewer" if trainable else "use more steps or a smaller skip_last"),
    )


def _check_sampler(p: Policy, flow: Flow) -> None:
    if p.loss == "nft":
        require(
            flow.sampler == "ode",
            f"policy.loss=nft rolls out by ode; flow.sampler={flow.sampler} belongs to grpo and guard, use ode",
        )
        require(p.kl_form == "velocity", "policy.kl_form=transition needs an sde; nft uses velocity")
        return
    require(
        flow.sampler != "ode",
        f"policy.loss={p.loss} needs a stochastic sampler; set flow.sampler=sde (or cps, dance)",
    )
    if flow.sampler == "cps":
        require(p.loss == "grpo", "policy.loss=guard needs a transition density; cps drops it, use flow.sampler=sde")
        require(p.kl_form == "velocity", "policy.kl_form=transition needs a density; cps drops it, use velocity")


def _check_old(p: Policy, flow: Flow) -> None:
    require(
        p.loss != "nft" or p.old in ("auto", "detach"),
        f"policy.old={p.old} belongs to grpo and guard; nft uses policy.nft.old_decay, leave policy.old=auto",
    )
    updates = p.epochs * p.minibatches
    require(
        p.old != "detach" or updates == 1,
        f"policy.old=detach is exact for one update per rollout, not {updates}; use recompute",
    )
    require(
        p.old != "rollout" or flow.guidance == 1,
        "policy.old=rollout with guidance: the old log-probability would be guided; use recompute",
    )


def _check_weights(advantage: Advantage) -> None:
    if advantage.calibration is not None:
        given = "advantage.weights" if advantage.weights else "advantage.category_weights"
        require(
            not (advantage.weights or advantage.category_weights),
            f"advantage.calibration and {given} both say how much a component weighs; remove one of the two",
        )
        require(
            advantage.convention == "per_reward",
            f"advantage.calibration is for advantage.convention=per_reward, not {advantage.convention}; remove one of the two",
        )
    for section, weights in (("weights", advantage.weights), *_by_category(advantage)):
        for name, value in weights.items():
            require(value >= 0, f"advantage.{section}.{name}={value} is negative; weights are 0 or more")


def _by_category(advantage: Advantage):
    return ((f"category_weights.{category}", weights) for category, weights in advantage.category_weights.items())


class DistillConfig(ModelConfig):
    """`qirl distill`: several task teachers taught to one student that needs no guidance."""

    optimizer: Optimizer = Optimizer()
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
        require(
            self.model.path is not None,
            "model.path is missing: the student starts from the base that the teachers were trained from; name its folder",
        )
        _check_teachers(self.distill.teachers, self.world)
        flow = self.flow
        require(
            flow.guidance == 1 and not flow.rescale,
            f"flow.guidance={flow.guidance:g}, flow.rescale={str(flow.rescale).lower()}: the student learns to need no "
            "guidance; set flow.guidance=1 and flow.rescale=false (a teacher's scale is distill.teachers.NAME.guidance)",
        )
        require(
            self.distill.nodes <= flow.steps,
            f"distill.nodes={self.distill.nodes} is more than flow.steps={flow.steps}; use {flow.steps} or fewer, 0 for all",
        )
        return self


def _check_teachers(teachers: dict[str, Teacher], world: World) -> None:
    require(
        len(teachers) > 0,
        "distill.teachers is empty: there is nothing to learn from; name one, such as distill.teachers.t2i.path=runs/t2i",
    )
    for name, teacher in teachers.items():
        require(
            re.fullmatch(r"[\w-]+", name) is not None,
            f"distill.teachers: '{name}' is no name; use letters, digits, - and _, such as t2i",
        )
        require(
            teacher.path is not None,
            f"distill.teachers.{name}.path is missing; name a finished run, its model folder or its adapter folder",
        )
    tasks = sorted({t.task for t in teachers.values()})
    wanted = tasks[0] if len(tasks) == 1 else "mixed"
    require(
        world.task == wanted,
        f"world.task={world.task} does not fit teachers of {' and '.join(tasks)}; use {wanted}, or remove world.task",
    )


class EvaluateConfig(ModelConfig):
    """`qirl evaluate`: rewards, held-out judge and diversity at several guidance scales."""

    evaluation: Evaluation = Evaluation()
    arena: Arena = Arena()
    rewards: dict[str, RewardOptions] = REWARDS
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _arena_knows_its_models(self):
        models, arena = self.evaluation.models, self.arena
        known = ", ".join(models) or "none"
        require(
            not arena.battles or len(models) > 1,
            f"arena.battles needs two models or more in evaluation.models; there are {known}: name them, or set it to false",
        )
        require(
            arena.anchor is None or arena.anchor in models,
            f"arena.anchor={arena.anchor} is not among evaluation.models ({known}); name one of them",
        )
        for name, scale in arena.guidance.items():
            require(name in models, f"arena.guidance.{name} is not among evaluation.models ({known}); name one of them")
            require(scale >= 0, f"arena.guidance.{name}={scale:g} is negative; a guidance scale is 0 or more")
        return self


class ProbeConfig(RewardedConfig):
    """What curation and calibration share: a base that draws groups, and the rewards that score them."""

    probe: Probe = Probe()

    @model_validator(mode="after")
    def _probe_fits(self):
        flow, timesteps = self.flow, self.probe.timesteps
        require(self.model.path is not None, "model.path is missing: name the base that draws the images")
        require(
            self.advantage.calibration is None,
            "advantage.calibration belongs to `qirl train`; here weights are advantage.weights, remove it",
        )
        trainable = min(timesteps.trainable(flow.steps), flow.steps - 1)
        require(
            flow.sampler == "ode" or timesteps.count <= trainable,
            f"probe.timesteps.count={timesteps.count} is more than the {trainable} trainable nodes of flow.steps="
            f"{flow.steps}; use {trainable} or fewer, as policy.timesteps of the training",
        )
        return self


class CurateConfig(ProbeConfig):
    """`qirl curate`: which prompts the base model can learn from, by the range of its rewards."""

    curate: Curate = Curate()


class CalibrateConfig(ProbeConfig):
    """`qirl calibrate`: reward weights and scale per prompt category."""

    calibrate: Calibrate = Calibrate()

    @model_validator(mode="after")
    def _consistent(self):
        weights, shares = self.advantage.weights or self.advantage.category_weights, self.calibrate.shares
        shares = shares or self.calibrate.category_shares
        if self.calibrate.method == "table":
            require(
                not shares, "calibrate.shares belongs to method calibrated; the table's weights are advantage.weights"
            )
        else:
            require(not weights, "advantage.weights belongs to method table; calibrated takes calibrate.shares")
        for section, own in (("shares", self.calibrate.shares), *self.calibrate.category_shares.items()):
            for name, value in own.items():
                require(value >= 0, f"the wanted share {section}.{name}={value} is negative; shares are 0 or more")
        return self


class RewardConfig(Section):
    """`qirl reward train`: a vision-language model learns to score images from 1 to 5."""

    run: Run = Run()
    judge: Judge = Judge()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _consistent(self):
        j = self.judge
        require(j.path is not None, "judge.path is missing: name the model folder that learns to judge")
        require(j.records is not None, "judge.records is missing: name the .jsonl file of rated images")
        require(
            j.per_prompt <= j.micro and j.per_prompt <= j.batch,
            f"judge.per_prompt={j.per_prompt} records of a prompt do not fit judge.micro={j.micro} and judge.batch="
            f"{j.batch}; raise those, or use {min(j.micro, j.batch)} or fewer",
        )
        require(
            j.loss != "pairwise" or j.per_prompt > 1,
            "judge.loss=pairwise compares records of one prompt; set judge.per_prompt to 2 or more",
        )
        require(
            self.optimizer.ema == 0,
            f"optimizer.ema={self.optimizer.ema}: a judge keeps no average of its weights; use 0",
        )
        return self


class CategoriseConfig(Section):
    """`qirl categorise`: a vision-language model names the category of every prompt."""

    categorise: Categorise = Categorise()

    @model_validator(mode="after")
    def _can_ask(self):
        c = self.categorise
        require(len(c.servers) > 0, "categorise.servers is empty: name a server, such as [http://127.0.0.1:8000/v1]")
        require(c.model is not None, "categorise.model is missing: the model's name on the servers")
        require(
            len(c.categories) > 1,
            f"categorise.categories has {len(c.categories)} of them; give two or more, such as people: persons are the subject",
        )
        for name, text in c.categories.items():
            fine = all(part.strip() == part != "" and "\n" not in part for part in (name, text))
            require(fine, f"categorise.categories: '{name}' needs a name and a description of one line each")
        return self


class ServeConfig(Section):
    """`qirl reward serve | score | check`: rewards without a training run."""

    rewards: dict[str, RewardOptions] = REWARDS
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _consistent(self):
        require(len(self.rewards) > 0, "rewards is empty: name a reward, such as rewards.text.kind=judge")
        loopback = self.serve.host in ("localhost", "::1") or self.serve.host.startswith("127.")
        require(
            loopback or self.serve.token_variable is not None,
            f"serve.host={self.serve.host} is open to others: set serve.token_variable to an environment variable with a "
            "token, or use 127.0.0.1",
        )
        return self


KINDS = {
    "pretrain": PretrainConfig, "train": TrainConfig, "distill": DistillConfig, "evaluate": EvaluateConfig,
    "curate": CurateConfig, "calibrate": CalibrateConfig, "reward": RewardConfig,
    "categorise": CategoriseConfig, "serve": ServeConfig,
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
