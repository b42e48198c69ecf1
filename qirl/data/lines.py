"""Text files that hold one thing a line: prompts, rated images, judgements."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from qirl.errors import UserError


def read_lines(path: str | Path, what: str) -> list[tuple[int, str]]:
    """(number, text) of every line that is not blank, without the space around it; what: the file's name in errors.

    Only a newline ends a line, for JSON may hold U+2028 and its like as they are; a byte order mark is skipped. Raises
    UserError for a file that is not there, or no UTF-8 text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read ({error}); it must be UTF-8 text") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


@contextlib.contextmanager
def told_at(path: str | Path, number: int) -> Iterator[None]:
    """Puts the place of a line before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from None


def parse_object(line: str, example: str) -> dict:
    """A JSON object. Raises UserError for anything else, and shows the example."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); write one object a line, such as {example}") from None
    if not isinstance(found, dict):
        raise UserError(f"a {type(found).__name__}, not an object; write one a line, such as {example}")
    return found
