"""report.html: a run, or several stages of one, on a single page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from qirl.run import plots, probes
from qirl.run.folder import RunFolder, write_bytes
from qirl.run.logs import read

# title, key, what the reader should know, options of `plots.panel`
_HEALTH = (
    ("Loss", "loss", "", {}),
    ("Gradient norm", "grad_norm", "before clipping; × marks a skipped update", {"log": True}),
    ("KL to the reference", "kl", "", {}),
    (
        "Clip fraction",
        "clip_fraction",
        "share of (sample, node) pairs whose ratio was clipped",
        {"span": 0.02},
    ),
    ("|log ratio|", "log_ratio_abs", "mean", {}),
    ("|advantage|", "advantage_abs", "mean", {"span": 0.1}),
    ("In-group range", "range", "of the composite reward, mean over groups", {"span": 0.1}),
    ("Valid pairs", "valid_pairs", "(sample, node) pairs in an update", {"span": 2}),
    ("Groups without signal", "zero_signal_groups", "all samples scored alike", {"span": 2}),
    ("Copies", "copies", "share of edits that return their source", {"span": 0.1}),
    ("Dropped samples", "dropped_samples", "scoring failed", {"span": 2}),
    ("Learning rate", "lr", "", {}),
)


def write_report(out: str | Path, runs: Mapping[str, str | Path], summary: Mapping[str, Any] | None = None) -> Path:
    """Writes one self-contained HTML page about the run folders in `runs` (stage name to path).

    out: the file, or the folder for its report.html. summary: the content of summary.json, or None. Samples,
    groups, config and summary may be missing, metrics may have any number of steps; a curation or a calibration gets a
    table. Returns the file's path. Raises UserError if another run has no metrics.jsonl, or a broken one.
    """
    out = Path(out)
    out = out / "report.html" if out.is_dir() else out
    probed = [_probe(name, path) for name, path in runs.items() if probes.is_probe(path)]
    runs = {name: path for name, path in runs.items() if not probes.is_probe(path)}
    logs = {name: list(read(RunFolder(path).metrics)) for name, path in runs.items()}
    summary = summary or {}
    palette = _palette(logs.values(), summary)
    budget = 3_500_000 // max(1, len(runs))
    stages = [_stage(name, RunFolder(path), logs[name], palette, budget) for name, path in runs.items()]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        stages=stages,
        probes=probed,
        palette=palette,
        elo=_elo(summary),
        table=_table(summary, palette),
        headline=_cards(summary, palette),
        minutes=(summary.get("seconds") or 0) / 60,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page.encode())
    return out


def _probe(name: str, path: str | Path) -> dict[str, Any]:
    return {"name": name, "curation": probes.curation(path), "calibration": probes.calibration(path)}


def _palette(logs, summary: Mapping[str, Any]) -> dict[str, int]:
    """Component name to colour; the same all over the page."""
    found: set[str] = set()
    for log in logs:
        keys = {key for record in log for key in record if key.startswith("reward/")}
        found.update(key.split("/")[1] for key in keys)
    for stage in (summary.get("stages") or {}).values():
        found.update(stage.get("rewards") or {})
    return {name: index % plots.N_COLORS for index, name in enumerate(sorted(found))}


def _line(log: Sequence[Mapping[str, Any]], key: str, color: int = 0) -> plots.Line | None:
    pairs = [(r["step"], r[key]) for r in log if isinstance(r.get(key), (int, float)) and "step" in r]
    if not pairs:
        return None
    steps, values = np.array(pairs, dtype=float).T
    return plots.Line(steps, values, color, exact=key in ("lr", "valid_pairs"))


def _figure(name: str, title: str, lines: Sequence[plots.Line], note: str = "", **options: Any) -> dict[str, Any]:
    ends = ""
    if len(lines) == 1:
        mean = lines[0].mean()
        ends = " → ".join(dict.fromkeys(f"{value:.3g}" for value in (mean[0], mean[-1])))
    return {"title": title, "note": note, "ends": ends, "svg": Markup(plots.panel(name, lines, **options))}


def _stage(name: str, folder: RunFolder, log: list[dict], palette: Mapping[str, int], budget: int) -> dict[str, Any]:
    keys = dict.fromkeys(key for record in log for key in record)
    categories = sorted({key.split("/", 2)[2] for key in keys if key.startswith("reward/") and key.count("/") >= 2})
    measured = {c: line for c, color in palette.items() if (line := _line(log, f"reward/{c}", color))}
    rewards = [_figure(f"{name}-{component}", component, [line], span=0.1) for component, line in measured.items()]
    by_category = []
    for category in categories:
        lines = [line for c, color in palette.items() if (line := _line(log, f"reward/{c}/{category}", color))]
        if lines:
            by_category.append(_figure(f"{name}-category-{category}", category, lines, span=0.1))
    return {
        "name": name,
        "steps": len(log),
        "components": list(measured),
        "rewards": rewards,
        "categories": by_category,
        "health": _health(name, log),
        "throughput": _throughput(name, log),
        "phases": _phases(log),
        "samples": plots.over_training(folder.samples, budget),
        "groups": plots.groups(folder.samples, palette, budget // 4),
        "config": folder.config.read_text(encoding="utf-8") if folder.config.is_file() else None,
    }


def _health(name: str, log: list[dict]) -> list[dict[str, Any]]:
    skipped = [record["step"] for record in log if record.get("skipped")]
    found = []
    for title, key, note, options in _HEALTH:
        if line := _line(log, key):
            marks = {"marks": skipped} if key == "grad_norm" else {}
            found.append(_figure(f"{name}-{key}", title, [line], note, **options, **marks))
    teachers = sorted({key for record in log for key in record if key.startswith("loss/")})
    if len(teachers) > 1:
        lines = [(key.removeprefix("loss/"), line) for key in teachers if (line := _line(log, key))]
        found[1:1] = [_figure(f"{name}-loss-{teacher}", f"Loss, teacher {teacher}", [line]) for teacher, line in lines]
    if line := _ratio(log):
        found.insert(
            1,
            _figure(f"{name}-ratio", "Ratio", [line], "mean, and the band from least to greatest", rule=1.0),
        )
    return found


def _ratio(log: list[dict]) -> plots.Line | None:
    keys = ("ratio_mean", "ratio_min", "ratio_max")
    rows = [[r["step"], *(r[key] for key in keys)] for r in log if all(r.get(key) is not None for key in keys)]
    if not rows:
        return _line(log, "ratio_mean")
    steps, mean, low, high = np.array(rows, dtype=float).T
    return plots.Line(steps, mean, 0, low, high)


def _throughput(name: str, log: list[dict]) -> dict[str, Any] | None:
    line = _line(log, "images_per_second")
    return _figure(f"{name}-speed", "Images per second", [line], span=1) if line else None


def _phases(log: list[dict]) -> list[dict[str, Any]]:
    """Share of the time of each phase, greatest first; what no phase claims is "other"."""
    spent: dict[str, float] = {}
    for record in log:
        for key, value in record.items():
            if key.startswith("time/") and isinstance(value, (int, float)):
                spent[key[5:]] = spent.get(key[5:], 0.0) + value
    whole = spent.pop("step", 0.0)
    if not spent:
        return []
    rest = whole - sum(spent.values())
    total = max(whole, sum(spent.values())) or 1.0
    order = sorted(spent, key=spent.get, reverse=True)
    phases = [{"name": name, "share": spent[name] / total, "color": i % plots.N_COLORS} for i, name in enumerate(order)]
    if rest > 0.005 * total:
        phases.append({"name": "other", "share": rest / total, "color": None})
    return phases


def _at(stage: Mapping[str, Any], guidance: float) -> Mapping[str, Any] | None:
    """A stage's results at `guidance`, if it was evaluated there."""
    for key, entry in (stage.get("by_guidance") or {}).items():
        if float(key) == float(guidance):
            return entry
    return stage if stage.get("guidance") == guidance else None


