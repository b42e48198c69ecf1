"""What the rows of the kernel benchmark say: goals met or missed, a Markdown table, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernel_ops import LARGE, OF_COMPILE, OF_FLOOR, OVER_EAGER, Goal

OTHERS = ("eager", "compile", "liger", "diffusers")
COLOURS = dict(zip(OTHERS, ("#8c8c8c", "#4c72b0", "#c44e52", "#55a868"), strict=True))
Place = tuple[str, str, int, int]  # op, pass, tokens, width


def by_place(rows: Sequence[dict]) -> dict[Place, dict[str, dict]]:
    """Rows by what was computed, then by who computed it, in the order of the rows."""
    places: dict[Place, dict[str, dict]] = {}
    for row in rows:
        places.setdefault((row["op"], row["pass"], row["tokens"], row["width"]), {})[row["implementation"]] = row
    return places


def misses(own: Mapping[str, dict], goal: Goal, copy: float, launch_ms: float) -> list[str]:
    """The goals that qirl misses at one place, each with its number; copy in GB/s."""
    ours, missed = own["qirl"], []
    share = getattr(goal, ours["pass"])
    if ours["bytes"] >= LARGE:
        if ours["of_copy"] < share:
            missed.append(f"{ours['of_copy']:.0%} of copy, goal {share:.0%}")
    else:
        floor = launch_ms + ours["bytes"] / copy / 1e6
        if ours["ms_p50"] > OF_FLOOR * floor:
            missed.append(f"{ours['ms_p50'] / floor:.2f} x floor, goal {OF_FLOOR}")
    slower = ours["ms_p50"] / own["compile"]["ms_p50"]
    if slower > OF_COMPILE:
        missed.append(f"{slower:.2f} x torch.compile, goal {OF_COMPILE}")
    return missed


def over_eager(rows: Sequence[dict]) -> float:
    """Geometric mean of eager's time over ours."""
    ratios = [own["eager"]["ms_p50"] / own["qirl"]["ms_p50"] for own in by_place(rows).values()]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def verdict(rows: Sequence[dict], goals: Mapping[str, Goal], copy: float, launch_ms: float) -> list[str]:
    """Every goal that is missed, in words; none where there are no rows to judge."""
    missed = []
    for place, own in by_place(rows).items():
        op, part, tokens, width = place
        missed += [f"{op} {part} {tokens} x {width}: {m}" for m in misses(own, goals[op], copy, launch_ms)]
    if rows and over_eager(rows) < OVER_EAGER:
        missed.append(f"geometric mean over eager {over_eager(rows):.2f}, goal {OVER_EAGER}")
    return missed


def table(rows: Sequence[dict], goals: Mapping[str, Goal], copy: float, launch_ms: float) -> str:
    """Markdown: qirl's time, its share of the copy bandwidth, how many times slower the others are, and the goals."""
    lines = [
        "| op | pass | tokens x width | ms | of copy | eager | torch.compile | Liger | diffusers | goals |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, part, tokens, width), own in by_place(rows).items():
        ours = own["qirl"]
        ratios = [f"{own[name]['ms_p50'] / ours['ms_p50']:.2f}" if name in own else "" for name in OTHERS]
        missed = misses(own, goals[op], copy, launch_ms)
        cells = [op, part, f"{tokens} x {width}", f"{ours['ms_p50']:.4f}", f"{ours['of_copy']:.0%}", *ratios]
        lines.append(f"| {' | '.join(cells)} | {'missed: ' + '; '.join(missed) if missed else 'met'} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], goals: Mapping[str, Goal], title: str, path: Path) -> None:
    """Writes PATH (.png): above, the share of the copy bandwidth; below, how many times slower the others are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = by_place(rows)
    kinds = list(dict.fromkeys((op, part) for op, part, _, _ in places))
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for i, (op, part) in enumerate(kinds):
        own = [r for place, r in places.items() if place[:2] == (op, part)]
        for k, one in enumerate(own):
            x = i + 0.6 * ((k + 0.5) / len(own) - 0.5)
            large = one["qirl"]["bytes"] >= LARGE
            above.plot(x, one["qirl"]["of_copy"], "o", color="#dd8452", fillstyle="full" if large else "none")
            for name in OTHERS:
                if name in one:
                    ratio = one[name]["ms_p50"] / one["qirl"]["ms_p50"]
                    below.plot(x, ratio, "o", color=COLOURS[name], markersize=4)
        above.hlines(getattr(goals[op], part), i - 0.35, i + 0.35, color="#444444")
    above.set_ylabel("share of copy bandwidth")
    above.set_title(
        "filled: 64 MB or more, with its goal as a line; left to right: more tokens, at two widths", fontsize=9
    )
    below.axhline(1, color="#444444", linewidth=1)
    below.set_yscale("log")
    below.set_yticks([0.5, 1, 2, 3, 5, 10], ["0.5", "1", "2", "3", "5", "10"])
    below.minorticks_off()
    below.set_ylabel("times slower than qirl")
    below.set_xticks(range(len(kinds)), [f"{op}\n{part}" for op, part in kinds], rotation=35, ha="right", fontsize=8)
    for name in OTHERS:
        below.plot([], [], "o", color=COLOURS[name], markersize=4, label=name)
    below.legend(fontsize=8, ncols=4)
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
