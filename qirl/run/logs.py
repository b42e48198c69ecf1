"""JSON-lines logs that survive being killed at any byte: metrics.jsonl and scores.jsonl of a run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qirl.errors import UserError

_TAIL = 1 << 16


def plain(value: Any) -> Any:
    """`value` as plain JSON: numpy and torch scalars become numbers, NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):  # numpy.float64 is a float too
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _whole(line: bytes) -> bool:
    """Whether `line`, the last one of a file, was written to its end."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file in order; a torn last line (a write cut short) is left out.

    Raises UserError if the file is missing, or a line other than the last is not a JSON object.
    """
    for _, record in _numbered(Path(path)):
        yield record


def _numbered(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); is that the folder of a run?") from None
    with file:
        for number, line in enumerate(file, start=1):
            if _whole(line):
                yield line, json.loads(line)
            elif line.endswith(b"\n") and line.strip():
                raise UserError(f"{path}, line {number} is not a JSON object; mend or delete that line")


class JsonLines:
    """An append-only file of JSON objects, one a line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._clean = False

    def append(self, records: Mapping[str, Any] | list[Mapping[str, Any]]) -> None:
        """Adds one object or a list of them in a single write, visible to readers on return.

        NaN and infinity are written as null; numpy and torch scalars as numbers.
        """
        if isinstance(records, Mapping):
            records = [records]
        data = b"".join(json.dumps(plain(record), allow_nan=False).encode() + b"\n" for record in records)
        if not data:
            return
        if not self._clean:
            self._mend()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:  # once; a full disk or a signal may split it
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)

    def cut(self, step: int) -> None:
        """Keeps the lines with "step" <= `step` (and those without one), drops a torn last line; atomic.

        Does nothing if there is no file. Raises UserError on a broken line that is not the last.
        """
        if not self.path.exists():
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            for line, record in _numbered(self.path):
                if record.get("step", step) <= step:
                    file.write(line if line.endswith(b"\n") else line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._clean = True

    def read(self) -> Iterator[dict[str, Any]]:
        """See `read`."""
        return read(self.path)

    def _mend(self) -> None:
        """Ends a last line that lacks its newline, so that the next write starts a line of its own."""
        self._clean = True
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            tail = b""
            while end and b"\n" not in tail:
                start = max(0, end - _TAIL)
                file.seek(start)
                tail = file.read(end - start) + tail
                end = start
            torn = tail.rpartition(b"\n")[2]
            if torn and _whole(torn):
                file.seek(size)
                file.write(b"\n")
            elif torn:
                file.truncate(size - len(torn))
