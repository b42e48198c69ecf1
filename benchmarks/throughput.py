"""How many images a second does one RL step draw and train, and what share of the GPU's peak is that? One JSON row a setting.

    python benchmarks/throughput.py                                      all settings, on a GPU
    python benchmarks/throughput.py --list                               their names
    python benchmarks/throughput.py headline micro=4,8 --seconds 200
    python benchmarks/throughput.py headline model.attention=cudnn --baselines none --profile
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/throughput.py --cpu      small models, on a CPU

Words NAME choose settings; FIELD=VALUE changes every chosen one (FIELD=A,B measures both); SECTION.OPTION=VALUE is an option
of the run.

A step is the trainer's own: rollout (prefill and guided steps) and update (the trained pairs with their prefix shared, objective,
backward, optimizer step), on random weights of the true shape that are made on the device. `images_per_s` counts these two;
with --parts the autoencoder's decoding and the text encoder's reading are measured as well, and `images_per_s_whole` counts all
four. How FLOPs and MFU are counted: throughput_step.py. What is compared with, and in what shape: throughput_baselines.py; that
needs diffusers and peft, --parts needs transformers too, and a row says what is missing. Settings come the most telling first,
and what cannot end within --seconds is not begun. Rows are written as they come; a table (.md) goes beside them at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from throughput_cases import Setting, changed
from throughput_profile import profiled
from throughput_profile import table as table_of_kinds
from throughput_step import CORE, GIB, Step, matmul_rate, measure, peak_of, refused, release, step_flops, timed

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
    dataclasses.replace(HEADLINE, name="1.x", family="qwen_image", checkpointing="block"),
    dataclasses.replace(HEADLINE, name="full", lora=0, layers=12),
    dataclasses.replace(HEADLINE, name="references1", references=1),
    dataclasses.replace(HEADLINE, name="1.x-int8", family="qwen_image", base="int8", checkpointing="block"),
]
# what a CPU is measured with: the same steps on small models, and of them those that say something there
SMALL = dict(size="tiny", height=256, width=256, text=32, group=8, nodes=4, dtype="float32", micro=8, batch=8)
ON_CPU = ("headline", "references1", "references4", "full", "1.x")
BASELINES = ("same", "peers")  # see throughput_baselines.py
# seconds of what is measured beside a step, in such steps without references; trials of batch sizes included
COST = {"same": 6.0, "peers": 12.0, "parts": 1.0}
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
    found = [known[name] for name in names or (ON_CPU if cpu else known)]
    if cpu:
        found = [dataclasses.replace(s, **SMALL, layers=None, lora=min(8, s.lora)) for s in found]
    return [one for setting in found for one in changed(setting, changes)]


@dataclass
class Asked:
    """What is measured of every setting. peak: FLOP/s; None: by the GPU's name."""

    device: str
    repetitions: int
    peak: float | None
    baselines: Sequence[str]
    parts: bool
    profile: bool
    budget: Budget


def measure_all(settings: Sequence[Setting], asked: Asked, found: dict, out: Path) -> None:
    """Adds to found["rows"] and ["left_out"], written to `out` after everything that was measured."""
    for setting in settings:
        row = {"setting": dataclasses.asdict(setting)}
        if attempt(row, lambda s=setting, r=row: measure_own(s, r, asked, found)) is None:
            continue
        found["rows"].append(row)
        print(line(row), flush=True)
        write_json(out, found)
        if "refused" in row:
            continue
        for name, run in others(setting, row, asked):
            expected = COST[name] * (1 + setting.references) * core_seconds(row) + 2 * row["build_s"]
            if expected > asked.budget.left:
                found["left_out"].append({"setting": f"{setting.name}: {name}", "expected_s": math.ceil(expected)})
                continue
            own = (
                row.setdefault("baselines", {}).setdefault(name, {})
                if name in BASELINES
                else row.setdefault("parts", {})
            )
            attempt(own, run)
            print(f"  {said(name, own)}", flush=True)
            write_json(out, found)
        count_whole(row)
        write_json(out, found)


def measure_own(setting: Setting, row: dict, asked: Asked, found: dict) -> dict | None:
    """qirl's own numbers; None where the time does not allow them."""
    gpu, budget = found["machine"]["gpu"], asked.budget
    product = rate(setting.dtype, asked.device, found["matmul_tflops"])
    arithmetic = (asked.repetitions + 1) * step_flops(setting) / product / 1e12
    expected = budget.expected(arithmetic)
    if expected > budget.left:
        found["left_out"].append({"setting": setting.name, "expected_s": math.ceil(expected)})
        return None
    begun = time.monotonic()
    look = (lambda *opened: {"profile": profiles(*opened, asked.device)}) if asked.profile else None
    peak = asked.peak or (peak_of(gpu, setting.dtype) if asked.device == "cuda" else None)
    own = measure(setting, asked.device, asked.repetitions, peak, look)
    budget.learn(arithmetic, own["build_s"], time.monotonic() - begun)
    return own


