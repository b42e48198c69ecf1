"""How many images a second does one RL step draw and train, and what share of the GPU's peak is that? One JSON row a setting.

    python benchmarks/throughput.py                                  all settings, on a GPU
    python benchmarks/throughput.py --list                           their names
    python benchmarks/throughput.py headline micro=4,8 --seconds 200
    python benchmarks/throughput.py headline model.attention=cudnn

Words NAME choose settings; FIELD=VALUE changes every chosen one (FIELD=A,B measures both); SECTION.OPTION=VALUE is an option
of the run.

A step is the trainer's own: rollout (prefill and guided steps) and update (the trained pairs with their prefix shared, objective,
backward, optimizer step), on random weights of the true shape that are made on the device. `images_per_s` counts rollout and
update. Rows are written as they come, the most telling first; a setting is begun only if it can end within --seconds. How MFU
is counted: throughput_step.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from throughput_cases import Setting, changed
from throughput_step import matmul_rate, measure, peak_of, refused, step_flops

from qirl.errors import UserError, nearest
from qirl.flow.rollout import DTYPES
from qirl.run.folder import write_json
from qirl.run.machine import machine

HEADLINE = Setting("headline")
SETTINGS = [
    HEADLINE,
    dataclasses.replace(HEADLINE, name="fp8", overrides=("model.fp8=torch",)),
    dataclasses.replace(HEADLINE, name="references4", references=4),
    dataclasses.replace(HEADLINE, name="1024", height=1024, width=1024, micro=1, batch=8),
    dataclasses.replace(HEADLINE, name="1.x", family="qwen_image", base="int8", checkpointing="block"),
    dataclasses.replace(HEADLINE, name="full", lora=0, layers=8),
    dataclasses.replace(HEADLINE, name="references1", references=1),
]
# what a CPU is measured with: the same steps, small
SMALL = dict(size="tiny", layers=2, height=128, width=128, text=32, group=4, steps=5, dtype="float32", lora=8)
FIRST = 60.0  # seconds that the first setting is given beside its arithmetic: kernels are compiled
REACHED = 0.4  # of the rate of a large product, expected of the first setting


class Budget:
    """Seconds that settings may take: one is begun only if it can end in time, as far as its arithmetic tells."""

    def __init__(self, seconds: float):
        self.begun, self.allowed = time.monotonic(), seconds
        self.factor, self.overhead = 1.0, FIRST

    @property
    def left(self) -> float:
        return self.allowed - (time.monotonic() - self.begun)

    def expected(self, arithmetic: float) -> float:
        """Seconds that a setting will take whose products alone would take `arithmetic` at the rate of a large one."""
        return self.overhead + self.factor * arithmetic / REACHED

    def learn(self, arithmetic: float, built: float, seconds: float) -> None:
        """After a setting: how much longer than that its steps took, and what building a model takes."""
        self.factor = max(0.1, (seconds - built) * REACHED / arithmetic)
        self.overhead = 2 * built


def chosen(words: Sequence[str], cpu: bool) -> list[Setting]:
    """The settings that the words of the command line name and change. Raises UserError for a name that there is not."""
    known = {s.name: s for s in SETTINGS}
    names = [word for word in words if "=" not in word]
    for name in names:
        if name not in known:
            raise UserError(f"there is no setting '{name}'{nearest(name, known)}; there are {', '.join(known)}")
    changes = [word for word in words if "=" in word]
    found = [known[name] for name in names or known]
    if cpu:
        found = [dataclasses.replace(s, **SMALL | ({"lora": 0} if not s.lora else {})) for s in found]
    return [one for setting in found for one in changed(setting, changes)]


def measure_all(
    settings: Sequence[Setting], device: str, repetitions: int, budget: Budget, peak, found: dict, out: Path
):
    """Adds to found["rows"] and ["left_out"], written to `out` after every setting. peak: FLOP/s, None: by the GPU's name."""
    for setting in settings:
        row = {"setting": dataclasses.asdict(setting)}
        try:
            arithmetic = (
                (repetitions + 1) * step_flops(setting) / rate(setting.dtype, device, found["matmul_tflops"]) / 1e12
            )
            expected = budget.expected(arithmetic)
            if expected > budget.left:
                found["left_out"].append({"setting": setting.name, "expected_s": math.ceil(expected)})
                continue
            begun = time.monotonic()
            row |= measure(setting, device, repetitions, peak or peak_of(found["machine"]["gpu"], setting.dtype))
            budget.learn(arithmetic, row["build_s"], time.monotonic() - begun)
        except Exception as problem:  # one that cannot be run does not stop the others
            if not isinstance(problem, (UserError, torch.OutOfMemoryError)):
                traceback.print_exc()
            row["refused"] = refused(problem)
        found["rows"].append(row)
        print(line(row), flush=True)
        write_json(out, found)


