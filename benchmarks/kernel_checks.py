"""What comes before an op is timed: its tests, and the compilation of what it is compared with.

Both take minutes of host time and neither is timed, so they run side by side, in processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from kernel_ops import Model, Work, gradients

ROOT = Path(__file__).resolve().parents[1]
WORKERS = min(6, os.cpu_count() or 1)  # each holds the tensors of one place on the GPU


def pytest_command(share: int = 1) -> list[str]:
    """pytest on one `share`-th of this machine's cores; on one core where pytest-xdist is not installed."""
    workers = (os.cpu_count() or 1) // share
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel]


def on_this_gpu() -> dict[str, str]:
    """The environment in which Triton compiles and `auto` chooses."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QIRL_KERNELS")}


def red(ops: Sequence[str], tests: Mapping[str, str]) -> list[str]:
    """Those of `ops` whose tests fail here, compiled for this GPU; tests: the file of every op there is.

    A test is about the op whose name its own holds; one that names none is about every op of its file.
    """
    files = {tests[op]: [other for other in tests if tests[other] == tests[op]] for op in ops}
    with tempfile.TemporaryDirectory() as folder:
        reports = {file: Path(folder) / f"{i}.xml" for i, file in enumerate(files)}
        runs = {}
        for file, report in reports.items():
            wanted = f"{' or '.join(op for op in files[file] if op in ops)} or not ({' or '.join(files[file])})"
            command = [*pytest_command(len(files)), f"--junitxml={report}", file, "-k", wanted]
            runs[file] = subprocess.Popen(command, cwd=ROOT, env=on_this_gpu(), stdout=sys.stderr)
        failed = {file: _failed(run.wait(), reports[file]) for file, run in runs.items()}
    return [op for op in ops if any(_about(test, op, files[tests[op]]) for test in failed[tests[op]])]


def _failed(code: int, report: Path) -> list[str]:
    """The names of the tests that failed; one empty name where pytest itself did."""
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
    names = [case.get("name", "") for case in cases if {"failure", "error"} & {part.tag for part in case}]
    return names or [""] * (code != 0)


def _about(test: str, op: str, ops: Sequence[str]) -> bool:
    return op in test or not any(other in test for other in ops)


def compiled(work: Work) -> Callable:
    return torch.compile(work.reference, dynamic=False)


@contextlib.contextmanager
def compiling_ahead(places: Sequence[tuple[str, int, Model]], device: str = "cuda") -> Iterator[None]:
    """Fills torch's caches on disk with what `compiled` makes at `places`, until the block and the last of them are done.

    What fails here fails again where it is timed, and is told there.
    """
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        pending = [pool.submit(_compile, *place, device) for place in places]
        yield
        for one in pending:
            one.exception()


def _alone() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are the parallelism
    from torch._inductor import config

    config.autotune_local_cache = False  # a choice measured here, on a busy GPU, must not be found where it is timed


def _compile(op: str, tokens: int, model: Model, device: str) -> None:
    from kernel_registry import OPS

    torch.compiler.reset()
    work = OPS[op].build(tokens, model, device)
    function = compiled(work)
    function(*work.inputs)
    if work.backward:
        gradients(function, work.inputs)()
