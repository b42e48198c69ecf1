"""Everything that waits for a GPU, in one command: builds csrc, runs the tests that need a GPU, times kernels and training.

    python benchmarks/gpu_suite.py --out OUT

Writes OUT/suite.json (each step's exit code and seconds), what the steps print (suite.log), OUT/kernels.json with its table and
picture, and OUT/throughput.json, for which diffusers must be installed. A step that fails does not stop the next ones; the
exit code is 1 if any failed. Aims at 8 minutes on one H100.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_checks import PYTEST, ROOT, on_this_gpu
from kernel_ops import SAMPLER_TESTS, TRANSFORMER_TESTS

from qirl.run.folder import write_json
from qirl.run.machine import machine


def steps(out: Path) -> dict[str, list[str]]:
    """Commands by name, in order; {out} is where results go. The kernel benchmark runs the tests of its ops itself."""
    of_ops = [f"--ignore={file}" for file in (TRANSFORMER_TESTS, SAMPLER_TESTS)]
    return {
        "build": [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        "native": [*PYTEST, "tests/test_native_philox.py"],
        "gpu": [*PYTEST, "-m", "gpu", "--continue-on-collection-errors", "tests", *of_ops],
        "kernels": [sys.executable, "benchmarks/kernel_times.py", "--out", str(out / "kernels.json")],
        "throughput": [
            sys.executable, "benchmarks/throughput.py", "--repetitions", "3", "--out", str(out / "throughput.json"),
        ],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"))
    parser.add_argument("--steps", nargs="+", choices=list(steps(Path())), default=list(steps(Path())))
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    done, log_file = {}, out / "suite.log"
    log_file.write_text("")
    for name in args.steps:
        begun = time.monotonic()
        with log_file.open("a") as log:
            print(f"== {name}", file=log, flush=True)
            code = subprocess.run(steps(out)[name], cwd=ROOT, env=on_this_gpu(), stdout=log, stderr=log).returncode
        done[name] = {"exit_code": code, "seconds": round(time.monotonic() - begun, 1)}
        print(f"{name}: {'done' if code == 0 else f'FAILED ({code})'} in {done[name]['seconds']} s", flush=True)
        write_json(out / "suite.json", {"machine": machine(), "steps": done})
    return int(any(own["exit_code"] for own in done.values()))


if __name__ == "__main__":
    raise SystemExit(main())
