"""How well a judge agrees with its raters, by dimension (rubric), on held-out records.

srcc, plcc       Spearman's and Pearson's correlation of R with the raters' score
pair_accuracy    of the pairs inside one prompt that raters rank, the share ranked alike; a tie counts a half
ties             the share of those pairs whose R differ by less than 0.001
calibration      mean |mean R - mean score| over bins of R half a point wide, weighted by their sizes
noise            pooled standard error of the mean of K chains, in points of 1 to 5
failed           the share without a score; such records leave everything else
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import stats

from qirl.rewards.vlm.reading import Reading
from qirl.rewards.vlm.records import Record, by_prompt

TIE = 1e-3
MEASURES = ("srcc", "plcc", "pair_accuracy", "ties", "calibration", "noise", "failed")


def measure(records: Sequence[Record], readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """{dimension: {"records": n, measure: value}}; NaN where a dimension has too little to say."""
    dimensions: dict[str, list[tuple[Record, Reading]]] = defaultdict(list)
    for pair in zip(records, readings, strict=True):
        dimensions[pair[0].rubric].append(pair)
    return {name: _measure(own) for name, own in sorted(dimensions.items())}


def _measure(pairs: Sequence[tuple[Record, Reading]]) -> dict[str, float]:
    read = [(record, reading) for record, reading in pairs if not math.isnan(reading.score)]
    found = {"records": len(pairs), "failed": 1 - len(read) / len(pairs)}
    score = np.array([reading.score for _, reading in read])
    wanted = np.array([record.score for record, _ in read])
    noise = [reading.noise**2 for _, reading in read if not math.isnan(reading.noise)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant, which has no correlation: NaN says so
        several = len(read) > 2
        found["srcc"] = float(stats.spearmanr(score, wanted).statistic) if several else math.nan
        found["plcc"] = float(stats.pearsonr(score, wanted).statistic) if several else math.nan
    found["pair_accuracy"], found["ties"] = _pairs(read)
    found["calibration"] = calibration_error(score, wanted) if read else math.nan
    found["noise"] = math.sqrt(float(np.mean(noise))) if noise else math.nan
    return found


def _pairs(read: Sequence[tuple[Record, Reading]]) -> tuple[float, float]:
    """(accuracy, share of ties) over the pairs of one prompt that the raters rank."""
    score = {id(record): reading.score for record, reading in read}
    right = []
    for group in by_prompt([record for record, _ in read]):
        for a, b in itertools.combinations(group, 2):
            if a.score != b.score:
                ahead = (score[id(a)] - score[id(b)]) * (1 if a.score > b.score else -1)
                right.append(0.5 if abs(ahead) < TIE else float(ahead > 0))
    return (float(np.mean(right)), right.count(0.5) / len(right)) if right else (math.nan, math.nan)


def calibration_error(score: np.ndarray, wanted: np.ndarray, width: float = 0.5) -> float:
    """float64 [n] each, in [1, 5]."""
    bins = np.floor((score - 1) / width).astype(int)
    errors = [abs(score[bins == b].mean() - wanted[bins == b].mean()) * (bins == b).sum() for b in np.unique(bins)]
    return float(sum(errors) / len(score))
