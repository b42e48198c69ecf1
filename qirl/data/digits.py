"""The digits world: real handwriting, coloured and composed.

scikit-learn's bundled digits (1,797 images of 8x8, by real people) are split by image into four parts that
never mix: "generator" (what the base model sees), "source" (what held-out edits start from), "reward" (the
reward's networks) and "judge" (the held-out judge). A prompt such as "a red 7 on blue" or "35 in green" names digits, ink and paper; a picture of it is
16x16 RGB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qirl.data.prompts import Prompt
from qirl.data.words import COLOURS, INKS, PAPERS, DigitSpec, contrasting, describe, parse
from qirl.errors import UserError, nearest

__all__ = [
    "CATEGORIES", "COLOURS", "INKS", "PAPERS", "PARTS", "SIZE", "UNIFORMS",
    "Bank", "DigitSpec", "bank", "contrasting", "coverage", "describe", "digest", "example", "examples", "glyphs",
    "paint", "parse", "prompts", "render",
]  # fmt: skip
SIZE = 16  # pixels of a side
PARTS = ("generator", "source", "reward", "judge")
CUTS = (0, 45, 50, 75, 100)  # per cent of every digit's images where the parts begin and end
CATEGORIES = ("plain", "colour", "background", "two_digits")
UNIFORMS = 6  # category, prompt in it, first glyph, second glyph; of edits the new colour or second source, the flaw


@lru_cache(maxsize=1)
def _world() -> dict[str, list[DigitSpec]]:
    """The prompts of every category, in the order that fixes their ids: a change renumbers them."""
    one, two = [(d,) for d in range(10)], [(d // 10, d % 10) for d in range(10, 100)]
    pairs = [(ink, paper) for paper in PAPERS if paper != "black" for ink in INKS if contrasting(ink, paper)]
    return {
        "plain": [DigitSpec(d) for d in one],
        "colour": [DigitSpec(d, ink, "black", "colour") for d in one for ink in INKS if ink != "white"],
        "background": [DigitSpec(d, ink, paper, "background") for d in one for ink, paper in pairs],
        "two_digits": [DigitSpec(d, ink, "black", "two_digits") for d in two for ink in INKS],
    }


def digest(text: str) -> bytes:
    """32 bytes that put things of the digits world in an order nobody chose."""
    return hashlib.sha256(f"digits world 1: {text}".encode()).digest()


@lru_cache(maxsize=2)
def _prompts(split: str) -> tuple[Prompt, ...]:
    chosen, start = [], 0
    for category, specs in _world().items():
        texts = [describe(spec) for spec in specs]
        held = set(sorted(texts, key=digest)[: len(texts) // 5])
        chosen += [
            Prompt(start + place, text, category)
            for place, text in enumerate(texts)
            if (text in held) == (split == "held_out")
        ]
        start += len(texts)
    return tuple(chosen)


def prompts(split: str) -> list[Prompt]:
    """The prompts of a split, "train" or "held_out", ordered by id.

    A fifth of every category (two of the ten plain prompts) is held out and never occurs in train. Categories differ
    a lot in size: sample by category.
    Raises UserError for another split.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"prompt split '{split}' is unknown{nearest(split, ('train', 'held_out'))}")
    return list(_prompts(split))


