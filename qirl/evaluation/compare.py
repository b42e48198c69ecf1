"""Evaluation of several models: the same prompts and noise for all, and an arena in which every two of them battle.

In a battle the judge sees what two models drew for one prompt from one noise. It is the held-out judge that measures each
model alone, too; `pairwise_from_scores` makes it choose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qirl.config import EvaluateConfig, to_dict
from qirl.errors import UserError
from qirl.evaluation.arena import arena, arena_by_task, pairwise_from_scores, play
from qirl.evaluation.evaluate import Exam, check, evaluation_key, keep_results, known_results, out_folder, scan
from qirl.evaluation.measure import judge_score
from qirl.rewards.protocol import Reward
from qirl.run.cache import content_key
from qirl.run.folder import check_writable, write_json

MARGIN = 0.05  # of the judge's score, 0 to 1: two pictures that it is about as sure of are a tie


def compare(config: EvaluateConfig, rewards: Sequence[Reward] = (), quiet: bool = False) -> dict:
    """{"models": {name: {guidance: results}}, "arena": None or `arena`'s ratings, the same of each task alone
    ("by_task") and the "guidance" of each player}.

    Also written to arena.json in config.run.out; each model's evaluation.json goes into its own run folder. What an earlier
    evaluation of the same models by the same config found is used, not drawn again. Raises UserError as `evaluate` does,
    for every model before the first one is drawn.
    """
    if "out" not in config.run.model_fields_set:
        raise UserError("run.out is missing: several models are compared in a folder of its own; name it with --out")
    out = Path(config.run.out)
    own = {name: config_of(config, name) for name in config.evaluation.models}
    for one in own.values():
        check(one)
    for folder in (out, *map(out_folder, own.values())):
        check_writable(folder)
    key = content_key({name: evaluation_key(one, rewards) for name, one in own.items()}, _plays(config))
    found = _known(out / "arena.json", key)
    if found is None:
        found = _compare(config, own, rewards, quiet)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "arena.json", {"key": key, "paths": dict(config.evaluation.models)} | found)
    return found


def config_of(config: EvaluateConfig, name: str) -> EvaluateConfig:
    """The evaluation of one of config.evaluation.models alone, at the arena's scale as well where there are battles."""
    values = config.model_dump(exclude_unset=True)
    scales = [*config.evaluation.guidance, *([scale_of(config, name)] if config.arena.battles else [])]
    values["model"] = values.get("model", {}) | {"path": config.evaluation.models[name], "revision": None}
    values["evaluation"] = values["evaluation"] | {"models": {}, "guidance": tuple(dict.fromkeys(scales))}
    values["run"] = {k: v for k, v in values.get("run", {}).items() if k != "out"}
    return EvaluateConfig.model_validate({k: v for k, v in values.items() if k != "arena"})


def scale_of(config: EvaluateConfig, name: str) -> float:
    """The guidance scale at which a model plays."""
    return config.arena.guidance.get(name, config.evaluation.guidance[0])


def _compare(config: EvaluateConfig, own: dict[str, EvaluateConfig], rewards: Sequence[Reward], quiet: bool) -> dict:
    exam = Exam.of(config, rewards)
    models: dict[str, dict] = {}
    shown: dict[str, list] = {}
    for name, one in own.items():
        known = known_results(one, rewards)
        todo = [] if known else list(one.evaluation.guidance)
        playing = scale_of(config, name) if config.arena.battles else None
        todo += [playing] if config.arena.battles and playing not in todo else []
        fresh = {}
        for guidance, images, results in scan(one, exam, todo, quiet) if todo else ():
            fresh[f"{guidance:g}"] = results
            if guidance == playing:
                shown[name] = images
        if not known:
            keep_results(one, fresh, rewards)
        models[name] = known or fresh
    return {"models": models, "arena": _battles(config, exam, shown) if config.arena.battles else None}


def _battles(config: EvaluateConfig, exam: Exam, shown: dict[str, list]) -> dict:
    options = config.arena
    prompts = [p for p, _ in exam.prompts]
    battles = play(shown, prompts, pairwise_from_scores(judge_score(exam.judge), MARGIN))
    anchor = options.anchor if options.anchor is not None else next(iter(shown))
    rated = (anchor, options.rating, options.resamples, config.evaluation.seed)
    found = arena(battles, *rated) | {"by_task": arena_by_task(battles, prompts, *rated)}
    return found | {"guidance": {name: scale_of(config, name) for name in shown}}


def _plays(config: EvaluateConfig) -> dict:
    """What of a config matters to a comparison beside its models' evaluations."""
    return to_dict(config)["arena"] | {
        "scales": list(config.evaluation.guidance),
        "names": list(config.evaluation.models),
    }


def _known(path: Path, key: str) -> dict | None:
    try:
        record = json.loads(path.read_text())
        return {part: record[part] for part in ("models", "arena")} if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of another version: compared again
        return None
