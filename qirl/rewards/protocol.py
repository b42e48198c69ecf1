"""What a reward is: a callable from samples to one dict of component scores per sample.

    def warmth(samples):
        return [{"warmth": float(s.image[..., 0].mean() / 255)} for s in samples]

or to one number per sample (a list, a 1-D tensor or array): one component, named after the function.

A reward may say more about itself: `components`, the names it returns (weights are then checked before the run starts);
`range`, (low, high) or {component: (low, high)}, whose scores are then mapped to [0, 1] and clipped; and `read_noise`,
{component: how much its reading of one image varies}, below which a group gives no signal. That is read once, before the
first step; a reward that finds it out by reading an image more than once returns noisy scores. Advantages are
normalised inside a group, so any finite score will do in training; curation, calibration, caps and gates need scores in
[0, 1].

Plain functions and `async def` both work. A component missing from a sample's dict does not apply to that
sample; NaN or None means that scoring failed (section 5 of the algorithm page).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qirl.config_parts import between
from qirl.data.images import as_uint8
from qirl.errors import UserError

Scores = dict[str, float]


class NoisyScore(float):
    """A score with the standard error of its own reading, in the score's units. Trainers pool it over samples and ranks."""

    noise: float

    def __new__(cls, score: float, noise: float):
        self = super().__new__(cls, score)
        self.noise = float(noise)
        return self

    def __getnewargs__(self) -> tuple[float, float]:
        return float(self), self.noise


def noise_of(score: float) -> float:
    """The noise of a score's own reading, NaN where nobody measured it."""
    return getattr(score, "noise", math.nan)


def declared_noise(rewards: Sequence[Reward]) -> dict[str, float]:
    """{component: read noise} as the rewards' attributes say it."""
    return {name: value for reward in rewards for name, value in getattr(reward, "read_noise", {}).items()}


@dataclass(frozen=True)
class Sample:
    """One generated image and what was asked for. `image` and `sources` are uint8 [H, W, 3]; uint16 is scaled to uint8.

    Raises UserError for images of other dtypes and shapes.

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

    def __post_init__(self):
        sources = tuple(as_uint8(image, f"source {i} of sample {self.id}") for i, image in enumerate(self.sources))
        object.__setattr__(self, "image", as_uint8(self.image, f"the image of sample {self.id}"))
        object.__setattr__(self, "sources", sources)

    @classmethod
    def of(cls, number: int, prompt, image: np.ndarray, failed: bool = False) -> Sample:
        """An image of a `qirl.data.prompts.Prompt`."""
        own = (prompt.id, prompt.text, image, prompt.category, prompt.sources, prompt.metadata)
        return cls(number, *own, failed=failed)

    @property
    def task(self) -> str:
        """t2i, or edit where there are source images."""
        return "edit" if self.sources else "t2i"


Reward = Callable[[Sequence[Sample]], "list[Scores] | Awaitable[list[Scores]]"]


def is_async(reward: Reward) -> bool:
    """Whether a call gives a coroutine, to be awaited on the event loop, and no result, for which a thread is kept."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def name_of(reward: Reward) -> str:
    while isinstance(reward, functools.partial) and not hasattr(reward, "__name__"):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


FORM = "return one number or one {component: number} per sample, None or NaN where scoring failed"


def rows_of(reward: Reward, samples: Sequence[Sample], results: Any) -> list[Scores]:
    """What a reward returned, as one {component: float} per sample; scores of a declared range in [0, 1].

    results: a sequence, or a 1-D tensor or array, of numbers, dicts and None. Raises UserError for any other form, for another
    number of results than samples, and for an infinite score.
    """
    if hasattr(results, "tolist"):  # a tensor or an array
        if results.ndim != 1:
            raise UserError(f"reward {name_of(reward)} returned an array of shape {tuple(results.shape)}; {FORM}")
        results = results.tolist()
    if not isinstance(results, (list, tuple)):
        raise UserError(f"reward {name_of(reward)} returned {_short(results)}; {FORM}")
    if len(results) != len(samples):
        raise UserError(
            f"reward {name_of(reward)} returned {len(results)} results for {len(samples)} samples; return one per sample"
        )
    rows = [row if isinstance(row, Mapping) or row is None else {_component(reward): row} for row in results]
    names = set(getattr(reward, "components", ())) | {name for row in rows if row is not None for name in row}
    failed = dict.fromkeys(sorted(names) or [_component(reward)])
    return [_scores(reward, number, failed if row is None else row) for number, row in enumerate(rows)]


def _component(reward: Reward) -> str:
    name = name_of(reward)
    if name == "<lambda>":
        raise UserError("a lambda has no name for its component; return {component: number} per sample, or use def")
    return name


def _scores(reward: Reward, number: int, row: Mapping[str, Any]) -> Scores:
    return {str(name): _score(reward, number, name, value) for name, value in row.items()}


def _score(reward: Reward, number: int, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        if getattr(value, "ndim", 0) != 0 or isinstance(value, (str, bytes)):  # float() would take some of them
            raise TypeError
        score = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"reward {name_of(reward)}, sample {number}: {name}={_short(value)} is no number; {FORM}"
        ) from None
    if math.isinf(score):
        raise UserError(
            f"reward {name_of(reward)}, sample {number}: {name}={score} is not finite; return NaN where scoring failed"
        )
    bounds = getattr(reward, "range", None)
    bounds = bounds.get(name) if isinstance(bounds, Mapping) else bounds
    noise = noise_of(value)
    if bounds is not None:
        score, noise = between(score, *bounds), noise / abs(bounds[1] - bounds[0])
    return score if math.isnan(noise) else NoisyScore(score, noise)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


ROUNDING = 1e-6  # of float32, by which a score may miss [0, 1]


def unit(component: str, score: float, what: str) -> float:
    """`score` in [0, 1], as `what` needs it; NaN stays NaN. Raises UserError for one further outside than rounding."""
    if math.isnan(score) or 0.0 <= score <= 1.0:
        return score
    if not -ROUNDING <= score <= 1.0 + ROUNDING:
        raise UserError(
            f"{what} needs scores in [0, 1], and {component}={score:g}; declare what its reward can return: "
            "rewards.NAME.range=[low, high] in the config, or an attribute range = (low, high) of the callable"
        )
    return min(1.0, max(0.0, score))


def merge(rewards: Sequence[Reward], results: Sequence[Sequence[Scores]], count: int) -> list[Scores]:
    """One dict per sample out of one list per reward. Raises UserError for a component that two rewards return."""
    merged: list[Scores] = [{} for _ in range(count)]
    for reward, rows in zip(rewards, results, strict=True):
        for scores, row in zip(merged, rows, strict=True):
            if twice := scores.keys() & row.keys():
                raise UserError(
                    f"two rewards return the component '{min(twice)}' (one is {name_of(reward)}); rename one"
                )
            scores.update(row)
    return merged