def attempt(row: dict, run: Callable[[], dict | None]) -> dict | None:
    """Adds what run() returns to the row, or why it could not be run: that does not stop the others. None: it was left out."""
    try:
        measured = run()
    except Exception as problem:
        if not isinstance(problem, (UserError, torch.OutOfMemoryError, ImportError, AssertionError)):
            traceback.print_exc()
        measured = {"refused": refused(problem)}
    release()
    if measured is not None:
        row |= measured
    return measured


def others(setting: Setting, row: dict, asked: Asked) -> Iterator[tuple[str, Callable[[], dict]]]:
    """What is measured beside qirl's own step: (name, run)."""
    for kind in asked.baselines:
        yield kind, lambda kind=kind: compare(setting, kind, asked.device, asked.repetitions, row)
    if asked.parts:
        yield "parts", lambda: measure_parts(setting, asked.device, asked.repetitions)


def compare(setting: Setting, kind: str, device: str, repetitions: int, row: dict) -> dict:
    """A baseline's row: checked against qirl, then timed; on a CPU by turns with qirl's own phases, for the ratios."""
    from throughput_baselines import Baseline, agreement, own_setting

    agreed = dataclasses.asdict(agreement(setting, kind, device))
    baseline = Baseline(setting, kind, device)
    try:
        most = row["peak_gib"]["update"] * GIB if row["peak_gib"] else math.inf
        settled = baseline.settle(most)
        runs, ours = {"rollout": baseline.rollout, "update": baseline.update}, {}
        if device == "cuda":
            spent, memory = timed(runs, device, 1)
            ratio = {name: statistics.median(own) / row["median_s"][name] for name, own in spent.items()}
        else:
            with Step(setting, device) as step:
                ours = {f"qirl {name}": phase.run for name, phase in step.phases().items()}
                spent, memory = timed(runs | ours, device, repetitions)
            ratio = {
                n: statistics.median(a / b for a, b in zip(spent[n], spent[f"qirl {n}"], strict=True)) for n in runs
            }
    finally:
        baseline.close()
    middle = {name: statistics.median(spent[name]) for name in runs}
    own = sum(statistics.median(spent[name]) for name in ours) or core_seconds(row)
    return {
        "overrides": own_setting(setting, kind).overrides, "base": "dtype", "error": agreed, **settled,
        "images_per_s": setting.images / sum(middle.values()), "ratio": ratio | {"step": sum(middle.values()) / own},
        "median_s": middle, "seconds": spent,
        "peak_gib": {name: memory[name] / GIB for name in runs} if any(memory.values()) else None,
    }  # fmt: skip


def measure_parts(setting: Setting, device: str, repetitions: int) -> dict:
    """Seconds of decoding and encoding, and their memory."""
    from throughput_parts import phases

    measured: dict = {"seconds": {}, "median_s": {}, "peak_gib": {}}
    for name, run in phases(setting, device):
        spent, memory = timed({name: run}, device, repetitions)
        measured["seconds"] |= spent
        measured["median_s"][name] = statistics.median(spent[name])
        measured["peak_gib"][name] = memory[name] / GIB
    return measured


def count_whole(row: dict) -> None:
    """Images a second with decoding and encoding, and the shares of all four phases, where those were measured."""
    parts = row.get("parts", {}).get("median_s")
    if parts:
        every = {name: row["median_s"][name] for name in CORE} | parts
        setting = row["setting"]
        row["images_per_s_whole"] = setting["prompts"] * setting["group"] / sum(every.values())
        row["share"] = {name: seconds / sum(every.values()) for name, seconds in every.items()}


def core_seconds(row: dict) -> float:
    """Of one step: rollout and update."""
    return sum(row["median_s"][name] for name in CORE)


def profiles(step: Step, phases: dict, medians: dict[str, float], device: str) -> dict[str, dict]:
    return {name: profiled(phase.run, device, medians[name]) for name, phase in phases.items()}


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
    shown = (
        f"{name}: {row['images_per_s']:.3f} images/s, {row['pairs_per_s']:.2f} pairs/s in the update, "
        f"{row['tokens_per_s']:.0f} tokens/s; time: {shares}{f'; MFU {mfu}' if mfu else ''}{memory}"
    )
    return f"{shown}\n{table_of_kinds(row['profile'])}" if "profile" in row else shown


