"""What a reward is: a callable from samples to one dict of component scores per sample.

    def warmth(samples):
        return [{"warmth": float(s.image[..., 0].mean() / 255)} for s in samples]

A reward may say more about itself: `components`, the names it returns (weights are then checked before the run starts),
and `read_noise`, {component: how much its reading of one image varies}, below which a group gives no signal.

Plain functions and `async def` both work. A component missing from a sample's dict does not apply to that
sample; NaN means that scoring failed (section 5 of the algorithm page).
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qirl.errors import UserError

Scores = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One generated image and what was asked for. `image` and `sources` are uint8 [H, W, 3]."""

    id: int
    prompt_id: int
    prompt: str
    image: np.ndarray
    category: str = "general"
    sources: tuple[np.ndarray, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """t2i, or edit where there are source images."""
        return "edit" if self.sources else "t2i"


Reward = Callable[[Sequence[Sample]], "list[Scores] | Awaitable[list[Scores]]"]


def score(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[Scores]:
    """Runs every reward over all samples and merges their components, per sample, in sample order.

    Raises UserError if a reward returns the wrong number of results, a component twice or a value outside [0, 1].
    """

    async def run_one(reward: Reward) -> list[Scores]:
        result = reward(samples)
        return await result if inspect.isawaitable(result) else result

    async def run_all() -> list[list[Scores]]:
        return await asyncio.gather(*(run_one(reward) for reward in rewards))

    with ThreadPoolExecutor(1) as pool:  # its own thread: the caller may live inside an event loop (a notebook)
        everything = pool.submit(lambda: asyncio.run(run_all())).result()
    merged: list[Scores] = [{} for _ in samples]
    for reward, results in zip(rewards, everything, strict=True):
        name = getattr(reward, "__name__", type(reward).__name__)
        if len(results) != len(samples):
            raise UserError(
                f"reward {name} returned {len(results)} results for {len(samples)} samples; return one dict per sample"
            )
        for scores, result in zip(merged, results, strict=True):
            _check_components(name, scores, result)
            scores.update({component: float(value) for component, value in result.items()})
    return merged


def _check_components(name: str, known: Scores, new: Scores) -> None:
    for component, value in new.items():
        if component in known:
            raise UserError(f"two rewards return the component '{component}' (one is {name}); rename one")
        if not (math.isnan(value) or 0.0 <= value <= 1.0):
            raise UserError(
                f"reward {name}: {component}={value} is outside [0, 1]; map it to that range (NaN where scoring failed)"
            )