@lru_cache(maxsize=len(PARTS))
def glyphs(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Handwriting of one part: images float32 [n, 8, 8] in [0, 1], labels int64 [n], ids int64 [n].

    Of each digit's images, ordered by a hash of their number in scikit-learn's data set, the first 45 % are
    "generator", 5 % "source", a quarter "reward", the rest "judge". The arrays are shared and read-only.
    Raises UserError for another part.
    """
    if part not in PARTS:
        raise UserError(f"part '{part}' of the handwriting is unknown{nearest(part, PARTS)}")
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = []
    for digit in range(10):
        ids = sorted(np.flatnonzero(data.target == digit).tolist(), key=lambda i: digest(f"image {i}"))
        cuts = [len(ids) * cut // 100 for cut in CUTS]
        place = PARTS.index(part)
        chosen += ids[cuts[place] : cuts[place + 1]]
    ids = np.array(sorted(chosen), dtype=np.int64)
    result = (data.images[ids] / 16).astype(np.float32), data.target[ids].astype(np.int64), ids
    for array in result:
        array.setflags(write=False)
    return result


def _resize_matrix(size: int) -> np.ndarray:
    """Cubic (Catmull-Rom) interpolation from 8 samples to `size`, edges repeated: float32 [size, 8]."""
    matrix = np.zeros((size, 8))
    for row in range(size):
        centre = (row + 0.5) * 8 / size - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            weight = 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            matrix[row, min(max(tap, 0), 7)] += weight
    return matrix.astype(np.float32)


def coverage(images: np.ndarray, count: int) -> np.ndarray:
    """Ink on each pixel of a glyph's place, one of `count`: float32 [n, 8, 8] -> [n, 16, 16 // count].

    One digit fills the picture; of two, each is 8 wide and 14 high. The contrast is raised so that strokes
    reach full ink (1) and the gaps bare paper (0).
    """
    height = SIZE if count == 1 else SIZE - 2
    rows, columns = _resize_matrix(height), _resize_matrix(SIZE // count)
    smooth = np.clip((rows @ images @ columns.T - 0.25) / 0.5, 0, 1)
    smooth = smooth * smooth * (3 - 2 * smooth)
    above = (SIZE - height) // 2
    return np.pad(smooth, ((0, 0), (above, above), (0, 0))).astype(np.float32)


def paint(cover: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """Colours coverage [..., 16, 16] with RGB ink and paper [..., 3] (0..255): uint8 [..., 16, 16, 3]."""
    ink, paper = (np.asarray(colour, np.float32)[..., None, None, :] for colour in (ink, paper))
    return np.rint(paper + cover[..., None] * (ink - paper)).astype(np.uint8)


def render(spec: DigitSpec, images: np.ndarray) -> np.ndarray:
    """Draws `spec` with one glyph a digit: float32 [len(spec.digits), 8, 8] -> uint8 [16, 16, 3]."""
    assert len(images) == len(spec.digits), f"{len(images)} glyphs for {len(spec.digits)} digits"
    cover = np.concatenate(list(coverage(images, len(images))), axis=-1)
    return paint(cover, INKS[spec.ink], PAPERS[spec.paper])


@dataclass(frozen=True)
class Bank:
    """Coverage of all glyphs of one part, as a single digit [n, 16, 16] and as half of two [n, 16, 8]."""

    single: np.ndarray
    half: np.ndarray
    by_digit: list[np.ndarray]

    def pick(self, digit: int, u: float) -> int:
        """The place of one of the digit's glyphs, all alike, by a uniform in [0, 1)."""
        return self.by_digit[digit][int(u * len(self.by_digit[digit]))]

    def cover(self, places: Sequence[int]) -> np.ndarray:
        """Coverage [16, 16] of a picture of one or two glyphs."""
        return self.single[places[0]] if len(places) == 1 else np.concatenate(self.half[list(places)], axis=-1)


@lru_cache(maxsize=len(PARTS))
def bank(part: str) -> Bank:
    """The glyphs of one part, drawn once."""
    images, labels, _ = glyphs(part)
    return Bank(coverage(images, 1), coverage(images, 2), [np.flatnonzero(labels == digit) for digit in range(10)])


def examples(u: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Training examples of text-to-image: uniforms [B, UNIFORMS] in [0, 1) -> B texts, uint8 [B, 16, 16, 3].

    A pure function of `u`, row by row: its columns pick the category (all alike), the prompt in it (train and
    held-out alike) and the generator glyphs of the first and the second digit.
    """
    u = np.asarray(u, dtype=np.float64)
    assert u.shape == (len(u), UNIFORMS), f"uniforms of shape {u.shape}"
    assert ((u >= 0) & (u < 1)).all(), "uniforms outside [0, 1)"
    strokes = bank("generator")
    texts, covers, inks, papers = [], [], [], []
    for row in u:
        options = _world()[CATEGORIES[int(row[0] * len(CATEGORIES))]]
        spec = options[int(row[1] * len(options))]
        covers.append(strokes.cover([strokes.pick(d, x) for d, x in zip(spec.digits, row[2:], strict=False)]))
        texts.append(describe(spec))
        inks.append(INKS[spec.ink])
        papers.append(PAPERS[spec.paper])
    return texts, paint(np.stack(covers), np.array(inks), np.array(papers))


def example(u: Sequence[float]) -> tuple[str, np.ndarray]:
    """One training example from UNIFORMS uniforms in [0, 1): its text and its picture, uint8 [16, 16, 3]."""
    texts, pictures = examples(np.asarray(u)[None])
    return texts[0], pictures[0]
