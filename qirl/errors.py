"""Errors that a user can mend: one line that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. The command line prints the message and exits with code 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `options`, or the sorted options where none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}"
