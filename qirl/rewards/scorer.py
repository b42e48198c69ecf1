"""Scoring in the background: finished images are read while the next ones are sampled (algorithm page, section 5).

One event loop in a thread of its own runs for as long as the scorer. A micro-group is one job; `scoring.workers` jobs run
at a time. Plain functions run in threads, `async def` rewards (a remote judge) on the loop. A call that raises or runs
out of time is repeated with growing pauses; when that does not help, its samples get NaN, which means "failed" and is
never a score. What a user must mend (a score that is no number, one result too few, a reward whose every request was
refused) is raised at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from qirl.config_sections import Scoring
from qirl.errors import UserError
from qirl.rewards.protocol import Reward, Sample, Scores, is_async, merge, name_of, rows_of
from qirl.rewards.remote import chunks


@dataclass
class Job:
    """One micro-group on its way: when it was handed over, started and finished (monotonic seconds)."""

    samples: Sequence[Sample]
    submitted: float
    started: float = 0.0
    finished: float = 0.0
    answer: Future = field(default_factory=Future)  # per reward: its results, or the last error

    @property
    def scored(self) -> list[Sample]:
        """The samples that rewards see: those that have not failed before."""
        return [sample for sample in self.samples if not sample.failed]


class Scorer:
    """Use as a context manager, or close it; a process that ends closes it too."""

    def __init__(self, rewards: Sequence[Reward], options: Scoring | None = None):
        self.rewards, self.options = list(rewards), options or Scoring()
        self.known: list[set[str]] = [set(getattr(reward, "components", None) or ()) for reward in self.rewards]
        # components that had a score at least once; like `known` it outlives a run's restart
        self.scored: set[str] = set()
        self.retries = 0
        self._jobs: list[Job] = []
        self._begun: float | None = None  # when somebody began to wait
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(self.options.workers)
        threading.Thread(target=self._loop.run_forever, name="qirl-scorer", daemon=True).start()

    def submit(self, samples: Sequence[Sample]) -> None:
        """Hands a micro-group over and returns at once."""
        job = Job(samples, time.monotonic())
        self._jobs.append(job)
        job.answer = asyncio.run_coroutine_threadsafe(self._run(job), self._loop)

    def wait(self) -> None:
        """Waits for everything submitted and learns what components there are. Raises UserError as `collect` does."""
        self._begun = self._begun or time.monotonic()
        for job in self._jobs:
            self._learn(job.answer.result())

    def collect(self) -> tuple[list[Scores], dict[str, float]]:
        """Waits for everything submitted: scores per sample in the order of submission, and metrics.

        Metrics: timing/reward_latency, mean seconds from hand-over to result; timing/reward_hidden, the share of the time in which
        rewards ran that passed before this call; scoring/retries; scoring/failed, calls that never succeeded. Raises
        UserError for results that a user must mend, and for a reward of unknown components that never succeeded.
        """
        try:
            self.wait()
            self._check_refusals()
        finally:
            jobs, self._jobs = self._jobs, []
            begun, self._begun = self._begun, None
        answers = [job.answer.result() for job in jobs]
        scores = [row for job, own in zip(jobs, answers, strict=True) for row in self._scores(job, own)]
        failed = sum(isinstance(one, Exception) for own in answers for one in own)
        retries, self.retries = self.retries, 0
        busy = _covered([(job.started, job.finished) for job in jobs])
        late = _covered([(max(begun, job.started), job.finished) for job in jobs if job.finished > begun])
        return scores, {
            "timing/reward_latency": sum(job.finished - job.submitted for job in jobs) / max(1, len(jobs)),
            "timing/reward_hidden": 1 - late / busy if busy else 1.0,
            "scoring/retries": retries,
            "scoring/failed": failed,
        }

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    async def _run(self, job: Job) -> list[list[Scores] | Exception]:
        async with self._places:
            job.started, scored = time.monotonic(), job.scored
            if not scored:
                job.finished = job.started
                return [[] for _ in self.rewards]
            found = await asyncio.gather(*(self._patiently(reward, scored) for reward in self.rewards))
            job.finished = time.monotonic()
        return found

    async def _patiently(self, reward: Reward, samples: Sequence[Sample]) -> list[Scores] | Exception:
        """The results of one reward, or the error of its last try."""
        for attempt in range(self.options.retries + 1):
            try:
                results = await asyncio.wait_for(self._call(reward, samples), self.options.timeout)
                return rows_of(reward, samples, results)
            except UserError:
                raise
            except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
                error = TimeoutError(f"no answer within scoring.timeout={self.options.timeout:g} s")
            except Exception as caught:
                error = caught
            if attempt < self.options.retries:
                self.retries += 1
                await asyncio.sleep(self.options.backoff * 2**attempt)
        return error

    async def _call(self, reward: Reward, samples: Sequence[Sample]) -> list[Scores]:
        if is_async(reward):
            return await reward(samples)
        result = await self._in_thread(reward, samples)
        return await result if inspect.isawaitable(result) else result

    async def _in_thread(self, reward: Reward, samples: Sequence[Sample]):
        """Runs a plain function in a daemon thread: one that hangs is left behind and keeps no process alive."""
        answer = self._loop.create_future()

        def deliver(*outcome) -> None:
            if not answer.done():  # after a timeout nobody waits any more
                answer.set_result(outcome)

        def run() -> None:
            result = error = None
            try:
                result = reward(samples)
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed: the run ended meanwhile
                self._loop.call_soon_threadsafe(deliver, result, error)

        threading.Thread(target=run, name="qirl-reward", daemon=True).start()
        result, error = await answer
        if error is not None:
            raise error
        return result

    def _learn(self, answers: list[list[Scores] | Exception]) -> None:
        for known, results in zip(self.known, answers, strict=True):
            if not isinstance(results, Exception):
                known.update(name for row in results for name in row)
                self.scored.update(name for row in results for name, value in row.items() if not math.isnan(value))

    def _check_refusals(self) -> None:
        """Raises UserError for a reward that was refused and has never given a score: not one sample is to blame then."""
        for reward, known in zip(self.rewards, self.known, strict=True):
            refusal = getattr(reward, "refusal", None)
            if refusal and not known & self.scored:
                of = f" of {', '.join(sorted(known))}" if known else ""
                raise UserError(f"reward {name_of(reward)}{of} has no score so far: {refusal}; check its options")

    def _scores(self, job: Job, answers: list[list[Scores] | Exception]) -> list[Scores]:
        """The merged rows of a job; a reward that failed fails all its components for all samples, a sample that
        failed all components of all rewards."""
        filled = []
        for reward, known, results in zip(self.rewards, self.known, answers, strict=True):
            if isinstance(results, Exception):
                if not known:
                    raise UserError(
                        f"reward {name_of(reward)} failed on every call ({type(results).__name__}: {results}); mend it, "
                        "then start the same command again"
                    ) from results
                results = [dict.fromkeys(sorted(known), math.nan)] * len(job.scored)
            filled.append(results)
        rows = iter(merge(self.rewards, filled, len(job.scored)))
        nothing = dict.fromkeys(sorted(set().union(*self.known)), math.nan)
        if not nothing and len(job.scored) < len(job.samples):
            raise UserError(
                "the latents of all samples that rewards could have scored are not finite; the weights have diverged: "
                "lower optimizer.lr, use model.dtype=float32, or start from another model"
            )
        return [dict(nothing) if sample.failed else next(rows) for sample in job.samples]


def score(
    rewards: Sequence[Reward], samples: Sequence[Sample], options: Scoring | None = None, size: int | None = None
) -> list[Scores]:
    """The scores of all samples, as `Scorer` gives them, `size` of them a call; None: all at once."""
    with Scorer(rewards, options) as scorer:
        for part in chunks(samples, size) if size else [samples]:
            scorer.submit(part)
        return scorer.collect()[0]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -math.inf
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total
