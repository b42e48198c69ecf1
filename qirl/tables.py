"""Tables on the terminal: the options of a config, the results of an evaluation."""

from __future__ import annotations

import sys

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


def print_results(results: dict[str, dict]) -> None:
    """The table of an evaluation, a row per guidance scale."""
    names = list(next(iter(results.values()))["rewards"])
    table = Table(title="held-out prompts, fresh noise")
    for column in ("guidance", "judge", *names, "gap", "diversity"):
        table.add_column(column, justify="right")
    for guidance, row in results.items():
        rewards = [f"{row['rewards'][name]:.3f}" for name in names]
        judge = f"{row['judge_accuracy']:.3f} ± {row['judge_accuracy_se']:.3f}"
        table.add_row(guidance, judge, *rewards, f"{row['gap']:+.3f}", f"{row['diversity']:.3f}")
    Console().print(table)
