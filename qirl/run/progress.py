"""A progress bar with time left and one line of live metrics; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Live:
    """`with Live("t2i", total, start) as live: ... live.update(step, {"loss": ...})`; silent if `show` is False."""

    def __init__(self, name: str, total: int, start: int = 0, show: bool = True):
        self.name, self.total, self.start, self.show = name, total, start, show
        self.bar = self.task = None
        self.begun = self.printed = time.monotonic()

    def __enter__(self) -> Live:
        if self.show and sys.stderr.isatty():
            columns = (
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[line]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.start, line="")
        return self

    def update(self, step: int, values: dict[str, float]) -> None:
        line = "  ".join(f"{name} {value:.3g}" for name, value in values.items() if value is not None)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, line=line)
            return
        now = time.monotonic()
        if self.show and (step == self.total or now - self.printed > 10):
            left = (now - self.begun) / max(1, step - self.start) * (self.total - step)
            print(f"{self.name} {step}/{self.total}  {line}  left {left:.0f} s", file=sys.stderr, flush=True)
            self.printed = now

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()
