"""The Python face of the commands: `qirl.train(config, rewards=[fn])` and its siblings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qirl import config as configuration
from qirl.paths import find_config
from qirl.rewards.protocol import Reward

Source = str | Path | dict | configuration.Section | None


def load_config(kind: str, source: Source = None, **overrides: Any) -> configuration.Section:
    """The checked config of a run of `kind` (a key of qirl.config.KINDS, such as "train").

    source: a YAML file or the name of a shipped one ("digits/t2i"), a dict, a config, or None for the defaults;
    overrides: `policy__group=16` or `**{"policy.group": 16}`. Raises UserError as `qirl.config.load` does.
    """
    if isinstance(source, configuration.Section):
        source = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, (str, Path)):
        source = find_config(source)
    return configuration.load(kind, source, [f"{k.replace('__', '.')}={_text(v)}" for k, v in overrides.items()])


def _text(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _that_fits(kind: str, source: Source, overrides: dict[str, Any]) -> configuration.Section:
    """The config of a training run. Raises UserError where it needs more than a GPU has, before any weight is read."""
    from qirl.parallel.data import world_size
    from qirl.plan import refuse_too_large

    config = load_config(kind, source, **overrides)
    refuse_too_large(config, world_size())
    return config


def pretrain(config: Source = None, quiet: bool = False, **overrides: Any) -> Path:
    """Trains a base model; returns its model folder. See `qirl pretrain`."""
    from qirl.pretraining import pretrain as run

    return run(_that_fits("pretrain", config, overrides), quiet).folder.path / "model"


def train(config: Source, rewards: Sequence[Reward] = (), quiet: bool = False, **overrides: Any) -> Path:
    """Reinforcement learning of config.model.path against `rewards` (none: the world's own); returns the model folder.

    A reward takes a list of `qirl.rewards.protocol.Sample` and returns one {component: score}, or one number, per sample.
    """
    from qirl.policy.trainer import train as run

    return run(_that_fits("train", config, overrides), rewards, quiet).folder.path / "model"


def train_judge(config: Source, quiet: bool = False, **overrides: Any) -> Path:
    """Teaches a vision-language model to score images; returns its model folder. See `qirl reward train`."""
    from qirl.rewards.vlm.training import train_judge as run

    return run(load_config("reward", config, **overrides), quiet).folder.path / "model"


def categorise(
    config: Source, prompts: str | Path, out: str | Path | None = None, quiet: bool = False, **overrides: Any
) -> Path:
    """Writes a prompt file in which a vision-language model has named the categories; returns it. See `qirl categorise`."""
    from qirl.curation.categorise import categorise as run

    return run(load_config("categorise", config, **overrides), prompts, out, quiet)


def curate(config: Source, rewards: Sequence[Reward] = (), quiet: bool = False, **overrides: Any) -> Path:
    """Probes the candidate prompts and keeps those that teach; returns the prompt file. See `qirl curate`.

    rewards: as for `train`. ledger.jsonl, beside the prompt file, has all scores and the reason of every decision.
    """
    from qirl.curation.curate import curate as run

    return run(load_config("curate", config, **overrides), rewards, quiet)


def calibrate(config: Source, rewards: Sequence[Reward] = (), quiet: bool = False, **overrides: Any) -> Path:
    """Reward weights and scale per category from a probe; returns calibration.json. See `qirl calibrate`.

    rewards: as for `train`; a ledger of `curate` (calibrate.ledger) needs none.
    """
    from qirl.curation.calibrate import calibrate as run

    return run(load_config("calibrate", config, **overrides), rewards, quiet)


def distill(config: Source, quiet: bool = False, **overrides: Any) -> Path:
    """Teaches one student from the config's teachers; returns its model folder. See `qirl distill`."""
    from qirl.distillation.trainer import distill as run

    return run(_that_fits("distill", config, overrides), quiet).folder.path / "model"


def evaluate(config: Source, rewards: Sequence[Reward] = (), quiet: bool = False, **overrides: Any) -> dict:
    """Scores a model on held-out prompts; returns {guidance: results}. See `qirl evaluate`.

    rewards: as for `train`; results of callables are not kept for a later evaluation. With evaluation.models: {"models":
    {name: {guidance: results}}, "arena": ratings or None}, see `compare`.
    """
    loaded = load_config("evaluate", config, **overrides)
    if loaded.evaluation.models:
        from qirl.evaluation.compare import compare

        return compare(loaded, rewards, quiet)
    from qirl.evaluation.evaluate import evaluate as run

    return run(loaded, rewards, quiet)


def sample(model: str | Path, prompts: Sequence[str], **options: Any):
    """Draws one image per prompt: uint8 [n, H, W, 3]. See `qirl sample` for the options."""
    from qirl.evaluation.evaluate import sample as run

    return run(str(model), list(prompts), **options)
