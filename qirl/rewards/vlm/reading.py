"""Reading a score out of a judge (algorithm page, section 5).

expected_cot      the judge reasons up to `<score>`; a second call appends `<score>` and reads the probabilities of the next
                  token: R is their expectation over 1 to 5
expected_direct   the second call alone, after an empty reasoning
parsed            the digit inside the last `<score>` that the judge itself writes

A chain counts only if it was not cut off and its five digits hold at least half of the probability; else it is drawn again
with another seed, twice, and then is NaN, which means "failed". The position that is read is the one that the second call
appends: neither a prompt nor a picture can move it. Nothing constrains the decoding, which would empty the test of mass.
"""

from __future__ import annotations

import math
import re
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qirl.kernels.score_expectation import score_expectation
from qirl.rewards.vlm.rubric import END_SCORE, SCORE, THINK, begun_answer

TRIES = 3
DIGITS = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class Written:
    """What a judge wrote, and whether it came to an end (not cut off by the limit of tokens)."""

    text: str
    finished: bool


class Chat(Protocol):
    """A vision-language model that goes on with `prefix`, the beginning of its answer to `messages` about `images`."""

    async def write(self, messages: list[dict], images: Sequence, prefix: str, stop: str, seed: int) -> Written:
        """What it writes up to `stop` (left out)."""

    async def digits(self, messages: list[dict], images: Sequence, prefix: str) -> Sequence[float]:
        """Log-probabilities of the tokens 1 to 5 as the next one; -inf for one that is not known."""


@dataclass(frozen=True)
class Reading:
    """score in [1, 5], or NaN: the mean of the chains that could be read. noise: their standard deviation over the square
    root of their number, NaN for fewer than two. text: the reasoning of the first one."""

    score: float
    chains: tuple[float, ...]
    text: str = ""

    @property
    def noise(self) -> float:
        valid = [c for c in self.chains if not math.isnan(c)]
        return statistics.stdev(valid) / math.sqrt(len(valid)) if len(valid) > 1 else math.nan


async def read(
    chat: Chat, messages: list[dict], images: Sequence, mode: str, chains: int = 1, seed: int = 0
) -> Reading:
    """Asks for a score. Raises what `chat` raises."""
    scores, first = [], ""
    for chain in range(chains):
        score, text = await _chain(chat, messages, images, mode, f"{seed}/{chain}")
        scores.append(score)
        first = first or text
    valid = [score for score in scores if not math.isnan(score)]
    return Reading(statistics.fmean(valid) if valid else math.nan, tuple(scores), first)


async def _chain(chat: Chat, messages, images, mode: str, key: str) -> tuple[float, str]:
    """(score or NaN, reasoning) of one chain."""
    if mode == "expected_direct":
        return expectation(await chat.digits(messages, images, begun_answer())), ""
    text = ""
    for attempt in range(TRIES):
        seed = zlib.crc32(f"{key}/{attempt}".encode()) & 0x7FFFFFFF
        written = await chat.write(messages, images, THINK, END_SCORE if mode == "parsed" else SCORE, seed)
        text, score = written.text, math.nan
        if written.finished and mode == "parsed":
            score = parse(written.text)
        elif written.finished:
            score = expectation(await chat.digits(messages, images, THINK + written.text + SCORE))
        if not math.isnan(score):
            return score, text
    return math.nan, text


def expectation(log_probs: Sequence[float]) -> float:
    """R in [1, 5], or NaN where the five tokens hold too little, or what came is no log-probability."""
    if len(log_probs) != 5 or any(math.isnan(p) or p > 1e-3 for p in log_probs):
        return math.nan
    score = float(score_expectation(torch.tensor(list(log_probs), dtype=torch.float64)))
    return min(5.0, max(1.0, score)) if not math.isnan(score) else score


def parse(text: str) -> float:
    """The digit after the last `<score>` of what the judge wrote up to `</score>`; NaN if it is none of 1 to 5."""
    _, found, tail = text.rpartition(SCORE)
    match = re.fullmatch(r"\s*([1-5])\s*", tail, re.ASCII)
    return float(match[1]) if found and match else math.nan
