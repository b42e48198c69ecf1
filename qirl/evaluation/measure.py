"""What images of held-out prompts say about a model: rewards, held-out judge, diversity, artifacts, each with its interval.

Errors and 95 % intervals are over prompts: images of one prompt are not independent. Where training raises its own rewards
and the judge does not follow, diversity falls or artifacts rise, the model learns to please the reward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from qirl.config_sections import Scoring
from qirl.data.prompts import Prompt
from qirl.data.words import parse
from qirl.evaluation.artifacts import periodic_peak
from qirl.evaluation.diversity import in_group_diversity
from qirl.evaluation.statistics import interval, mean_and_error
from qirl.rewards.protocol import Sample, Scores
from qirl.rewards.scorer import score

LEADING = ("digit", "instruction")  # the reward components that ask for the same as the judge; the gap is to them
CALL = 32  # images that rewards score in one call: whole prompts, as many as fit and at least one
APART = ("judge_accuracy", "diversity", "artifacts", "gap")  # beside the rewards


def measure(
    images: Sequence[Sequence[np.ndarray]], prompts: Sequence[Prompt], rewards, judge, scoring: Scoring | None = None
) -> dict:
    """The results of one guidance scale; images uint8 [H, W, 3], the same number for each prompt (which may come again).

    {"judge_accuracy", "diversity", "artifacts" (dB), "gap": mean, and each with _se: its standard error,
    "rewards", "rewards_se": {component: ...}, "failed": {component: share of its images that could not be scored, where
    there are any}, "judge_by_category", "pairs": images,
    "judge_attributes": share with the right ink and paper, of text-to-image and where the judge reads them,
    "by_task", "by_category": {name: {"judge_accuracy", ..., "rewards": {component}: {"value", "low", "high"}}},
    "by_prompt": {"id", "task", and each number: [P] means over a prompt's images, None where it does not apply}}
    gap: the leading reward (digit, for edits instruction) minus the judge; judge: None for none. What applies to no prompt is absent or NaN.
    A component that is called like a number of ours has " (reward)" behind its name. scoring: how patiently rewards are
    asked.
    """
    samples = [sample for place, prompt in enumerate(prompts) for sample in samples_of(prompt, images[place], place)]
    scores = _scores(samples, len(images[0]), rewards, scoring)
    values = _values(images, samples, scores, judge)
    clusters = np.array([p.id for p in prompts])
    result: dict = {"rewards": {}, "rewards_se": {}}
    for name, own in values.items():
        applies = ~np.isnan(own)
        mean, error = mean_and_error(own[applies], clusters[applies]) if applies.any() else (np.nan, np.nan)
        if name in APART:
            result |= {name: mean, f"{name}_se": error}
        else:
            result["rewards"][name], result["rewards_se"][name] = mean, error
    for table, of in (("by_task", lambda p: p.task), ("by_category", lambda p: p.category)):
        result[table] = _table(values, clusters, [of(p) for p in prompts])
    result["by_prompt"] = {"id": clusters.tolist(), "task": [p.task for p in prompts]}
    for name, own in values.items():
        result["by_prompt"][name] = [None if np.isnan(x) else round(float(x), 4) for x in own]
    result["judge_by_category"] = {
        c: own["judge_accuracy"]["value"] for c, own in result["by_category"].items() if "judge_accuracy" in own
    }
    drawn = [s for s in samples if s.task == "t2i"]
    if drawn and hasattr(judge, "attributes_correct"):
        specs = [parse(s.prompt) for s in drawn]
        result["judge_attributes"] = float(judge.attributes_correct(np.stack([s.image for s in drawn]), specs).mean())
    return result | {"failed": _failed(scores), "pairs": len(samples)}


def samples_of(prompt: Prompt, images: Sequence[np.ndarray], place: int = 0) -> list[Sample]:
    """The images of one prompt as a reward or a judge takes them; place: of the prompt among others."""
    first = place * len(images)
    return [Sample.of(first + g, prompt, image) for g, image in enumerate(images)]


def judge_score(judge) -> Callable[[Sequence[Sample]], np.ndarray]:
    """What the judge gives battles to compare: its finer `score` where it has one, else right or wrong."""
    return getattr(judge, "score", judge.correct)


def _scores(samples: Sequence[Sample], group: int, rewards, scoring: Scoring | None) -> list[Scores]:
    """Per sample its components, " (reward)" behind the name of one that a number of ours has, too."""
    rows = score(rewards, samples, scoring, group * max(1, CALL // group))
    return [{f"{name} (reward)" if name in APART else name: value for name, value in row.items()} for row in rows]


def _failed(scores: Sequence[Scores]) -> dict[str, float]:
    """{component: share of the samples that it applies to and could not be scored}, of those with any."""
    applied, failed = Counter(), Counter()
    for row in scores:
        applied.update(row.keys())
        failed.update(name for name, value in row.items() if math.isnan(value))
    return {name: count / applied[name] for name, count in sorted(failed.items())}


def _values(
    images: Sequence[Sequence[np.ndarray]], samples: Sequence[Sample], scores: Sequence[Scores], judge
) -> dict[str, np.ndarray]:
    """Per number that is reported, its mean over each prompt's images [P]; NaN where it does not apply or failed."""
    shape = len(images), len(images[0])
    correct = (
        np.asarray(judge.correct(samples), dtype=float).reshape(shape).mean(1) if judge else np.full(shape[0], np.nan)
    )
    components = sorted({name for own in scores for name in own})
    read = {name: _means(np.array([s.get(name, np.nan) for s in scores]).reshape(shape)) for name in components}
    leading = np.full(len(images), np.nan)
    for name in LEADING:
        leading = np.where(np.isnan(leading), read.get(name, np.nan), leading)
    return {
        "judge_accuracy": correct,
        "diversity": np.array([in_group_diversity(np.stack(own)) for own in images]),
        "artifacts": np.array([periodic_peak(np.stack(own)) for own in images]),
        "gap": leading - correct,
    } | read


def _means(values: np.ndarray) -> np.ndarray:
    """Row means of what is not NaN, NaN for an empty row."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def _table(values: dict[str, np.ndarray], clusters: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    """The numbers of each of `names` [P], with their intervals."""
    table = {}
    for name in sorted(set(names)):
        member = np.array([own == name for own in names])
        rows = {"rewards": {}}
        for what, own in values.items():
            applies = member & ~np.isnan(own)
            if applies.any():
                (rows if what in APART else rows["rewards"])[what] = interval(own[applies], clusters[applies])
        table[name] = rows
    return table
