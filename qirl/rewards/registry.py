"""From the options in a config to rewards: a kind's class is imported when it is asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from qirl.config_rewards import PythonOptions, Remote, RewardOptions, ServerOptions
from qirl.errors import UserError
from qirl.rewards.protocol import Reward, name_of

# classes that take (name, options)
KINDS = {
    "judge": "qirl.rewards.vlm.reward:JudgeReward",
    "server": "qirl.rewards.client:ServerReward",
    "clip_score": "qirl.rewards.parts.embedding:ClipScore",
    "pick_score": "qirl.rewards.parts.embedding:PickScore",
    "hps_v2": "qirl.rewards.parts.preference:HpsV2",
    "hps_v3": "qirl.rewards.parts.hps_v3:HpsV3",
    "image_reward": "qirl.rewards.parts.preference:ImageReward",
    "aesthetic": "qirl.rewards.parts.embedding:Aesthetic",
    "similarity": "qirl.rewards.parts.embedding:Similarity",
    "outside": "qirl.rewards.parts.pixels:Outside",
    "artifacts": "qirl.rewards.parts.pixels:Artifacts",
    "diversity": "qirl.rewards.parts.pixels:Diversity",
    "ocr": "qirl.rewards.parts.ocr:Ocr",
    "face_identity": "qirl.rewards.parts.faces:FaceIdentity",
}


def rewards_of(config, data, given: Sequence[Reward] = ()) -> list[Reward]:
    """What scores a run: the callables given to it, else `rewards` of its config, else the digits' own.

    Raises UserError where other data is scored by nothing.
    """
    found = list(given) or build(config.rewards, config.run.device)
    if not found and data.name != "digits":
        raise UserError(
            "no reward is named: add some under `rewards` in the config (`qirl options train rewards` lists their kinds), or "
            "give callables to qirl.train"
        )
    return found or own_rewards(data.task)


def own_rewards(task: str) -> list[Reward]:
    """The digits' rewards for a task of theirs, trained on their own part of the data on first use and cached."""
    from qirl.rewards.digits import DigitRewards, reward_reader
    from qirl.rewards.edits import EditRewards
    from qirl.rewards.glyphs import reward_embedding
    from qirl.run.cache import folder

    reader = reward_reader(folder())
    drawing = [DigitRewards(reader)] if task != "edit" else []
    return drawing + ([EditRewards(reader, reward_embedding(folder()))] if task != "t2i" else [])


def identity(options: Mapping[str, RewardOptions]) -> dict:
    """The rewards of a config as plain data, apart from where and how patiently those are asked that may be elsewhere."""
    where = {*Remote.model_fields, "device"}
    return {
        name: own.model_dump(mode="json", exclude=where if isinstance(own, Remote) else None)
        for name, own in options.items()
    }


def build(options: Mapping[str, RewardOptions], device: str = "auto") -> list[Reward]:
    """The rewards of a config, in its order. device: where those run whose own is "auto", as `run.device`.

    Raises UserError for one that cannot be had (a package, weights, a server, a function), and for a component that two
    of them return.
    """
    rewards = [_build(name, _placed(own, device)) for name, own in options.items()]
    owners: dict[str, str] = {}
    for name, reward in zip(options, rewards, strict=True):
        for component in getattr(reward, "components", ()):
            if component in owners:
                raise UserError(
                    f"rewards.{owners[component]} and rewards.{name} both return the component '{component}'; rename or "
                    "remove one"
                )
            owners[component] = name
    return rewards


def _placed(options: RewardOptions, device: str) -> RewardOptions:
    auto = getattr(options, "device", None) == "auto"
    return options.model_copy(update={"device": device}) if auto else options


def _build(name: str, options: RewardOptions) -> Reward:
    if isinstance(options, PythonOptions):
        reward = _load(options.target, f"rewards.{name}.target={options.target}")
        return reward if options.range is None else _ranged(reward, options.range)
    reward = _load(KINDS[options.kind], f"rewards.{name}")(name, options)
    if isinstance(options, ServerOptions):
        reward.range = options.range
    return reward


def _ranged(reward: Reward, bounds: tuple[float, float]) -> Reward:
    """`reward` with a range of its own: the function itself may stand in a config twice."""
    own = functools.partial(reward)
    own.__dict__.update(getattr(reward, "__dict__", {}), __name__=name_of(reward), range=bounds)
    return own


def _file(path: str):
    """The module of a file that need not be importable."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(target: str, what: str):
    module, _, attribute = target.rpartition(":")
    try:
        return getattr(_file(module) if module.endswith(".py") else importlib.import_module(module), attribute)
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or error}); check the path") from None
    except ImportError as error:
        raise UserError(f"{what} cannot be imported ({error}); install it, or mend the name") from None
    except AttributeError:
        raise UserError(f"{what}: {module} has no {attribute}") from None