def _table(summary: Mapping[str, Any], palette: Mapping[str, int]) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = []
    for name, stage in (summary.get("stages") or {}).items():
        scanned = {float(key): entry for key, entry in (stage.get("by_guidance") or {}).items()}
        if stage.get("guidance") is not None:
            scanned.setdefault(float(stage["guidance"]), stage)
        best = max((entry.get("judge_accuracy") or 0.0 for entry in scanned.values()), default=0.0)
        for i, (guidance, entry) in enumerate(sorted(scanned.items())):
            place = {"stage": name, "guidance": guidance, "span": 0 if i else len(scanned)}
            marks = {"own": guidance == stage.get("guidance"), "best": entry.get("judge_accuracy") == best}
            rows.append({"pairs": stage.get("pairs"), **entry, **place, **marks})
    if not rows:
        return None
    components = [name for name in palette if any(name in (row.get("rewards") or {}) for row in rows)]
    pairs = sorted({row["pairs"] for row in rows if row["pairs"]})
    tasks = _tasks(*rows)
    shown = {"rows": rows, "components": components, "tasks": tasks if len(tasks) > 1 else []}
    return shown | {"gap": any("gap" in row for row in rows), "pairs": pairs}


def _tasks(*entries: Mapping[str, Any]) -> list[str]:
    """The tasks that evaluations have numbers of, text-to-image first."""
    return sorted({task for entry in entries for task in entry.get("by_task") or {}}, key=lambda task: task != "t2i")


