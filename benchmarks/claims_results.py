"""The numbers that the arms left behind. What is not there (yet) is None, so that a table of half a study can be made."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from claims_arms import QUARTERS, Seed, scope_guidance

from qirl.evaluation.arena import ahead
from qirl.evaluation.statistics import interval

By = Mapping[tuple[int, int], float]  # (prompt, how often it came before): the mean over its images


@dataclass(frozen=True)
class Number:
    """A value and half the width of its 95 % interval (NaN where there is none); of a mean over prompts, what each gave."""

    value: float
    half: float = math.nan
    by: By = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def over(cls, by: By) -> Number:
        """The mean, its interval clustered by prompt."""
        own = interval(np.array(list(by.values())), np.array([prompt for prompt, _ in by]))
        return cls(own["value"], (own["high"] - own["low"]) / 2, by)

    def __str__(self) -> str:
        if isinstance(self.value, int):  # a count
            return str(self.value)
        if not math.isfinite(self.half):
            return f"{self.value:.3f}" if abs(self.value) >= 0.01 or not self.value else f"{self.value:.2g}"
        return f"{self.value:.3f} ± {self.half:.3f}"


Getter = Callable[["Results"], "Number | None"]


def minus(a: Number | None, b: Number | None, times: float = 1.0) -> Number | None:
    """a - times * b; paired, for both answered the same prompts from the same noise. Without prompts there is no interval."""
    if a is None or b is None:
        return None
    if a.by and a.by.keys() == b.by.keys():
        return Number.over({key: value - times * b.by[key] for key, value in a.by.items()})
    return Number(a.value - times * b.value)


def mean(numbers: Sequence[Number | None]) -> Number | None:
    """The mean over seeds; half is their standard deviation."""
    values = [number.value for number in numbers if number is not None]
    if not values:
        return None
    if len(set(values)) == 1 and isinstance(values[0], int):
        return Number(values[0])
    return Number(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


class Results:
    """What one seed found."""

    def __init__(self, seed: Seed, arms: dict[str, dict]):
        self.seed, self.known = seed, arms

    def _json(self, path: Path) -> dict:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return {}

    def _done(self, name: str) -> dict:
        own = self.known.get(f"{self.seed.folder.name}/{name}", {})
        return own if own.get("done") else {}

    def evaluation(self, name: str) -> dict[str, dict]:
        """{guidance: results} of an arm."""
        name = self.seed.alias(name)
        done = self._done(f"eval_{name}")
        return self._json(self.seed.path(name) / "evaluation.json").get("guidance", {}) if done else {}

    def judge(self, name: str, task: str, guidance: float) -> Number | None:
        """The held-out judge's share of right images."""
        return self.component(name, task, guidance, "judge_accuracy")

    def component(self, name: str, task: str, guidance: float, component: str) -> Number | None:
        """Of the prompts that the component applies to."""
        by = {key: own[component] for key, own in self._prompts(name, task, guidance).items() if component in own}
        return Number.over(by) if by else None

    def reward(self, name: str, task: str, guidance: float) -> Number | None:
        """The trained rewards of held-out prompts: of each prompt those that apply, weighted as in the task's recipe."""
        weights = self.seed.recipe(task).advantage.weights
        by = {}
        for key, own in self._prompts(name, task, guidance).items():
            parts = [(weight, own[component]) for component, weight in weights.items() if component in own]
            if total := sum(weight for weight, _ in parts):
                by[key] = sum(weight * value for weight, value in parts) / total
        return Number.over(by) if by else None

    def _prompts(self, name: str, task: str, guidance: float) -> dict[tuple[int, int], dict[str, float]]:
        """What every prompt of a task gave, by (prompt, how often it came before)."""
        table = self.evaluation(name).get(f"{guidance:g}", {}).get("by_prompt", {"id": [], "task": []})
        seen: Counter[int] = Counter()
        found = {}
        for place, (prompt, own) in enumerate(zip(table["id"], table["task"], strict=True)):
            if own == task:
                values = {k: column[place] for k, column in table.items() if k not in ("id", "task")}
                found[prompt, seen[prompt]] = {k: value for k, value in values.items() if value is not None}
                seen[prompt] += 1
        return found

    def best(self, measure: str, task: str) -> tuple[float, Number] | None:
        """(scale, value) of the base at the scale at which it is best in "judge" or "reward" of a task."""
        found = [(scale, getattr(self, measure)("base", task, scale)) for scale in self.seed.scales("base")]
        found = [(scale, value) for scale, value in found if value is not None]
        return max(found, key=lambda own: own[1].value, default=None)

    def best_base(self, measure: str, task: str) -> Number | None:
        found = self.best(measure, task)
        return found and found[1]

    def best_scale(self, measure: str, task: str) -> Number | None:
        found = self.best(measure, task)
        return found and Number(found[0])

    def scope(self) -> float:
        return scope_guidance(self.seed.recipe("t2i"))

    def rollout(self, task: str) -> float:
        return self.seed.guidance(task)

    def fact(self, name: str, key: str) -> Number | None:
        """A fact of an arm's run, such as "steps"."""
        value = self._done(self.seed.alias(name)).get(key)
        return None if value is None else Number(value)

    def kl(self, name: str) -> Number | None:
        """The squared distance of velocities to the frozen base in the last ten training steps, as the run logs it."""
        if not self._done(self.seed.alias(name)):
            return None
        try:
            lines = (self.seed.path(name) / "metrics.jsonl").read_text().splitlines()[-10:]
            values = [record["kl"] for record in map(json.loads, lines) if record.get("kl") is not None]
        except (OSError, ValueError):
            values = []
        return Number(statistics.fmean(values)) if values else None

    def drift(self, name: str) -> Number | None:
        """The squared distance of conditional velocities to the base, over the base's mean square."""
        own = self._json(self.seed.path(name) / "drift.json")
        return Number(own["relative"]) if own and self._done(f"drift_{self.seed.alias(name)}") else None

    def elo(self, scope: str, name: str) -> tuple[float, float, float] | None:
        """(rating, low, high) of a player, "overall" or on one task."""
        row = self._arena(scope).get("elo", {}).get(name)
        return row and (row["rating"], row["low"], row["high"])

    def elo_ahead(self, scope: str, a: str, b: str) -> dict | None:
        """By how many points `a` is ahead of `b`: {"value", "low", "high"}, paired by prompt."""
        found = self._arena(scope).get("differences")
        return ahead(found, a, b) if found else None

    def _arena(self, scope: str) -> dict:
        found = self._json(self.seed.path("arena") / "arena.json").get("arena") or {} if self._done("arena") else {}
        return found if scope == "overall" else found.get("by_task", {}).get(scope, {})

    def playing(self, name: str) -> float | None:
        return self._arena("overall").get("guidance", {}).get(name)

    def track(self, name: str) -> list[tuple[int, Number | None, Number | None]]:
        """(step, reward, judge) of an arm's checkpoints, from the base to its end, at the rollout's guidance."""
        places = [("base", Number(0))]
        places += [(f"{name}_quarter_{k}", self.fact(f"{name}_quarter_{k}", "steps")) for k in QUARTERS]
        places += [(name, self.fact(name, "steps"))]
        scale = self.seed.guidance(name)
        return [
            (int(step.value), self.reward(own, "t2i", scale), self.judge(own, "t2i", scale))
            for own, step in places
            if step is not None
        ]