def said(name: str, own: dict) -> str:
    """What was measured beside a row, in words."""
    if "refused" in own:
        return f"{name}: not measured: {own['refused']}"
    if name == "parts":
        return "parts: " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in own["median_s"].items())
    ratios = ", ".join(f"{part} {value:.2f}" for part, value in own["ratio"].items())
    return (
        f"{name}: {own['images_per_s']:.3f} images/s; times slower than qirl: {ratios} (batches of {own['batch']}, "
        f"checkpointing {own['checkpointing']})"
    )


def table(rows: Sequence[dict]) -> str:
    """Markdown: one line a setting."""
    head = ["setting", "images/s", "with decoding and encoding", "tokens/s", "MFU forward", "rollout", "update", "GiB"]
    head += [f"{kind}: {phase}" for kind, phase in (("same", "rollout"), ("same", "update"), ("peers", "step"))]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if "refused" in row:
            lines.append([row["setting"]["name"], f"not measured: {row['refused']}", *[""] * (len(head) - 2)])
            continue
        compared = row.get("baselines", {})
        ratios = [
            compared.get(k, {}).get("ratio", {}).get(p)
            for k, p in (("same", "rollout"), ("same", "update"), ("peers", "step"))
        ]
        mfu = row["mfu"] or {}
        memory = max(row["peak_gib"].values()) if row["peak_gib"] else None
        numbers = [
            (row["images_per_s"], ".3f"), (row.get("images_per_s_whole"), ".3f"), (row["tokens_per_s"], ".0f"),
            *((mfu.get(phase), ".1%") for phase in ("forward", *CORE)), (memory, ".1f"), *((r, ".2f") for r in ratios),
        ]  # fmt: skip
        cells = ["" if value is None else format(value, form) for value, form in numbers]
        lines.append([row["setting"]["name"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure small models on the CPU")
    parser.add_argument("--list", action="store_true", help="print the settings and end")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no setting that would end later")
    parser.add_argument(
        "--baselines", default="same,peers", help="same, peers, both with a comma (the default), or none"
    )
    parser.add_argument("--parts", action="store_true", help="measure the autoencoder and the text encoder, too")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, by kind of kernel")
    parser.add_argument("--peak", type=float, help="TFLOP/s of this GPU, for MFU, where its name is not known")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/throughput_cpu.json or _GPU.json")
    parser.add_argument("words", nargs="*", metavar="WORD", help="headline micro=8 model.attention=cudnn ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(arguments)
    if not args.cpu and not args.list and not torch.cuda.is_available():
        print("throughput: no CUDA device here; --cpu measures small models on the CPU", file=sys.stderr)
        return 2
    try:
        settings, baselines = chosen(args.words, args.cpu), kinds_of(args.baselines)
    except UserError as problem:
        print(f"throughput: {problem}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{s.name:12} {described(s)}" for s in settings))
        return 0
    torch.set_num_threads(args.threads)
    return report(settings, baselines, args)


def kinds_of(text: str) -> list[str]:
    """Of --baselines. Raises UserError for one that there is not."""
    kinds = [] if text == "none" else text.split(",")
    for kind in kinds:
        if kind not in BASELINES:
            raise UserError(f"--baselines {kind}: there are {', '.join(BASELINES)} and none")
    return kinds


def report(settings: Sequence[Setting], baselines: Sequence[str], args: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code."""
    facts = machine()
    device, name = ("cpu", "cpu") if args.cpu else ("cuda", facts["gpu"].replace(" ", "_"))
    out = args.out or Path(__file__).parent / f"results/throughput_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts, "matmul_tflops": {}, "rows": [], "left_out": []}
    peak = args.peak * 1e12 if args.peak else None
    asked = Asked(device, args.repetitions, peak, baselines, args.parts, args.profile, Budget(args.seconds))
    measure_all(settings, asked, found, out)
    write_json(out, found)
    shown = table(found["rows"])
    out.with_suffix(".md").write_text(shown + "\n")
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
    print(f"\n{shown}\n\n{out}")
    return int(all("refused" in row for row in found["rows"]))


def described(setting: Setting) -> str:
    """What a setting has, in one line."""
    values = dataclasses.asdict(setting) | {"overrides": " ".join(setting.overrides)}
    return " ".join(f"{k}={v}" for k, v in values.items() if k != "name" and v not in (None, ""))


if __name__ == "__main__":
    raise SystemExit(main())
