"""Qwen-Image-Bench: from a judge's answers about single criteria to one score, and the file that holds the answers.

A judge answers each criterion of an image with 0, 1 or 2, or N/A where it does not apply. Criteria have three levels: an L1
(such as "quality") holds L2s, which hold L3s. Section 7 of the algorithm page.

A judge file has one JSON object a line, in any order, so that any judge can write it:

    {"image": "0007", "L1": "quality", "L2": "texture", "L3": "skin", "score": 2}
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qirl.data.lines import parse_object, read_lines, told_at
from qirl.errors import UserError
from qirl.evaluation.statistics import interval
from qirl.run.folder import write_bytes

EXAMPLE = '{"image": "0007", "L1": "quality", "L2": "texture", "L3": "skin", "score": 2}'
POINTS = {0: 0.0, 1: 60.0, 2: 100.0}
NOT_APPLICABLE = "N/A"


class Judgement(NamedTuple):
    """One criterion of one image: score 0, 1, 2, or None for N/A."""

    image: str
    L1: str
    L2: str
    L3: str
    score: int | None


def aggregate(judgements: Sequence[Judgement]) -> dict:
    """{"overall": {"value", "low", "high"}, "columns": {L1: the same and "images"}, "images", "judgements", "dropped"}.

    Scores 0, 1, 2 are 0, 60, 100 points and N/A is dropped. Inside an image, L3 points average to L2s and those to L1s. A
    column is the mean over the images that have its L1. Overall is the mean over images of the image's mean L1, and not the
    mean of the columns, in which an L1 that few images have would weigh as much as one that all have. Intervals are 95 %,
    over images. Raises UserError for another score, a criterion that an image has twice, and where only N/A is left.
    """
    points: dict[tuple[str, ...], float] = {}
    known: set[tuple[str, ...]] = set()
    for one in judgements:
        if one[:4] in known:
            raise UserError(f"{_place(one)} is judged twice; keep one of the two")
        known.add(one[:4])
        if _checked(one).score is not None:
            points[one[:4]] = POINTS[one.score]
    if not points:
        raise UserError(
            f"{len(judgements)} judgements and no score of 0, 1 or 2 among them; there is nothing to average"
        )
    columns = _mean_above(_mean_above(points))  # (image, L1)
    overall = _mean_above(columns)
    of = {name: [v for (_, l1), v in columns.items() if l1 == name] for name in dict.fromkeys(l1 for _, l1 in columns)}
    return {
        "overall": _over_images(overall.values()),
        "columns": {name: _over_images(values) | {"images": len(values)} for name, values in of.items()},
        "images": len(overall),
        "judgements": len(judgements),
        "dropped": len(judgements) - len(points),
    }


def _mean_above(values: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Means over the last part of the key."""
    groups = defaultdict(list)
    for place, value in values.items():
        groups[place[:-1]].append(value)
    return {place: float(np.mean(own)) for place, own in groups.items()}


def _over_images(values: Iterable[float]) -> dict[str, float]:
    values = np.array(list(values))
    return interval(values, np.arange(len(values)))


def _checked(one: Judgement) -> Judgement:
    if one.score is not None and (type(one.score) is not int or one.score not in POINTS):
        raise UserError(f"{_place(one)} has the score {one.score!r}; a score is 0, 1, 2 or N/A")
    return one


def _place(one: Judgement) -> str:
    return f"image '{one.image}', {one.L1} / {one.L2} / {one.L3}"


def read_judgements(path: str | Path) -> list[Judgement]:
    """The judgements of a judge file; "N/A" and null both mean that a criterion does not apply; blank lines are skipped.

    Raises UserError for a file that cannot be read or holds nothing, and, with its line number, for a line that is no
    JSON object, lacks or adds a key, has another score, or repeats a criterion of an image.
    """
    found: dict[tuple[str, ...], int] = {}
    judgements = []
    for number, line in read_lines(path, "judge file"):
        with told_at(path, number):
            one = _checked(_parsed(line))
            if one[:4] in found:
                raise UserError(f"{_place(one)} was judged on line {found[one[:4]]}; keep one of the two")
        found[one[:4]] = number
        judgements.append(one)
    if not judgements:
        raise UserError(f"judge file {path} holds no judgement; write one JSON object a line")
    return judgements


def _parsed(line: str) -> Judgement:
    row = parse_object(line, EXAMPLE)
    for name in [*Judgement._fields, *row]:
        if (name in row) != (name in Judgement._fields):
            state = "unknown" if name in row else "missing"
            raise UserError(f"the key '{name}' is {state}; the keys are {', '.join(Judgement._fields)}")
    for name in Judgement._fields[:-1]:
        if not isinstance(row[name], str) or not row[name]:
            raise UserError(f'"{name}" is {row[name]!r}; it must be text, such as "0007"')
    return Judgement(**row | {"score": None if row["score"] == NOT_APPLICABLE else row["score"]})


def write_judgements(path: str | Path, judgements: Iterable[Judgement]) -> None:
    """Writes a judge file, whole or not at all; N/A is written as "N/A"."""
    rows = [
        one._asdict() | ({"score": NOT_APPLICABLE} if one.score is None else {}) for one in map(_checked, judgements)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, text.encode())
