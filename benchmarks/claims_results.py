"""The numbers that the arms left behind. What is not there (yet) is None, so that a table of half a study can be made."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from claims_arms import BASE_SCALES, QUARTERS, Seed, scope_guidance

from qirl.evaluation.arena import ahead


class Number(NamedTuple):
    """A value and half the width of its 95 % interval (NaN where there is none)."""

    value: float
    half: float = math.nan

    def __str__(self) -> str:
        if isinstance(self.value, int):  # a count
            return str(self.value)
        if not math.isfinite(self.half):
            return f"{self.value:.3f}" if abs(self.value) >= 0.01 or not self.value else f"{self.value:.2g}"
        return f"{self.value:.3f} ± {self.half:.3f}"


Getter = Callable[["Results"], "Number | None"]


def minus(a: Number | None, b: Number | None) -> Number | None:
    """a - b, its interval as if the two were independent. On shared prompts and noise that is too wide, not too narrow."""
    return None if a is None or b is None else Number(a.value - b.value, math.hypot(a.half, b.half))


def mean(numbers: Sequence[Number | None]) -> Number | None:
    """The mean over seeds; half is their standard deviation."""
    values = [number.value for number in numbers if number is not None]
    if not values:
        return None
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
        return _number(self._task(name, task, guidance).get("judge_accuracy"))

    def component(self, name: str, task: str, guidance: float, component: str) -> Number | None:
        return _number(self._task(name, task, guidance).get("rewards", {}).get(component))

    def reward(self, name: str, task: str, guidance: float) -> Number | None:
        """The trained rewards of held-out prompts, weighted as in the task's recipe; its interval is at most that wide."""
        found = self._task(name, task, guidance).get("rewards", {})
        weights = self.seed.recipe(task).advantage.weights
        parts = [(weights.get(key, 1.0), _number(own)) for key, own in found.items()]
        total = sum(weight for weight, part in parts if part)
        if not total:
            return None
        return Number(*(sum(w * part[i] for w, part in parts if part) / total for i in (0, 1)))

    def _task(self, name: str, task: str, guidance: float) -> dict:
        return self.evaluation(name).get(f"{guidance:g}", {}).get("by_task", {}).get(task, {})

    def best(self, measure: str, task: str) -> tuple[float, Number] | None:
        """(scale, value) of the base at the scale at which it is best in "judge" or "reward" of a task."""
        found = [(scale, getattr(self, measure)("base", task, scale)) for scale in BASE_SCALES]
        found = [(scale, value) for scale, value in found if value is not None]
        return max(found, key=lambda own: own[1].value, default=None)

    def best_base(self, measure: str, task: str) -> Number | None:
        found = self.best(measure, task)
        return found and found[1]

    def scope(self) -> float:
        return scope_guidance(self.seed.recipe("t2i"))

    def rollout(self, task: str) -> float:
        return self.seed.guidance(task)

    def fact(self, name: str, key: str) -> Number | None:
        """ "steps", "flops" or "seconds" of an arm's run."""
        value = self._done(self.seed.alias(name)).get(key)
        return None if value is None else Number(value)

    def kl(self, name: str) -> Number | None:
        """The squared distance of velocities to the frozen base in the last ten training steps, as the run logs it."""
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


def _number(entry: dict | None) -> Number | None:
    if entry is None or entry.get("value") is None:
        return None
    wide = entry.get("low") is None or entry.get("high") is None
    return Number(entry["value"], math.nan if wide else (entry["high"] - entry["low"]) / 2)
