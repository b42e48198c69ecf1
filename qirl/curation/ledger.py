"""The ledger of a probe: what the base drew for every candidate prompt, and what was decided about it.

ledger.jsonl. Line 1, the header: which policy (content hash), sampler and seed drew the images, and after the decisions
their options. Then one line a prompt, appended as the scores come in:

    {"id", "prompt", "category", "task", "scores": [{component: score, null where scoring failed}, one per image]}

When all prompts are there the whole file is replaced, atomically, by one whose lines also hold "composite", "mean",
"range", "threshold", "decision" and "reason". So a probe that was killed goes on after its last whole line, and other
decisions (another tau) need no new images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.run.folder import flatten, write_bytes
from qirl.run.logs import JsonLines, plain, read

NAME = "ledger.jsonl"
VERSION = 1
RAW = ("id", "prompt", "category", "task", "scores")
NOISE = "noise"  # a line's: [{component: noise of a NoisyScore}, one per image], where there is any
MEASURED = "measured_noise"  # header: read noise that rewards found while they scored, over what they declared
DRAWN = ("policy", "dtype", "world", "flow", "timesteps")  # header: what decides how a prompt's images look
_SHOWN = 12  # digits of a hash in a message


class Ledger:
    """One ledger file. `open` starts or continues it; `read` needs a complete one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = JsonLines(self.path)

    def open(self, header: dict, prompts: Sequence[Prompt]) -> int:
        """The number of prompts that are already in the file, which is begun where there is none.

        Raises UserError for a ledger of another policy, sampler, seed, reward or list of prompts.
        """
        found = list(self.lines.read()) if self.path.exists() else []
        if not found:
            self.lines.append(header)
            return 0
        self._check_version(found[0])
        check_header(self.path, found[0], header, [name for name in header if name != "ledger"])
        rows = found[1:]
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=2):
            self._check_row(number, row, header["group"])
            if (row["id"], row["prompt"], row["category"]) != (prompt.id, prompt.text, prompt.category):
                raise UserError(
                    f"{self.path}, line {number} is prompt {row['id']} '{row['prompt']}', the candidate there is now "
                    f"{prompt.id} '{prompt.text}'; choose another run.out, or delete that ledger"
                )
        self.lines.cut(0)
        return len(rows)

    def append(self, rows: Sequence[dict]) -> None:
        self.lines.append(list(rows))

    def read(self) -> tuple[dict, list[dict]]:
        """(header, rows), NaN for a failed score. Raises UserError unless every prompt is there and whole."""
        header, *rows = list(read(self.path)) or [{}]
        self._check_version(header)
        if len(rows) != header["prompts"]:
            raise UserError(
                f"{self.path} holds {len(rows)} of {header['prompts']} prompts; finish it with the command that began it"
            )
        for number, row in enumerate(rows, start=2):
            self._check_row(number, row, header["group"])
            row["scores"] = [{name: math.nan if v is None else v for name, v in own.items()} for own in row["scores"]]
        return header, rows

    def replace(self, header: dict, rows: Sequence[dict]) -> None:
        """The whole file anew, or not at all."""
        text = "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in [header, *rows])
        write_bytes(self.path, text.encode())

    def _check_version(self, header: dict) -> None:
        if header.get("ledger") != VERSION or not {*DRAWN, "group", "prompts", "read_noise"} <= set(header):
            raise UserError(
                f"{self.path} does not begin with the header of a ledger (version {VERSION}); name a ledger.jsonl of "
                "`qirl curate`, or delete it and curate again"
            )

    def _check_row(self, number: int, row: dict, group: int) -> None:
        scores = row.get("scores")
        whole = isinstance(scores, list) and len(scores) == group and all(isinstance(own, dict) for own in scores)
        whole = whole and all(v is None or 0 <= v <= 1 for own in scores for v in own.values())
        if not (whole and set(RAW) <= set(row)):
            raise UserError(
                f"{self.path}, line {number} is no prompt with scores of {group} images; delete that ledger and curate again"
            )


def check_header(path: Path, there: dict, now: dict, names: Sequence[str]) -> None:
    """Raises UserError, with both values, where one of the facts `names` differs between two headers."""
    if "policy" in names and there["policy"] != now["policy"]:
        raise UserError(
            f"{path} was drawn by policy {there['policy'][:_SHOWN]}, model.path is policy {now['policy'][:_SHOWN]}; "
            "name the model that drew it, or draw anew in another run.out"
        )
    known, given = (flatten(plain({name: own.get(name) for name in names})) for own in (there, now))
    differences = [
        f"{name} ({known.get(name)} there, {given.get(name)} now)"
        for name in dict.fromkeys([*known, *given])
        if known.get(name) != given.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} was drawn with other options: {', '.join(differences[:4])}; use the same, or draw anew in another run.out"
        )
