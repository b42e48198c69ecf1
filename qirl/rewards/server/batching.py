"""Scoring for many requests at once: their samples share batches, and a full queue says so instead of growing."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qirl.rewards.protocol import Reward, Sample, Scores, is_async, merge, name_of, rows_of


class Full(Exception):
    """The queue has no room. `seconds` until it should."""

    def __init__(self, seconds: float):
        super().__init__(f"the queue is full; try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass
class Scored:
    scores: Scores
    errors: dict[str, str]


@dataclass
class _Waiting:
    sample: Sample
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """rewards score batches of at most `batch` samples, one batch at a time; a batch that is not full waits `wait` seconds.

    A reward that raises or takes longer than `timeout` fails its own components (NaN, with the reason) and no others'.
    """

    def __init__(self, rewards: Sequence[Reward], batch: int, wait: float, room: int, timeout: float):
        self.rewards, self.batch, self.wait, self.room, self.timeout = list(rewards), batch, wait, room, timeout
        self.known = [set(getattr(reward, "components", ())) for reward in self.rewards]
        self.waiting: list[_Waiting] = []
        self.more = asyncio.Event()
        self.under_way = 0
        self.per_second = 0.0  # samples, as measured
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """Raises Full where the samples do not fit the queue beside those that wait."""
        depth = len(self.waiting) + self.under_way
        if depth and depth + len(samples) > self.room:
            raise Full(max(1.0, depth / self.per_second if self.per_second else 1.0))
        own = [_Waiting(sample) for sample in samples]
        self.waiting += own
        self.more.set()
        try:
            return await asyncio.gather(*(w.answer for w in own))
        except asyncio.CancelledError:  # the client is gone: what has not begun need not be scored
            mine = {id(w) for w in own}
            self.waiting = [w for w in self.waiting if id(w) not in mine]
            raise

    async def close(self) -> None:
        """Waits for what is under way and waiting."""
        while self.waiting or self.under_way:
            await asyncio.sleep(0.01)
        self.task.cancel()

    async def _run(self) -> None:
        while True:
            await self.more.wait()
            if len(self.waiting) < self.batch:
                await asyncio.sleep(self.wait)
            taken, self.waiting = self.waiting[: self.batch], self.waiting[self.batch :]
            if not self.waiting:
                self.more.clear()
            if not taken:
                continue
            self.under_way, begun = len(taken), time.monotonic()
            try:
                scored = await self._score([w.sample for w in taken])
            except Exception as error:
                scored = [Scored({}, {"server": f"{type(error).__name__}: {error}"})] * len(taken)
            for waiting, own in zip(taken, scored, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(own)
            self.under_way = 0
            rate = len(taken) / max(1e-6, time.monotonic() - begun)
            self.per_second = rate if not self.per_second else 0.8 * self.per_second + 0.2 * rate

    async def _score(self, samples: Sequence[Sample]) -> list[Scored]:
        found = await asyncio.gather(*(self._one(reward, samples) for reward in self.rewards))
        errors, filled = [{} for _ in samples], []
        for reward, known, results in zip(self.rewards, self.known, found, strict=True):
            if isinstance(results, str):
                for own in errors:
                    own[name_of(reward)] = results
                results = [dict.fromkeys(known, math.nan)] * len(samples)
            known.update(name for row in results for name in row)
            filled.append(results)
        merged = merge(self.rewards, filled, len(samples))
        return [Scored(scores, own) for scores, own in zip(merged, errors, strict=True)]

    async def _one(self, reward: Reward, samples: Sequence[Sample]) -> list[Scores] | str:
        """A reward's results, or why there are none."""
        try:
            results = await asyncio.wait_for(_call(reward, samples), self.timeout)
            return rows_of(reward, samples, results)
        except asyncio.TimeoutError:
            return f"no result within {self.timeout:g} s"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


async def _call(reward: Reward, samples: Sequence[Sample]) -> list[Scores]:
    if is_async(reward):
        return await reward(samples)
    result = await asyncio.to_thread(reward, samples)
    return await result if inspect.isawaitable(result) else result
