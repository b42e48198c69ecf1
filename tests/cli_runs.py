"""Runs the command line inside this process, so that a test of it takes milliseconds."""

import contextlib
import hashlib
import io
from pathlib import Path

from qirl import cli


def qirl(*arguments) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `qirl ARGUMENTS`; other exceptions than SystemExit pass."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.app([str(a) for a in arguments], prog_name="qirl")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder` with the hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *arguments) -> str:
    """The one line that `qirl ARGUMENTS` ends with: exit code 2, nothing on standard output, `folder` untouched."""
    before = contents(folder)
    code, out, err = qirl(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("qirl: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert contents(folder) == before, "the refused command wrote something"
    return err
