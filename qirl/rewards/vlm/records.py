"""What a judge learns from: one JSON line a rated image.

    {"images": ["out.png"], "rubric": "alignment", "prompt": "a red 7", "score": 4, "reasoning": "...", "spread": 0.5,
     "split": "train"}

images: paths relative to the file; for an edit the sources first, the image to judge last. rubric: a name or a file; also
the dimension that validation reports by. prompt, or instruction for an edit. score: 1 to 5, the raters' mean. reasoning,
spread (the raters' standard deviation) and split ("train" or "validation", default train) may be left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qirl.data.images import read_image
from qirl.data.lines import parse_object, read_lines, told_at
from qirl.errors import UserError
from qirl.rewards.vlm.processor import check_aspect

EXAMPLE = '{"images": ["out.png"], "rubric": "alignment", "prompt": "a red 7", "score": 4}'
SPLITS = ("train", "validation")
SHOWN = 3  # bad lines that a message names


@dataclass(frozen=True)
class Record:
    images: tuple[Path, ...]
    rubric: str
    request: str
    score: float
    reasoning: str = ""
    spread: float | None = None
    split: str = "train"

    @property
    def prompt(self) -> tuple[str, str, tuple[Path, ...]]:
        """What records are compared inside of: the same rubric, request and sources."""
        return self.rubric, self.request, self.images[:-1]

    def load(self) -> list[np.ndarray]:
        """The images, uint8 [H, W, 3]. Raises UserError for one that cannot be read."""
        return [read_image(path) for path in self.images]


def load_records(path: str | Path, most_missing: float = 0.0) -> tuple[list[Record], list[str]]:
    """(the records that can be used, a line for each that cannot: an image is missing, damaged or too thin for a judge).

    Decodes every image once, on as many threads as there are cores.

    Raises UserError for a file that is missing or empty, for a line that is no record (with its number), and where more
    than the share `most_missing` lacks images.
    """
    path = Path(path)
    numbered = []
    for number, line in read_lines(path, "record file"):
        with told_at(path, number):
            numbered.append((number, _record(line, path.parent)))

    def problem(numbered: tuple[int, Record]) -> str | None:
        number, record = numbered
        try:
            with told_at(path, number):
                for name, image in zip(record.images, record.load(), strict=True):
                    check_aspect(image, str(name))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(pool.map(problem, numbered))
    records = [record for (_, record), bad in zip(numbered, problems, strict=True) if bad is None]
    missing = [bad for bad in problems if bad is not None]
    total = len(records) + len(missing)
    if not records:
        raise UserError(f"{path} has no record to learn from" + (f" ({missing[0]})" if missing else ""))
    if len(missing) > most_missing * total:
        raise UserError(
            f"{len(missing)} of {total} records lack images they could learn from, more than judge.max_missing={most_missing:g} allows: "
            f"{'; '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}"
        )
    return records, missing


def _record(line: str, folder: Path) -> Record:
    given = parse_object(line, EXAMPLE)
    known = {"images", "rubric", "prompt", "instruction", "score", "reasoning", "spread", "split"}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"'{unknown[0]}' is no field of a record; there are {', '.join(sorted(known))}")
    request, images = given.get("prompt", given.get("instruction")), given.get("images")
    score, spread, split = given.get("score"), given.get("spread"), given.get("split", "train")
    for good, message in (
        (isinstance(images, list) and images and all(isinstance(i, str) for i in images), "images must list paths"),
        (isinstance(given.get("rubric"), str), "rubric must be a name or a file"),
        (isinstance(request, str), "there must be a prompt or an instruction"),
        (_number(score) and 1 <= score <= 5, f"score={score} must be a number from 1 to 5"),
        (spread is None or (_number(spread) and 0 <= spread <= 2), f"spread={spread} must be a number from 0 to 2"),
        (isinstance(given.get("reasoning", ""), str), "reasoning must be text"),
        (split in SPLITS, f"split={split} must be one of {', '.join(SPLITS)}"),
    ):
        if not good:
            raise UserError(message)
    paths = tuple(folder / image for image in images)
    return Record(paths, given["rubric"], request, float(score), given.get("reasoning", ""), spread, split)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def by_prompt(records: Sequence[Record]) -> list[list[Record]]:
    """The records of every prompt, in the order in which prompts first appear."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.prompt].append(record)
    return list(groups.values())