def _elo(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ratings of every model, overall and by task, with the differences to the last one, as rows and as figures."""
    elo, differences = summary.get("elo"), summary.get("elo_differences") or {}
    if not elo:
        return None
    models = list(dict.fromkeys(name for own in elo.values() for name in own))
    rows = [
        {
            "name": name,
            "guidance": next(own[name]["guidance"] for own in elo.values() if name in own),
            "ratings": [own.get(name) for own in elo.values()],
            "behind": [(differences.get(scope) or {}).get(f"{models[-1]} - {name}") for scope in elo],
        }
        for name in models
    ]
    figures = []
    for scope, own in elo.items():
        shown = {name: (row["rating"], row["low"], row["high"]) for name, row in own.items()}
        fixed = [row["rating"] for row in own.values() if row["low"] == row["high"]]
        svg = plots.intervals(f"elo-{scope}", shown, rule=fixed[0] if fixed else None)
        figures.append({"title": scope, "note": "", "ends": "", "svg": Markup(svg)})
    return {"scopes": list(elo), "rows": rows, "figures": figures, "last": models[-1]}


def _cards(summary: Mapping[str, Any], palette: Mapping[str, int]) -> dict[str, Any] | None:
    """The last stage against the first, both at the guidance the last one is for; beside it the first one at its own."""
    stages = list((summary.get("stages") or {}).values())
    if len(stages) < 2 or stages[-1].get("guidance") is None:
        return None
    guidance = stages[-1]["guidance"]
    before, after = _at(stages[0], guidance), _at(stages[-1], guidance)
    if not before or not after:
        return None
    before, after, own = _numbers(before), _numbers(after), _numbers(stages[0])
    cards = []
    for title in after:
        if title in before:
            (a, a_error), (b, b_error) = before[title], after[title]
            error = None if None in (a_error, b_error) else float(np.hypot(a_error, b_error))
            about = {"title": title, "color": palette.get(title), "own": own.get(title, (None,))[0]}
            cards.append({**about, "before": a, "after": b, "change": b - a, "error": error})
    first, last = list(summary["stages"])[:: len(stages) - 1]
    named = {"guidance": guidance, "first": first, "last": last, "own_guidance": stages[0].get("guidance")}
    return {**named, "cards": cards} if cards else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """An evaluation as {title: (value, standard error or None)}, failed values left out."""
    found = {"held-out judge": (entry.get("judge_accuracy"), entry.get("judge_accuracy_se"))}
    if len(tasks := _tasks(entry)) > 1:
        found |= {f"judge, {task}": (entry["by_task"][task]["judge_accuracy"]["value"], None) for task in tasks}
    errors = entry.get("rewards_se") or {}
    found |= {name: (value, errors.get(name)) for name, value in sorted((entry.get("rewards") or {}).items())}
    found["diversity"] = (entry.get("diversity"), None)
    return {title: pair for title, pair in found.items() if pair[0] is not None}
