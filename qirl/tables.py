"""Tables on the terminal: the options of a config; the results of an evaluation, a curation or a calibration."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qirl.config import KINDS, describe
from qirl.errors import UserError, nearest


def print_options(kind: str, section: str | None = None) -> None:
    """The options of a kind of run as a table by section. Raises UserError for an unknown kind or section."""
    if kind not in KINDS:
        raise UserError(f"no command with options is called '{kind}'{nearest(kind, KINDS)}")
    rows = describe(kind)
    section_of = {name: name.rpartition(".")[0] for name, *_ in rows}
    sections = list(dict.fromkeys(section_of.values()))
    shown = [s for s in sections if section is None or s == section or s.startswith(f"{section}.")]
    if not shown:
        raise UserError(f"the config of `qirl {kind}` has no section '{section}'{nearest(section, sections)}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    widest = max(map(len, section_of))
    for where in shown:
        table = Table(
            title=where, title_justify="left", box=box.SIMPLE_HEAD, show_header=where == shown[0], expand=True
        )
        table.add_column("option", width=widest, style="cyan", overflow="fold")
        for column, ratio in (("type", 22), ("default", 14), ("meaning", 60)):
            table.add_column(column, ratio=ratio, overflow="fold")
        for row in rows:
            if section_of[row[0]] == where:
                table.add_row(*map(Text, row))
        console.print(table)


def print_results(results: dict) -> None:
    """What `qirl.evaluate` returned: a row per model and guidance scale, then the ratings where there was an arena."""
    models = results["models"] if "models" in results else {"": results}
    rewards = list(dict.fromkeys(name for own in models.values() for row in own.values() for name in row["rewards"]))
    table = Table(title="held-out prompts, fresh noise")
    for column in (
        *(["model"] if "models" in results else []),
        "guidance",
        "judge",
        *rewards,
        "gap",
        "diversity",
        "artifacts",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, own in models.items():
        for guidance, row in own.items():
            judge = f"{row['judge_accuracy']:.3f} ± {_number(row['judge_accuracy_se'], '.3f') or '?'}"
            numbers = [_number(row["rewards"].get(component), ".3f") for component in rewards]
            numbers += [_number(row["gap"], "+.3f"), _number(row["diversity"], ".3f"), _number(row["artifacts"], ".1f")]
            table.add_row(*([name] if "models" in results else []), guidance, judge, *numbers)
    console = Console()
    console.print(table)
    for name, own in models.items():
        for guidance, row in own.items():
            for component, share in row.get("failed", {}).items():
                console.print(f"{name or 'model'}, guidance {guidance}: {component} failed on {share:.0%} of images")
    if results.get("arena"):
        _print_arena(results["arena"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


def _print_arena(found: dict) -> None:
    """Ratings, best first, and by how much each player is ahead of the next."""
    table = Table(title=f"arena: {found['battles']} battles on {found['prompts']} prompts, {found['anchor']} fixed")
    for column in ("model", "guidance", "rating", "95 %", "wins", "ties", "losses", "ahead of the next by", "95 %"):
        table.add_column(column, justify="left" if column == "model" else "right")
    names = sorted(found["elo"], key=lambda name: -found["elo"][name]["rating"])
    for name, below in zip(names, [*names[1:], None], strict=True):
        row = found["elo"][name]
        counts = (row["wins"], row["ties"], row["games"] - row["wins"] - row["ties"])
        ahead = ("", "") if below is None else _ahead(found["differences"], name, below)
        own = "fixed" if name == found["anchor"] else f"{row['low']:.0f} to {row['high']:.0f}"
        rating = f"{row['rating']:.0f}"
        table.add_row(name, f"{found['guidance'][name]:g}", rating, own, *map(str, counts), *ahead)
    Console().print(table)


def _ahead(differences: dict, name: str, below: str) -> tuple[str, str]:
    sign, pair = (1, f"{name} - {below}") if f"{name} - {below}" in differences else (-1, f"{below} - {name}")
    low, high = sorted(sign * differences[pair][end] for end in ("low", "high"))
    return f"{sign * differences[pair]['value']:.0f}", f"{low:.0f} to {high:.0f}"


def print_curation(ledger: str | Path) -> None:
    """The decisions of a curated ledger: prompts kept and dropped by category and reason, and the median range."""
    from qirl.curation.curate import REASONS
    from qirl.curation.ledger import Ledger

    _, rows = Ledger(ledger).read()
    table = Table(title=f"{len(rows)} prompts")
    for column in ("category", "kept", *REASONS, "median range", "mean"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for name in [*sorted({row["category"] for row in rows}), None]:
        own = [row for row in rows if name in (None, row["category"])]
        count = Counter(row["reason"] for row in own)
        scored = [row for row in own if row["range"] is not None]
        middle = sorted(row["range"] for row in scored)[len(scored) // 2] if scored else None
        mean = sum(row["mean"] for row in scored) / len(scored) if scored else None
        numbers = (count[None], *(count[reason] for reason in REASONS))
        table.add_row(name or "all", *map(str, numbers), _number(middle, ".3f"), _number(mean, ".3f"))
    Console().print(table)


def print_validation(path: str | Path) -> None:
    """The measures of a judge, a row per dimension; nothing where it had no records to validate on."""
    if not Path(path).is_file():
        return
    table = Table(title="validation")
    measures = json.loads(Path(path).read_text())
    columns = list(next(iter(measures.values())))
    for column in ("dimension", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "dimension" else "right")
    for dimension, own in measures.items():
        table.add_row(dimension, *(_number(own[name], "d" if name == "records" else ".3f") for name in columns))
    Console().print(table)


def print_scores(rows: list[dict[str, float]]) -> None:
    """Mean, lowest and highest score of every component, and how many images failed or lack it."""
    table = Table(title=f"{len(rows)} images")
    for column in ("component", "mean", "lowest", "highest", "failed", "does not apply"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name in sorted({name for row in rows for name in row}):
        own = [row[name] for row in rows if name in row]
        kept = [v for v in own if v == v]
        numbers = (sum(kept) / len(kept), min(kept), max(kept)) if kept else (None,) * 3
        table.add_row(name, *(_number(v, ".3f") for v in numbers), str(len(own) - len(kept)), str(len(rows) - len(own)))
    Console().print(table)


def print_attacks(found: dict[str, dict[str, tuple[float, float]]], limit: float) -> bool:
    """Where every attack falls among the real images; whether all of them stay at or under `limit`."""
    table, fine = Table(title="attacks: mean score, and the share of real images that it beats"), True
    for column in ("component", "attack", "score", "beats", ""):
        table.add_column(column, justify="left" if column in ("component", "attack", "") else "right")
    for component, own in found.items():
        for attack, (score, share) in own.items():
            high = share > limit
            fine = fine and not high
            table.add_row(component, attack, _number(score, ".3f"), _number(share, ".0%"), "too high" if high else "")
    Console().print(table)
    return fine


def print_categories(path: str | Path) -> None:
    """How many prompts of a categorised file each category has, and how many answers were none of them."""
    from qirl.curation.categorise import ledger_of

    table = Table(title="prompts by category")
    table.add_column("category")
    table.add_column("prompts", justify="right")
    count = Counter(json.loads(line)["category"] for line in Path(path).read_text(encoding="utf-8").splitlines())
    for name, number in count.most_common():
        table.add_row(Text(name), str(number))
    Console().print(table)
    ledger = ledger_of(Path(path))
    if outside := len(ledger.read_text(encoding="utf-8").splitlines()):
        print(f"{outside} answers name no category of the list: {ledger}")


def print_calibration(path: str | Path) -> None:
    """The weights of a calibration, a row per category and component."""
    found = json.loads(Path(path).read_text())
    table = Table(title=f"{found['method']} weights")
    columns = ("wanted", "target", "weight", "realised", "reliability", "active")
    for column in ("category", "groups", "scale", "component", *columns):
        table.add_column(column, justify="left" if column in ("category", "component") else "right")
    for category, own in found["categories"].items():
        head = (category, str(own["groups"]), f"{own['scale']:.3f}")
        for component, row in own["components"].items():
            table.add_row(*head, component, *(_number(row[name], ".3f") for name in columns))
            head = ("", "", "")
    console = Console()
    console.print(table)
    for category, own in found["categories"].items():
        for note in own["notes"]:
            console.print(f"{category}: {note}", markup=False)
