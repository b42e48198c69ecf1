"""Rewards of the digits world: is it the right number, in the right colours, in clean ink?

The reward's reader is trained on the "reward" part of the handwriting. `Judge` asks another reader, trained
on the "judge" part with another shape and seed: it measures what training did and never takes part in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from qirl.data import digits, words
from qirl.data.digits import INKS, PAPERS, SIZE, DigitSpec, coverage, glyphs, parse
from qirl.errors import UserError
from qirl.rewards import digit_reader
from qirl.rewards.digit_reader import DigitReader, train_reader
from qirl.rewards.protocol import Sample, Scores

REWARD = {"part": "reward", "seed": 1, "members": 3, "steps": 500, "width": 20, "kernel": 3}
JUDGE = {"part": "judge", "seed": 2, "members": 2, "steps": 550, "width": 24, "kernel": 5}


class DigitRewards:
    """Scores pictures of the digits world by what their prompt asks for. Components, all in [0, 1]:

    digit: geometric mean of the probabilities of the right count and of each right digit. Not their product:
        the mean keeps the order, yet still tells the samples of a group apart when all are wrong, where
        products sink below the noise floor of the advantage, and it does not punish two digits twice.
    attribute: geometric mean of the probabilities of ink and paper; absent where the prompt names no colour.
    ink: `ink_quality`.
    """

    components = ("digit", "attribute", "ink")

    def __init__(self, reader: DigitReader):
        self.reader = reader

    async def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        """One dict a sample. Raises UserError for a prompt outside the grammar or another size of picture."""
        if not samples:
            return []
        specs = [parse(sample.prompt) for sample in samples]
        images = _stack([sample.image for sample in samples])
        answers = self.reader.read(images)
        qualities = ink_quality(images, specs)
        return [
            _scores(spec, {head: row[place] for head, row in answers.items()}, float(qualities[place]))
            for place, spec in enumerate(specs)
        ]


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    for image in images:
        if image.dtype != np.uint8 or image.shape != (SIZE, SIZE, 3):
            raise UserError(f"the digit rewards read uint8 [{SIZE}, {SIZE}, 3] pictures, not {image.dtype} "
                            f"{list(image.shape)}; use them with the digits world only")  # fmt: skip
    return np.stack(images)


def _scores(spec: DigitSpec, answer: dict[str, np.ndarray], quality: float) -> Scores:
    asked = [answer["count"][len(spec.digits) - 1], answer["first"][spec.digits[0]]]
    if len(spec.digits) == 2:
        asked.append(answer["second"][spec.digits[1]])
    scores = {"digit": _geometric_mean(asked), "ink": quality}
    if spec.category != "plain":
        place = list(INKS).index(spec.ink), list(PAPERS).index(spec.paper)
        scores["attribute"] = _geometric_mean([answer["ink"][place[0]], answer["paper"][place[1]]])
    return scores


def _geometric_mean(probabilities: Sequence[float]) -> float:
    return float(np.clip(np.prod(probabilities, dtype=np.float64) ** (1 / len(probabilities)), 0, 1))


def ink_quality(images: np.ndarray, specs: Sequence[DigitSpec]) -> np.ndarray:
    """How much pictures look like pen on paper in the colours asked for: float64 [B] in [0, 1].

    Nothing here is learned. Each pixel is put on the line from paper to ink (coverage, 0 to 1). Four factors,
    each 1 over the range of real renders and falling smoothly outside: colours on that line; coverage near 0
    or 1, little between; as much ink as real glyphs have; few pixels that stand out from all four neighbours.
    """
    inks, papers = (
        np.array([table[name] for name in names])[:, None, None] / 255
        for table, names in ((INKS, [spec.ink for spec in specs]), (PAPERS, [spec.paper for spec in specs]))
    )
    axis, pixels = inks - papers, images / 255 - papers
    cover = np.clip((pixels * axis).sum(-1) / (axis**2).sum(-1), 0, 1)
    off = np.sqrt(((pixels - cover[..., None] * axis) ** 2).sum(-1).mean((1, 2)))
    between = (4 * cover * (1 - cover)).sum((1, 2)) / (cover.sum((1, 2)) + 1)
    low, high = np.array([_ink_range(len(spec.digits)) for spec in specs]).reshape(-1, 2).T
    mass = cover.mean((1, 2))
    misfit = np.maximum(np.maximum(low - mass, mass - high), 0)
    excess = [off / 0.15, _above(between, 0.5) / 0.8, misfit / 0.08, _above(_speckle(cover), 0.003) / 0.01]
    return np.exp(-np.square(excess).sum(0))


def _above(value: np.ndarray, limit: float) -> np.ndarray:
    return np.maximum(value - limit, 0)


@lru_cache(maxsize=2)
def _ink_range(count: int) -> tuple[float, float]:
    """Mean coverage that all but the 2 % thinnest and the 2 % boldest real glyphs lie between."""
    low, high = np.percentile(coverage(glyphs("reward")[0], count).mean((1, 2)), [2, 98])
    return float(low), float(high)


def _speckle(cover: np.ndarray) -> np.ndarray:
    """Mean height of a pixel over, or depth under, all of its four neighbours: [B, 16, 16] -> [B]."""
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    around = [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
    peaks = _above(cover, np.maximum.reduce(around))
    pits = _above(np.minimum.reduce(around), cover)
    return (peaks + pits).mean((1, 2))


class Judge:
    """The held-out judge: says yes or no, and is asked by evaluation only."""

    def __init__(self, reader: DigitReader):
        self.reader = reader

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


def reward_reader(cache_dir: str | Path) -> DigitReader:
    """The reader behind `DigitRewards`: trained once (15 s on one core), then loaded from `cache_dir`."""
    return _cached(cache_dir, REWARD)


def judge_reader(cache_dir: str | Path) -> DigitReader:
    """The reader behind `Judge`: another part of the handwriting, seed and shape (12 s on one core)."""
    return _cached(cache_dir, JUDGE)


def _cached(cache_dir: str | Path, arguments: dict) -> DigitReader:
    """The file's name holds a hash of the arguments and of the code that makes pictures and reader."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (digit_reader, digits, words)]
    digest = hashlib.sha256(json.dumps([arguments, *sources]).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"digit_reader_{arguments['part']}_{digest}.safetensors"
    if path.exists():
        return DigitReader.load(path)
    reader = train_reader(**arguments)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reader.save(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the digit reader to {path.parent} ({error}); choose a writable folder") from None
    return reader
