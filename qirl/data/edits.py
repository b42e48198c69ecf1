"""Edits of the digits world: an instruction, one or two source pictures, and the picture that is wanted.

    recolour    make it yellow                  the ink changes; glyphs and paper stay
    repaint     turn the background white       the paper changes; glyphs and ink stay
    swap        swap the two digits             each glyph moves to the other half; the colours stay
    compose     put the digit of image 1 on the background of image 2

What an instruction does not name must stay, above all the very glyph: another image of the same digit is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qirl.data.digits import Bank, bank, digest, paint
from qirl.data.prompts import FIRST_EDIT, Prompt
from qirl.data.words import INKS, PAPERS, DigitSpec, colour_of, contrasting, parse
from qirl.errors import UserError, nearest

FORMS = {
    "recolour": ("make it", INKS, "ink"),
    "repaint": ("turn the background", PAPERS, "paper"),
    "swap": ("swap the two digits", None, None),
    "compose": ("put the digit of image 1 on the background of image 2", None, None),
}
CATEGORIES = tuple(FORMS)
EXAMPLES = ("make it yellow", "turn the background white", FORMS["swap"][0], FORMS["compose"][0])
FLAWS = {"copied": 0.15, "redrawn": 0.15}  # shares of a base's examples: flawed, as collected pairs are
SPLITS = {"held_out": (0, 40), "train": (40, 190)}  # prompts of a category, in an order fixed by a hash


@dataclass(frozen=True)
class EditSpec:
    """What an instruction asks for: one of CATEGORIES, and the new colour of recolour and repaint."""

    operation: str
    colour: str | None = None

    @property
    def sources(self) -> int:
        """How many pictures it needs."""
        return 2 if self.operation == "compose" else 1

    @property
    def text(self) -> str:
        """The instruction: `parse_instruction(edit.text) == edit`."""
        return FORMS[self.operation][0] + (f" {self.colour}" if self.colour else "")


def parse_instruction(text: str) -> EditSpec:
    """What an instruction asks for; case and spaces do not count.

    Raises UserError, which names the fix, for anything else than the four forms above and for an unknown colour.
    """
    given = " ".join(text.lower().split())
    for operation, (form, colours, role) in FORMS.items():
        start, _, last = given.rpartition(" ")
        if colours is None and given == form:
            return EditSpec(operation)
        if colours is not None and start == form:
            return EditSpec(operation, colour_of(last, colours, role, text))
    try:
        parse(text)
    except UserError:
        raise UserError(f"instruction '{text}' is unknown{nearest(given, EXAMPLES)}") from None
    raise UserError(f"'{text}' draws a picture and edits none; leave its sources out or write an instruction such as "
                    f"'{EXAMPLES[0]}'")  # fmt: skip


def wanted(instruction: str | EditSpec, sources: Sequence[DigitSpec]) -> DigitSpec:
    """What the output is to show, given what the sources show.

    Raises UserError for an instruction outside the grammar, the wrong number of sources, or sources with the wrong
    number of digits (swap needs two, compose one in each).
    """
    edit = parse_instruction(instruction) if isinstance(instruction, str) else instruction
    if len(sources) != edit.sources:
        raise UserError(f"instruction '{edit.text}' needs {edit.sources} source image{'s' * (edit.sources - 1)}, "
                        f"not {len(sources)}")  # fmt: skip
    need = {"swap": (2,), "compose": (1, 1)}.get(edit.operation)
    found = tuple(len(spec.digits) for spec in sources)
    if need and found != need:
        raise UserError(f"instruction '{edit.text}' needs sources of {' and '.join(map(str, need))} digits, "
                        f"not {' and '.join(map(str, found))}")  # fmt: skip
    first = sources[0]
    if edit.operation == "recolour":
        return picture_of(first.digits, edit.colour, first.paper)
    if edit.operation == "repaint":
        return picture_of(first.digits, first.ink, edit.colour)
    if edit.operation == "swap":
        return picture_of(first.digits[::-1], first.ink, first.paper)
    return picture_of(first.digits, first.ink, sources[1].paper)


def picture_of(digits: Sequence[int], ink: str, paper: str) -> DigitSpec:
    """The spec of a picture with every colour named."""
    return DigitSpec(tuple(digits), ink, paper, "two_digits" if len(digits) == 2 else "background")


PAIRS = [(ink, paper) for paper in PAPERS for ink in INKS if contrasting(ink, paper)]


def _indices(u: float, *sizes: int) -> list[int]:
    """Several independent indices, each below its size, from one uniform in [0, 1)."""
    found = []
    for size in sizes:
        u *= size
        found.append(int(u))
        u -= found[-1]
    return found


def _task(operation: str, first: float, second: float) -> tuple[EditSpec, tuple[DigitSpec, ...]]:
    """An instruction and its sources from two uniforms; the change is real, what results can be read."""
    two, a, b, pair = _indices(first, 2, 10, 9 if operation == "swap" else 10, len(PAIRS))
    two = operation == "swap" or (two and operation != "compose")
    b = (a + 1 + b) % 10 if operation == "swap" else b
    ink, paper = PAIRS[pair]
    source = picture_of((a, b) if two else (a,), ink, paper)
    if operation == "recolour":
        options = [new for new in INKS if new != ink and contrasting(new, paper)]
        return EditSpec(operation, options[int(second * len(options))]), (source,)
    if operation == "repaint":
        options = [new for new in PAPERS if new != paper and contrasting(ink, new)]
        return EditSpec(operation, options[int(second * len(options))]), (source,)
    if operation == "swap":
        return EditSpec(operation), (source,)
    options = [(i, p) for i, p in PAIRS if p != paper and contrasting(ink, p)]
    c, pair = _indices(second, 10, len(options))
    return EditSpec(operation), (source, picture_of((c,), *options[pair]))


def _strokes(bank: Bank, edit: EditSpec, sources: Sequence[DigitSpec], draws, others) -> list[np.ndarray]:
    """Coverage [16, 16] of every source and then of the wanted picture; `draws` pick the sources' glyphs, in order,
    `others` those of the picture."""
    digits = [d for s in sources for d in s.digits]
    glyphs, again = ([bank.pick(d, x) for d, x in zip(digits, own, strict=False)] for own in (draws, others))
    if edit.operation == "compose":
        return [bank.cover(glyphs[:1]), bank.cover(glyphs[1:]), bank.cover(again[:1])]
    return [bank.cover(glyphs), bank.cover(again[::-1] if edit.operation == "swap" else again)]


def _rendered(bank: Bank, rows: Sequence[tuple[EditSpec, tuple[DigitSpec, ...]]], draws, others) -> list[np.ndarray]:
    """For each row its sources and, last, the edit: uint8 [sources + 1, 16, 16, 3]; all painted at once. It is the true
    one where `others` are the `draws` of the sources' glyphs."""
    covers, inks, papers, ends = [], [], [], []
    for (edit, sources), own, other in zip(rows, draws, others, strict=True):
        covers += _strokes(bank, edit, sources, own, other)
        for spec in (*sources, wanted(edit, sources)):
            inks.append(INKS[spec.ink])
            papers.append(PAPERS[spec.paper])
        ends.append(len(covers))
    pictures = paint(np.stack(covers), np.array(inks), np.array(papers))
    return np.split(pictures, ends[:-1])