def rate(dtype: str, device: str, known: dict[str, float]) -> float:
    """TFLOP/s of a large product, measured once for each dtype."""
    if dtype not in known:
        known[dtype] = matmul_rate(device, DTYPES[dtype]) / 1e12
    return known[dtype]


def line(row: dict) -> str:
    """A row in words."""
    name = row["setting"]["name"]
    if "refused" in row:
        return f"{name}: not measured: {row['refused']}"
    mfu = ", ".join(f"{phase} {value:.1%}" for phase, value in (row["mfu"] or {}).items())
    memory = f", {max(row['peak_gib'].values()):.1f} GiB" if row["peak_gib"] else ""
    shares = ", ".join(f"{phase} {value:.0%}" for phase, value in row["share"].items())
    return (
        f"{name}: {row['images_per_s']:.3f} images/s, {row['pairs_per_s']:.2f} pairs/s in the update, "
        f"{row['tokens_per_s']:.0f} tokens/s; time: {shares}{f'; MFU {mfu}' if mfu else ''}{memory}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure small models on the CPU")
    parser.add_argument("--list", action="store_true", help="print the settings and end")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no setting that would end later")
    parser.add_argument("--peak", type=float, help="TFLOP/s of this GPU, for MFU, where its name is not known")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/throughput_cpu.json or _GPU.json")
    parser.add_argument("words", nargs="*", metavar="WORD", help="headline micro=8 model.attention=cudnn ...")
    args = parser.parse_intermixed_args(arguments)
    if not args.cpu and not args.list and not torch.cuda.is_available():
        print("throughput: no CUDA device here; --cpu measures small models on the CPU", file=sys.stderr)
        return 2
    try:
        settings = chosen(args.words, args.cpu)
    except UserError as problem:
        print(f"throughput: {problem}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{s.name:12} {described(s)}" for s in settings))
        return 0
    torch.set_num_threads(args.threads)
    return report(settings, args)


def report(settings: Sequence[Setting], args: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code."""
    facts = machine()
    device, name = ("cpu", "cpu") if args.cpu else ("cuda", facts["gpu"].replace(" ", "_"))
    out = args.out or Path(__file__).parent / f"results/throughput_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts, "matmul_tflops": {}, "rows": [], "left_out": []}
    peak = args.peak * 1e12 if args.peak else None
    measure_all(settings, device, args.repetitions, Budget(args.seconds), peak, found, out)
    write_json(out, found)
    if found["left_out"]:
        told = ", ".join("{setting} ({expected_s} s)".format(**one) for one in found["left_out"])
        if not found["rows"]:
            least = min(one["expected_s"] for one in found["left_out"])
            print(
                f"throughput: --seconds {args.seconds:g} is too little for any setting; the shortest may take {least} s: {told}",
                file=sys.stderr,
            )
            return 2
        print(f"left out for want of time: {told}")
    print(out)
    return int(all("refused" in row for row in found["rows"]))


def described(setting: Setting) -> str:
    """What a setting has, in one line."""
    values = dataclasses.asdict(setting) | {"overrides": " ".join(setting.overrides)}
    return " ".join(f"{k}={v}" for k, v in values.items() if k != "name" and v not in (None, ""))


if __name__ == "__main__":
    raise SystemExit(main())
