"""Runs the arms of an experiment: commands that need each other's results, a few at a time, each of them once.

An arm is started when what it needs is done; one that fails stops only those that need it. Ctrl-C stops all of them on a
checkpoint, and the same call goes on. arms.json keeps what each arm was made from, and its wall time; elapsed.json the time of
all calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qirl.errors import UserError
from qirl.run.cache import content_key
from qirl.run.folder import write_json

PATIENCE = 120  # seconds that a stopped arm has for its checkpoint
TAIL = 12  # lines of a failed arm's standard error that are shown


@dataclass(frozen=True)
class Job:
    """A command, the file that exists once it is done, and what decides its result.

    recipe: JSON-able; facts: kept in arms.json for tables. repeats: a result of another recipe is made anew in place,
    else it is refused.
    """

    command: Sequence[str]
    product: Path
    recipe: object
    facts: Mapping = field(default_factory=dict)
    repeats: bool = False


@dataclass(frozen=True)
class Arm:
    """make() is called when everything in `needs` (names of arms) is done: it may read their results."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[], Job]


def elapsed(folder: Path) -> float:
    """Seconds of all calls so far."""
    try:
        return float(json.loads((folder / "elapsed.json").read_text()))
    except (OSError, ValueError):
        return 0.0


def closure(arms: Mapping[str, Arm], wanted: Sequence[str]) -> list[Arm]:
    """The wanted arms and all that they need, directly or not, each after what it needs."""
    found: dict[str, Arm] = {}

    def visit(name: str) -> None:
        if name not in found:
            for need in arms[name].needs:
                visit(need)
            found[name] = arms[name]

    for name in wanted:
        visit(name)
    return list(found.values())


class Records:
    """arms.json: {name: {"key", "seconds", "done", "made": when, facts ...}}."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.known: dict[str, dict] = json.loads(path.read_text())
        except FileNotFoundError:
            self.known = {}
        except (OSError, ValueError):
            raise UserError(f"{path} is damaged; delete it, and every finished run is found again") from None

    def update(self, name: str, **values) -> None:
        self.known[name] = self.known.get(name, {}) | values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.known)

    def seconds(self, name: str) -> float:
        return self.known.get(name, {}).get("seconds", 0.0)


@dataclass
class _Running:
    process: subprocess.Popen
    begun: float
    product: Path
    errors: Path


class Scheduler:
    """Runs `arms` (each after what it needs, as `closure` sorts them), `workers` at a time, with `environment`."""

    def __init__(self, arms: Sequence[Arm], folder: Path, workers: int, environment: Mapping[str, str] | None = None):
        self.arms = {arm.name: arm for arm in arms}
        self.folder, self.workers = folder, workers
        self.environment = {**os.environ, **(environment or {})}
        self.records = Records(folder / "arms.json")
        self.waiting = list(arms)
        self.running: dict[str, _Running] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # name: why
        self.started = False  # an arm, in this call

    def run(self) -> bool:
        """Whether every arm is done. KeyboardInterrupt passes on, once what ran was stopped."""
        begun, stops = time.monotonic(), (signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, _interrupt) for number in stops}
        try:
            while self.waiting or self.running:
                self._start_ready()
                if self.running:
                    time.sleep(0.05)
                self._collect()
        except BaseException:
            self._stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.started:  # a call that finds all arms done leaves the study as it is
                write_json(self.folder / "elapsed.json", elapsed(self.folder) + time.monotonic() - begun)
        return not self.failed

    def _start_ready(self) -> None:
        for arm in list(self.waiting):
            if lost := [need for need in arm.needs if need in self.failed]:
                self.waiting.remove(arm)
                self._fail(arm.name, f"needs {', '.join(lost)}")
            elif len(self.running) < self.workers and self.done.issuperset(arm.needs):
                self.waiting.remove(arm)
                self._start(arm)

    def _start(self, arm: Arm) -> None:
        try:
            job = arm.make()
            key = self._key(arm, job)
            if self._finished(arm.name, job, key):
                self.done.add(arm.name)
                return
        except (UserError, OSError, ValueError, KeyError) as error:  # what a need left behind may be damaged
            self._fail(arm.name, f"{type(error).__name__}: {error}")
            return
        self.started = True
        self.records.update(arm.name, key=key, done=False, **job.facts)
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        stem = arm.name.replace("/", "_")
        with (logs / f"{stem}.out").open("w") as out, (logs / f"{stem}.err").open("w") as err:
            process = subprocess.Popen(
                job.command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
            )  # fmt: skip
        self.running[arm.name] = _Running(process, time.monotonic(), job.product, logs / f"{stem}.err")

    def _key(self, arm: Arm, job: Job) -> str:
        made = [[self.records.known[need][part] for part in ("key", "made")] for need in arm.needs]
        return content_key(job.recipe, made)

    def _finished(self, name: str, job: Job, key: str) -> bool:
        """Whether it was done before. Raises UserError for the result of another recipe that cannot be made anew."""
        known = self.records.known.get(name)
        if known is None or not (job.repeats or (self.folder / name).exists()):
            return False
        if known["key"] == key:
            return known["done"] and job.product.exists()
        if job.repeats:
            return False
        raise UserError(
            f"{self.folder / name} was made by another recipe (its config or one before it changed); delete it, or choose "
            "another --out folder"
        )

    def _collect(self) -> None:
        for name, own in list(self.running.items()):
            if (code := own.process.poll()) is None:
                continue
            seconds = self._settle(name)
            if code == 0 and own.product.exists():
                self.records.update(name, done=True, made=time.time())
                self.done.add(name)
                self._say(f"{name}: done in {seconds:.0f} s")
            else:
                why = f"exit code {code}" if code else f"made no {own.product}"
                self._fail(name, why, own.errors.read_text(errors="replace").splitlines()[-TAIL:])

    def _settle(self, name: str) -> float:
        """Takes an arm off the list of those that run; its wall time over all its starts."""
        seconds = round(self.records.seconds(name) + time.monotonic() - self.running.pop(name).begun, 1)
        self.records.update(name, seconds=seconds)
        return seconds

    def _fail(self, name: str, why: str, lines: Sequence[str] = ()) -> None:
        self.failed[name] = why
        self._say("\n".join([f"{name}: FAILED ({why})", *(f"    {line}" for line in lines)]))

    def _stop(self) -> None:
        for own in self.running.values():
            own.process.terminate()
        for name, own in list(self.running.items()):
            try:
                own.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                own.process.kill()
                own.process.wait()
            self._settle(name)

    def _say(self, text: str) -> None:
        ready = len(self.done) + len(self.failed)
        print(f"[{ready}/{len(self.arms)}] {text}", file=sys.stderr, flush=True)


def _interrupt(*_):
    raise KeyboardInterrupt