def examples(u: np.ndarray, flaws: bool = False) -> tuple[list[Prompt], np.ndarray]:
    """Examples: uniforms [B, UNIFORMS] in [0, 1) -> B prompts with sources, uint8 edits [B, 16, 16, 3], true ones.

    A pure function of `u`, row by row: its columns pick the category (all alike), the first source and with it most of
    the instruction, the generator glyphs of the first and the second digit, and the new colour or the second source.

    flaws: pairs as a base is trained on, by the last column. FLAWS["copied"] of them show the first source again,
    FLAWS["redrawn"] the right digits in another hand: a base draws all three, and RL has to tell them apart.
    """
    u = np.asarray(u, dtype=np.float64)
    rows = [_task(CATEGORIES[int(row[0] * len(CATEGORIES))], row[1], row[4]) for row in u]
    copied = (u[:, -1] < FLAWS["copied"]) & flaws
    redrawn = ~copied & (u[:, -1] < sum(FLAWS.values())) & flaws
    draws = u[:, 2:4]
    pictures = _rendered(bank("generator"), rows, draws, np.where(redrawn[:, None], (draws + 0.5) % 1, draws))
    for row in np.flatnonzero(copied):
        pictures[row][-1] = pictures[row][0]
    prompts = [
        Prompt(FIRST_EDIT, edit.text, edit.operation, tuple(own[:-1]))
        for (edit, _), own in zip(rows, pictures, strict=True)
    ]
    return prompts, np.stack([own[-1] for own in pictures])


@lru_cache(maxsize=1)
def _world() -> dict[str, list[tuple[EditSpec, tuple[DigitSpec, ...], tuple[float, float]]]]:
    """The tasks of every category with their glyph draws; no instruction comes twice with the same source specs."""
    count, found = max(end for _, end in SPLITS.values()), {}
    for category in CATEGORIES:
        tasks, number = {}, 0
        while len(tasks) < count:
            words = np.frombuffer(digest(f"edit {category} {number}"), "<u4")[:4] / 2**32
            task = _task(category, words[0], words[1])
            tasks.setdefault(task, (*task, (float(words[2]), float(words[3]))))
            number += 1
        found[category] = list(tasks.values())
    return found


@lru_cache(maxsize=2)
def _prompts(split: str) -> tuple[Prompt, ...]:
    start, end = SPLITS[split]
    glyphs, chosen = bank("source" if split == "held_out" else "generator"), []
    for place, (category, tasks) in enumerate(_world().items()):
        own = tasks[start:end]
        draws = [task[2] for task in own]
        pictures = _rendered(glyphs, [task[:2] for task in own], draws, draws)
        for number, ((edit, *_), shown) in enumerate(zip(own, pictures, strict=True), start=start):
            chosen.append(Prompt(FIRST_EDIT + place * 1000 + number, edit.text, category, tuple(shown[:-1])))
    return tuple(chosen)


def prompts(split: str) -> list[Prompt]:
    """The edit prompts of a split, "train" (150 a category) or "held_out" (40), ordered by id, with their sources.

    Held-out combinations of instruction and source spec do not occur in train, and their glyphs are of the part
    "source", which nothing else shows.
    Raises UserError for another split.
    """
    if split not in SPLITS:
        raise UserError(f"prompt split '{split}' is unknown{nearest(split, SPLITS)}")
    return list(_prompts(split))
