"""What a reward is: a callable from samples to one dict of component scores per sample.

    def warmth(samples):
        return [{"warmth": float(s.image[..., 0].mean() / 255)} for s in samples]

A reward may say more about itself: `components`, the names it returns (weights are then checked before the run starts),
and `read_noise`, {component: how much its reading of one image varies}, below which a group gives no signal.

Plain functions and `async def` both work. A component missing from a sample's dict does not apply to that
sample; NaN means that scoring failed (section 5 of the algorithm page).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qirl.errors import UserError

Scores = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One generated image and what was asked for. `image` and `sources` are uint8 [H, W, 3].

    failed: its latents are not finite, so there is no image: no reward is asked, and all its scores are NaN.
    """

    id: int
    prompt_id: int
    prompt: str
    image: np.ndarray
    category: str = "general"
    sources: tuple[np.ndarray, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    @property
    def task(self) -> str:
        """t2i, or edit where there are source images."""
        return "edit" if self.sources else "t2i"


Reward = Callable[[Sequence[Sample]], "list[Scores] | Awaitable[list[Scores]]"]


def is_async(reward: Reward) -> bool:
    """Whether a call gives a coroutine, to be awaited on the event loop, and no result, for which a thread is kept."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def name_of(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def check(reward: Reward, samples: Sequence[Sample], results: Sequence[Scores]) -> None:
    """Raises UserError if a reward returned the wrong number of results or a value outside [0, 1] that is not NaN."""
    if len(results) != len(samples):
        raise UserError(
            f"reward {name_of(reward)} returned {len(results)} results for {len(samples)} samples; return one dict per "
            "sample"
        )
    for component, value in (pair for row in results for pair in row.items()):
        if not (math.isnan(value) or 0.0 <= value <= 1.0):
            raise UserError(
                f"reward {name_of(reward)}: {component}={value} is outside [0, 1]; map it to that range (NaN where "
                "scoring failed)"
            )


def merge(rewards: Sequence[Reward], results: Sequence[Sequence[Scores]], count: int) -> list[Scores]:
    """One dict per sample out of one list per reward. Raises UserError for a component that two rewards return."""
    merged: list[Scores] = [{} for _ in range(count)]
    for reward, rows in zip(rewards, results, strict=True):
        for scores, row in zip(merged, rows, strict=True):
            if twice := scores.keys() & row.keys():
                raise UserError(
                    f"two rewards return the component '{min(twice)}' (one is {name_of(reward)}); rename one"
                )
            scores.update({component: float(value) for component, value in row.items()})
    return merged
