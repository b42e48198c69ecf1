"""What the commands share: their arguments, how a config is loaded, how errors are shown, which rank speaks."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from typer.core import TyperCommand

from qirl.errors import UserError

PATIENCE = 10.0  # seconds in which rank 0 says what is wrong, before another rank ends


class WithOptions(TyperCommand):
    """A command of a config: its help ends with every option of that config."""

    kind: str | None = None  # of config; None: the command's name

    def format_help(self, ctx, formatter) -> None:
        super().format_help(ctx, formatter)
        from qirl.tables import print_options

        print_options(self.kind or self.name)


Config = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or a shipped config such as digits/t2i")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.OPTION=VALUE", help="options over those of the file"),
]
Out = Annotated[str | None, typer.Option(help="run folder, over run.out; the same command continues it")]
Device = Annotated[str, typer.Option(help="where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and what it costs; start nothing")]


def load_config(kind: str, name: str, overrides: list[str] | None, out: str | None = None):
    """The config of a command's arguments."""
    from qirl.config import load
    from qirl.paths import find_config

    return load(kind, find_config(name), [*(overrides or []), *([f"run.out={out}"] if out is not None else [])])


def first() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, **where) -> None:
    if first():
        print(text, flush=True, **where)


@contextlib.contextmanager
def told(resumes: bool = False) -> Iterator[None]:
    """Turns what the user can mend into one line and an exit code."""
    try:
        yield
    except UserError as error:
        say(f"qirl: {' '.join(str(error).split())}", file=sys.stderr)
        if not first() and world() > 1:
            time.sleep(PATIENCE)  # torchrun ends all ranks with the first that ends: rank 0 has the word
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        more = "; the same command continues from the last checkpoint" if resumes else ""
        say(f"qirl: interrupted{more}", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """One of torchrun's ranks ends here, with the exit code that the command has, and not with its interpreter.

    Threads of gloo that outlive the interpreter end it by a signal now and then, after everything is done.
    """
    code = 0
    try:
        yield
    except SystemExit as exit:
        if world() == 1:
            raise
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    if world() > 1:
        if code == 0 and "torch" in sys.modules:
            from qirl.parallel.data import leave_group

            leave_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def world() -> int:
    """The number of ranks that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))
