"""One picture a claim: dots are seeds with their 95 % intervals, bars the mean; claim 2 over the steps of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from claims_list import Claim
from claims_results import Results
from claims_tables import numbers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"reward": "#c44e52", "judge": "#4c72b0"}


def plot(number: int, claim: Claim, results: Sequence[Results], path: Path) -> None:
    """Writes PATH (.png). Arms without a number have an empty place."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    (_tracks if number == 2 else _bars)(figure, claim, results)
    figure.suptitle(claim.title)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(figure: Figure, claim: Claim, results: Sequence[Results]) -> None:
    """The judge's numbers of every arm, one panel for each of its scales or tasks."""
    panels = list(dict.fromkeys(row.measured for row in claim.rows if row.measured.startswith("judge")))
    for axes, measured in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        rows = [row for row in claim.rows if row.measured == measured]
        for place, row in enumerate(rows):
            found = [own for own in numbers(results, row.get) if own is not None]
            if found:
                axes.bar(place, sum(own.value for own in found) / len(found), color=COLOURS["judge"], alpha=0.4)
            for k, own in enumerate(found):
                apart = place + 0.25 * (k - (len(found) - 1) / 2)
                axes.errorbar(apart, own.value, own.half, fmt="o", color=COLOURS["judge"], markersize=4, linewidth=1)
        axes.set_xticks(range(len(rows)), [row.arm for row in rows], rotation=40, ha="right", fontsize=8)
        axes.set_title(f"held-out {measured}", fontsize=10)
        axes.grid(axis="y", alpha=0.3)


def _tracks(figure: Figure, claim: Claim, results: Sequence[Results]) -> None:
    """Trained reward and judge over the steps, a line per seed."""
    names = {"t2i": "the recipe's nodes", "all_nodes": "all nodes"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        for measure, place in (("reward", 1), ("judge", 2)):
            for i, r in enumerate(results):
                points = [(p[0], p[place].value) for p in r.track(name) if p[place] is not None]
                label = f"{'trained reward' if place == 1 else 'held-out judge'}" if i == 0 else None
                axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=COLOURS[measure],
                          alpha=0.7, markersize=3, label=label)  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
