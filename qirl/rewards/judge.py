"""The held-out judge: measures what training did and never takes part in it.

Its reader is trained on the "judge" part of the handwriting with another shape and seed than the reward's, and whether
a glyph survived an edit it decides without any network, by the correlation of strokes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qirl.data.digits import INKS, PAPERS, DigitSpec, parse
from qirl.rewards.digit_reader import DigitReader
from qirl.rewards.digits import colours_agree, digits_agree, geometric_mean, reader, stack
from qirl.rewards.edits import by_place, wanted_specs
from qirl.rewards.protocol import Sample

JUDGE = {"part": "judge", "seed": 2, "members": 2, "steps": 550, "width": 24, "kernel": 5}
SURVIVED = 0.92  # correlation from which on it is the same glyph: 2 % of other images of its digit reach it
RISE = 0.04  # width of the rise around it in `Judge.score`


class Judge:
    """Says of a picture whether it is right, and how surely."""

    def __init__(self, reader: DigitReader):
        self.reader = reader

    def correct(self, samples: Sequence[Sample]) -> np.ndarray:
        """bool [n]. Text-to-image: count and every digit are read right. An edit: the wanted digits, ink and paper are
        read right, and every glyph correlates with the source's in its wanted place at least SURVIVED.

        Raises UserError for a prompt or an instruction outside the grammar and for pictures of another size.
        """
        if not samples:
            return np.zeros(0, dtype=bool)
        specs, images = self._specs(samples), stack([sample.image for sample in samples])
        edits = np.array([sample.task == "edit" for sample in samples])
        kept = ~edits | (self.attributes_correct(images, specs) & (survival(samples, specs) >= SURVIVED))
        return self.digits_correct(images, specs) & kept

    def score(self, samples: Sequence[Sample]) -> np.ndarray:
        """float64 [n] in [0, 1], smooth, for comparing two outputs of one prompt.

        Geometric mean of the reader's agreement with the digits and with each colour asked for, and for an edit a
        logistic function of the glyphs' correlation, a half at SURVIVED.
        """
        if not samples:
            return np.zeros(0)
        specs, images = self._specs(samples), stack([sample.image for sample in samples])
        answers = self.reader.read(images)
        kept = 1 / (1 + np.exp((SURVIVED - survival(samples, specs)) / RISE))
        scores = []
        for place, (sample, spec) in enumerate(zip(samples, specs, strict=True)):
            answer = {head: column[place] for head, column in answers.items()}
            parts = [digits_agree(spec, answer)]
            parts += colours_agree(spec, answer) if spec.category != "plain" else ()
            scores.append(geometric_mean([*parts, kept[place]] if sample.sources else parts))
        return np.array(scores)

    def _specs(self, samples: Sequence[Sample]) -> list[DigitSpec]:
        edits = [sample for sample in samples if sample.task == "edit"]
        read = iter(wanted_specs(self.reader, edits) if edits else ())
        return [next(read) if sample.task == "edit" else parse(sample.prompt) for sample in samples]

    def digits_correct(self, images: np.ndarray, specs: Sequence[DigitSpec]) -> np.ndarray:
        """uint8 [B, 16, 16, 3] and what was asked for -> bool [B]: count and every digit are read right."""
        count, first, second = self._read(images, specs, "count", "first", "second")
        return np.array(
            [
                count[i] + 1 == len(spec.digits) and (first[i], second[i])[: count[i] + 1] == spec.digits
                for i, spec in enumerate(specs)
            ],
            dtype=bool,
        )

    def attributes_correct(self, images: np.ndarray, specs: Sequence[DigitSpec]) -> np.ndarray:
        """The same for the colours of ink and paper (white on black where the prompt names none)."""
        ink, paper = self._read(images, specs, "ink", "paper")
        inks, papers = list(INKS), list(PAPERS)
        right = [inks[ink[i]] == spec.ink and papers[paper[i]] == spec.paper for i, spec in enumerate(specs)]
        return np.array(right, dtype=bool)

    def _read(self, images: np.ndarray, specs: Sequence[DigitSpec], *heads: str) -> list[list[int]]:
        assert len(images) == len(specs), f"{len(images)} images for {len(specs)} specs"
        answers = self.reader.read(images)
        return [answers[head].argmax(-1).tolist() for head in heads]


def survival(samples: Sequence[Sample], specs: Sequence[DigitSpec]) -> np.ndarray:
    """How much the worst glyph of an edit's output looks like the source's: correlation in [-1, 1], float64 [n].

    1 for samples without sources.
    """
    rows = [row for row, sample in enumerate(samples) if sample.task == "edit"]
    found = np.ones(len(samples))
    if rows:
        edits, own = [samples[row] for row in rows], [specs[row] for row in rows]
        for places, glyphs, originals in by_place(edits, own):
            at = np.array(rows)[places]
            found[at] = np.minimum(found[at], correlation(glyphs, originals))
    return found


def correlation(glyphs: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Correlation of strokes [n, H, W], the best over shifts of up to one pixel: float64 [n]; 0 for an empty picture."""
    height, width = glyphs.shape[1:]
    padded = np.pad(glyphs.astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    target = _standard(originals.astype(np.float64))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.max([(_standard(shifted) * target).sum((1, 2)) for shifted in shifts], axis=0)


def _standard(planes: np.ndarray) -> np.ndarray:
    """Zero mean and unit length; an empty plane stays zero."""
    centred = planes - planes.mean((1, 2), keepdims=True)
    return centred / np.maximum(np.sqrt((centred**2).sum((1, 2), keepdims=True)), 1e-6)


def judge_reader(cache_dir: str | Path) -> DigitReader:
    """The reader behind `Judge`: another part of the handwriting, seed and shape (12 s on one core)."""
    return reader(cache_dir, JUDGE)


def held_out_judge() -> Judge:
    """The held-out judge: another part of the data, another network. Training never asks for it."""
    from qirl.run.cache import folder

    return Judge(judge_reader(folder()))
