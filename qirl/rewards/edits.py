"""Rewards of edits: was the instruction followed, did the very glyphs survive, is it clean ink?

All is judged on the triple of sources, instruction and output: the reward's reader reads the sources, the instruction
says what the output is to show. What the instruction does not name must stay, so a returned copy of the source scores
low on `instruction`, and the right digit in another hand scores low on `identity`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qirl.data.digits import INKS, PAPERS, SIZE, DigitSpec
from qirl.data.edits import EditSpec, parse_instruction, picture_of, wanted
from qirl.errors import UserError
from qirl.rewards.digit_reader import DigitReader
from qirl.rewards.digits import colours_agree, digits_agree, geometric_mean, ink_quality, stack
from qirl.rewards.glyphs import GlyphEmbedding, places, plane
from qirl.rewards.protocol import Sample, Scores

COPY = 0.02  # mean absolute distance of pixels in [0, 1] below which the output is the source again


class EditRewards:
    """Scores edits of the digits world. Components, all in [0, 1]; a sample without sources has none of them:

    instruction: geometric mean of the reader's agreement with the wanted digits (their own geometric mean with the
        count), the wanted ink and the wanted paper.
    identity: mean over the wanted glyphs of how surely the glyph in its place is the source's (`GlyphEmbedding`).
    ink: `ink_quality` in the wanted colours.
    """

    components = ("instruction", "identity", "ink")

    def __init__(self, reader: DigitReader, embedding: GlyphEmbedding):
        self.reader, self.embedding = reader, embedding

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        """One dict a sample. Raises UserError for an instruction outside the grammar and for unfit sources."""
        results: list[Scores] = [{} for _ in samples]
        rows = [row for row, sample in enumerate(samples) if sample.task == "edit"]
        if not rows:
            return results
        chosen = [samples[row] for row in rows]
        specs, images = wanted_specs(self.reader, chosen), stack([sample.image for sample in chosen])
        answers, qualities = self.reader.read(images), ink_quality(images, specs)
        identities = np.zeros(len(rows))
        for own, glyphs, originals in by_place(chosen, specs):
            identities[own] += self.embedding.identity(glyphs, originals) / [len(specs[row].digits) for row in own]
        for place, (row, spec) in enumerate(zip(rows, specs, strict=True)):
            answer = {head: column[place] for head, column in answers.items()}
            instruction = geometric_mean([digits_agree(spec, answer), *colours_agree(spec, answer)])
            results[row] = {
                "instruction": instruction,
                "identity": float(np.clip(identities[place], 0, 1)),
                "ink": float(qualities[place]),
            }
        return results


def wanted_specs(reader: DigitReader, samples: Sequence[Sample]) -> list[DigitSpec]:
    """What each edit's output is to show, as `reader` reads its sources.

    How many digits a source has is read too, unless the instruction says it (swap: two, compose: one each). The source
    of a swap is read with its halves exchanged: every glyph is then read in the place where it is wanted.
    Raises UserError for an instruction outside the grammar, and for the wrong number or size of sources.
    """
    edits = [parse_instruction(sample.prompt) for sample in samples]
    for edit, sample in zip(edits, samples, strict=True):
        if len(sample.sources) != edit.sources:
            raise UserError(f"instruction '{sample.prompt}' needs {edit.sources} sources, not {len(sample.sources)}")
    pictures = [
        _exchanged(s) if e.operation == "swap" else s
        for e, own in zip(edits, samples, strict=True)
        for s in own.sources
    ]
    answers = reader.read(stack(pictures))
    read = {head: column.argmax(-1).tolist() for head, column in answers.items()}
    specs, at = [], 0
    for edit in edits:
        sources = [_source(edit, {head: column[at + i] for head, column in read.items()}) for i in range(edit.sources)]
        specs.append(wanted(edit, sources))
        at += edit.sources
    return specs


def _source(edit: EditSpec, read: dict[str, int]) -> DigitSpec:
    count = {"swap": 2, "compose": 1}.get(edit.operation, read["count"] + 1)
    digits = (read["first"], read["second"])[:count]
    digits = digits[::-1] if edit.operation == "swap" else digits
    return picture_of(digits, list(INKS)[read["ink"]], list(PAPERS)[read["paper"]])


def _exchanged(planes: np.ndarray, axis: int = 1) -> np.ndarray:
    """Left and right half change places."""
    return np.roll(planes, SIZE // 2, axis=axis)


def by_place(samples: Sequence[Sample], specs: Sequence[DigitSpec]):
    """Yields (rows, glyphs, originals) for one-digit edits and for each place of two-digit ones.

    rows: places in `samples`; glyphs: the output's strokes there, float32 [n, 16, 16 or 8]; originals: the strokes of
    the source's glyph that is wanted there.
    """
    found = plane(stack([sample.image for sample in samples]))
    before = plane(stack([sample.sources[0] for sample in samples]))
    swapped = [parse_instruction(sample.prompt).operation == "swap" for sample in samples]
    before[swapped] = _exchanged(before[swapped], axis=2)
    for count in (1, 2):
        rows = [row for row, spec in enumerate(specs) if len(spec.digits) == count]
        if rows:
            for glyphs, originals in zip(places(found[rows], count), places(before[rows], count), strict=True):
                yield rows, glyphs, originals


def copies(samples: Sequence[Sample]) -> np.ndarray:
    """Whether the output of an edit is one of its sources again (mean pixel distance below COPY): bool [n].

    The laziest way to keep identity; a sample without sources is none.
    """
    return np.array(
        [
            any(
                np.abs(s.image / 255.0 - source / 255.0).mean() < COPY
                for source in s.sources
                if source.shape == s.image.shape
            )
            for s in samples
        ],
        dtype=bool,
    )
