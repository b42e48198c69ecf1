"""Rewards of the digits world: is it the right number, in the right colours, in clean ink?

The reader is trained on the "reward" part of the handwriting. Edits have rewards of their own (qirl.rewards.edits).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from qirl.data import digits, words
from qirl.data.digits import INKS, PAPERS, SIZE, DigitSpec, coverage, glyphs, parse
from qirl.errors import UserError
from qirl.rewards import digit_reader
from qirl.rewards.digit_reader import DigitReader, train_reader
from qirl.rewards.networks import trained_once
from qirl.rewards.protocol import Sample, Scores

REWARD = {"part": "reward", "seed": 1, "members": 3, "steps": 500, "width": 20, "kernel": 3}


class DigitRewards:
    """Scores pictures of the digits world by what their prompt asks for. Components, all in [0, 1]:

    digit: geometric mean of the probabilities of the right count and of each right digit. Not their product:
        the mean keeps the order, yet still tells the samples of a group apart when all are wrong, where
        products sink below the noise floor of the advantage, and it does not punish two digits twice.
    attribute: geometric mean of the probabilities of ink and paper; absent where the prompt names no colour.
    ink: `ink_quality`.

    A sample with sources is an edit and has none of them.
    """

    components = ("digit", "attribute", "ink")

    def __init__(self, reader: DigitReader):
        self.reader = reader

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        """One dict a sample. Raises UserError for a prompt outside the grammar or another size of picture."""
        results: list[Scores] = [{} for _ in samples]
        rows = [row for row, sample in enumerate(samples) if sample.task == "t2i"]
        if not rows:
            return results
        specs = [parse(samples[row].prompt) for row in rows]
        images = stack([samples[row].image for row in rows])
        answers = self.reader.read(images)
        qualities = ink_quality(images, specs)
        for place, (row, spec) in enumerate(zip(rows, specs, strict=True)):
            answer = {head: column[place] for head, column in answers.items()}
            results[row] = {"digit": digits_agree(spec, answer), "ink": float(qualities[place])}
            if spec.category != "plain":
                results[row]["attribute"] = geometric_mean(colours_agree(spec, answer))
        return results


def stack(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [B, 16, 16, 3]. Raises UserError for pictures of another type or size."""
    for image in images:
        if image.dtype != np.uint8 or image.shape != (SIZE, SIZE, 3):
            raise UserError(f"the digit rewards read uint8 [{SIZE}, {SIZE}, 3] pictures, not {image.dtype} "
                            f"{list(image.shape)}; use them with the digits world only")  # fmt: skip
    return np.stack(images)


def digits_agree(spec: DigitSpec, answer: dict[str, np.ndarray]) -> float:
    """Geometric mean of a reader's probabilities of the right count and of each right digit."""
    asked = [answer["count"][len(spec.digits) - 1], answer["first"][spec.digits[0]]]
    if len(spec.digits) == 2:
        asked.append(answer["second"][spec.digits[1]])
    return geometric_mean(asked)


def colours_agree(spec: DigitSpec, answer: dict[str, np.ndarray]) -> tuple[float, float]:
    """A reader's probabilities of the right ink and of the right paper."""
    return answer["ink"][list(INKS).index(spec.ink)], answer["paper"][list(PAPERS).index(spec.paper)]


def geometric_mean(values: Sequence[float]) -> float:
    """Of values in [0, 1]."""
    return float(np.clip(np.prod(values, dtype=np.float64) ** (1 / len(values)), 0, 1))


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
    # An edit of a user's picture may want ink and paper of one colour: nothing is then on the paper.
    cover = np.clip((pixels * axis).sum(-1) / np.maximum((axis**2).sum(-1), 1e-6), 0, 1)
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


def reward_reader(cache_dir: str | Path) -> DigitReader:
    """The reader behind the rewards: trained once (15 s on one core), then loaded from `cache_dir`."""
    return reader(cache_dir, REWARD)


def reader(cache_dir: str | Path, arguments: dict) -> DigitReader:
    """The reader that train_reader(**arguments) makes, trained once."""
    modules = (digit_reader, digits, words)
    return trained_once(cache_dir, "digit_reader", arguments, modules, train_reader, DigitReader.load)
