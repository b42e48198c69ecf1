"""Everything that waits for a GPU, in one command: builds csrc, runs the tests that need a GPU, times kernels and training.

    python benchmarks/gpu_suite.py --out OUT                             all steps: half an hour on an H200 with 16 cores
    python benchmarks/gpu_suite.py --out OUT --steps build kernels       some of them, in this order

Writes OUT/suite.json (each step's exit code and seconds, after every step), what the steps print (suite.log), OUT/kernels.json
with its table and picture, and a throughput_*.json with its table for each throughput step: they grow row by row. Tests run on all
cores where pytest-xdist is installed; baselines of throughput need diffusers and peft. A step that fails, or takes longer
than ten minutes, does not stop the next ones; the exit code is 1 if any failed. --seconds is what each throughput step may take.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from kernel_checks import ROOT, on_this_gpu, pytest_command
from kernel_ops import SAMPLER_TESTS, TRANSFORMER_TESTS

from qirl.run.folder import write_json
from qirl.run.machine import machine

LIMIT = 600.0  # seconds of one step
THROUGHPUT = 480.0  # seconds that the settings of one throughput step may take
# steps of throughput.py: its words, the most telling first
SETTINGS = {
    "throughput": ["headline", "1024", "full", "references1", "references4", "--baselines", "none", "--profile"],
    "throughput_fp8": ["fp8", "--baselines", "none", "--profile"],
    "throughput_baselines": ["headline", "references1", "references4", "--repetitions", "2"],
    "throughput_1x": ["1.x", "1.x-int8", "--baselines", "same", "--repetitions", "2"],
    "throughput_parts": ["headline", "1.x", "--baselines", "none", "--parts", "--repetitions", "1"],
}


def steps(out: Path, seconds: float = THROUGHPUT) -> dict[str, list[str]]:
    """Commands by name, in order; {out} is where results go. The kernel benchmark runs the tests of its ops itself."""
    of_ops = [f"--ignore={file}" for file in (TRANSFORMER_TESTS, SAMPLER_TESTS)]
    throughput = {
        name: [
            sys.executable,
            "benchmarks/throughput.py",
            *words,
            "--seconds",
            str(seconds),
            "--out",
            str(out / f"{name}.json"),
        ]
        for name, words in SETTINGS.items()
    }
    return {
        "build": [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        "native": [*pytest_command(), "tests/test_native_philox.py", "tests/test_native_refusals.py"],
        "gpu": [*pytest_command(), "-m", "gpu", "--continue-on-collection-errors", "tests", *of_ops],
        "kernels": [sys.executable, "benchmarks/kernel_times.py", "--out", str(out / "kernels.json")],
        **throughput,
    }


def run(command: Sequence[str], log: IO[str]) -> int | str:
    """The exit code of a step, or why it has none; what it left running is ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=on_this_gpu(), stdout=log, stderr=log, start_new_session=True
    )  # fmt: skip
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return f"ended after {LIMIT:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    names = list(steps(Path()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"))
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=THROUGHPUT, help="what each throughput step may take")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commands = steps(out, args.seconds)
    done, log_file = {}, out / "suite.log"
    log_file.write_text("")
    for name in args.steps:
        begun = time.monotonic()
        with log_file.open("a") as log:
            print(f"== {name}", file=log, flush=True)
            code = run(commands[name], log)
        done[name] = {"exit_code": code, "seconds": round(time.monotonic() - begun, 1)}
        print(f"{name}: {'done' if code == 0 else f'FAILED ({code})'} in {done[name]['seconds']} s", flush=True)
        write_json(out / "suite.json", {"machine": machine(), "steps": done})
    return int(any(own["exit_code"] for own in done.values()))


if __name__ == "__main__":
    raise SystemExit(main())
