"""How fast are the fused ops on a GPU, against eager PyTorch, torch.compile, Liger and diffusers?

    python benchmarks/kernel_times.py                        every op at every shape
    python benchmarks/kernel_times.py --ops swiglu --quick   one op at its first shape
    python benchmarks/kernel_times.py --check                exit code 1 where a goal is missed
    python benchmarks/kernel_times.py --cpu                  ratios of the C++ ops to eager PyTorch, on a CPU

One JSON row per op, pass, shape and implementation. Shapes are the real ones: Qwen-Image 2.1 is 4096 wide with 32 heads
of 128, 1.x 3072 wide with 24, at 1,024 to 16,384 tokens. ms_*: 20, 50 and 80 per cent quantiles of device time, from
replays of a CUDA graph of one call, the cache flushed before each. GB/s counts the bytes that an op must move, as its
file says; `of_copy` is their share of the bandwidth of a copy of 1 GiB on the same machine. `host_us` is what one call
outside a graph costs the host. An op whose tests fail is not reported, nor is a baseline that is not installed or
computes something else: the notes say so. Rows are written as they come.

OUT (benchmarks/results/kernels_GPU.json) holds the rows and the machine they were measured on; a table (.md) and a
picture (.png) go beside it. (This file is not called kernels.py: diffusers and transformers import a package of that
name where they find one.)
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import kernel_checks
import kernel_sampler
import torch
from kernel_ops import TOKENS, Baseline, Model, Work, disagreement, gradients
from kernel_registry import OPS
from kernel_report import plot, table, verdict

from qirl.run.folder import write_json
from qirl.run.machine import machine

HERE = Path(__file__).resolve().parent
SAME = 0.01  # |theirs - reference| / |reference|: three roundings to bfloat16 are 0.004


def baselines(work: Work) -> tuple[dict[str, Baseline], list[str]]:
    """Those that are installed and compute what the reference does, and a note on each of the others."""
    found, notes = {}, []
    for name, build in work.others.items():
        try:
            baseline = build()
        except ImportError as missing:
            notes.append(f"{name} left out: {missing}")
            continue
        off = disagreement(work, baseline)
        if off <= SAME:
            found[name] = baseline
        else:
            notes.append(f"{name} left out: its result is {off:.1e} off the reference")
    return found, notes


def captured(make: Callable[[], Callable]) -> tuple[torch.cuda.CUDAGraph, Callable]:
    """A graph of make()'s call, and the call. Both on one stream: a backward runs on its forward's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph, call


def quantiles(call: Callable) -> list[float]:
    """20, 50 and 80 per cent of its device time in ms, the cache flushed before each run."""
    from triton.testing import do_bench

    return do_bench(call, quantiles=[0.2, 0.5, 0.8])


def host(call: Callable[[], object], times: int = 100) -> float:
    """Microseconds that a call keeps the host, while the device is not waited for."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    spent = time.perf_counter() - begun
    torch.cuda.synchronize()
    return spent / times * 1e6


def timed(make: Callable[[], Callable], moved: int, copy: float) -> dict:
    """Device time, bandwidth, and the host's time of make()'s call."""
    graph, call = captured(make)
    low, middle, high = quantiles(graph.replay)
    rate = moved / middle / 1e6
    return {
        "bytes": moved,
        "ms_p20": low,
        "ms_p50": middle,
        "ms_p80": high,
        "gb_per_s": rate,
        "of_copy": rate / copy,
        "host_us": host(call),
    }


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / quantiles(lambda: target.copy_(source))[1] / 1e6


def launch_time() -> float:
    """Milliseconds of a graph of one kernel that does nearly nothing."""
    one = torch.zeros(1, device="cuda")
    return quantiles(captured(lambda: lambda: one.add_(1))[0].replay)[1]


def measure(op: str, tokens: int, model: Model, copy: float) -> tuple[list[dict], list[str]]:
    """Rows of one op at one shape, every implementation, forward and backward; and notes."""
    torch.compiler.reset()  # the shapes of each place are compiled for themselves
    work = OPS[op].build(tokens, model, "cuda")
    others, notes = baselines(work)
    functions = {"qirl": work.run, "eager": work.reference, "compile": kernel_checks.compiled(work)}
    implementations = {name: Baseline(run, work.inputs) for name, run in functions.items()} | others
    rows = []
    for name, own in implementations.items():
        passes = {"forward": (lambda own=own: lambda: own.run(*own.inputs), work.forward)}
        if work.backward:
            passes["backward"] = (lambda own=own: gradients(own.run, own.inputs), work.backward)
        for part, (make, moved) in passes.items():
            place = {"op": op, "pass": part, "tokens": tokens, "width": model.width, "implementation": name}
            rows.append(place | timed(make, moved, copy))
    return rows, [f"{op} at {tokens} x {model.width}: {note}" for note in notes]


def measure_all(places: Sequence[tuple[str, int, Model]], measured: dict, out: Path) -> None:
    """Adds to measured["rows"] and ["notes"], written to `out` after every place: what ran is kept whatever follows.

    An op that cannot be run or compiled at a place does not stop the others; it goes to measured["not_reported"].
    """
    for op, tokens, model in places:
        try:
            rows, notes = measure(op, tokens, model, measured["copy_gb_per_s"])
        except Exception as problem:
            traceback.print_exc()
            rows, notes = [], [f"{op} at {tokens} x {model.width} failed: {problem!r:.300}"]
            measured["not_reported"].append(op)
        measured["rows"] += rows
        measured["notes"] += notes
        write_json(out, measured)


def on_cpu(ops: Sequence[str], repeats: int = 7) -> list[dict]:
    """One row an op, pass and size: milliseconds of eager and of ours, by turns in one run, and their median ratio.

    In float32, on one thread. Eager is references alone, noise included.
    """
    rows = []
    for op in ops:
        for tokens in (TOKENS[0], TOKENS[-1]):
            work = OPS[op].build(tokens, OPS[op].models[0], "cpu")
            both = work.reference, work.run
            passes = {"forward": [functools.partial(f, *work.inputs) for f in both]}
            if work.backward:
                passes["backward"] = [gradients(f, work.inputs) for f in both]
            for part, (eager, ours) in passes.items():
                pairs = [(_spent(eager, "reference"), _spent(ours, "auto")) for _ in range(repeats)]
                middle = sorted(pairs, key=lambda pair: pair[0] / pair[1])[repeats // 2]
                rows.append({"op": op, "pass": part, "tokens": tokens, "eager_ms": middle[0] * 1e3,
                             "ms": middle[1] * 1e3, "ratio": middle[0] / middle[1]})  # fmt: skip
    return rows


def _spent(call: Callable[[], object], kernels: str, least: float = 0.05) -> float:
    """Seconds of CPU time a call under QIRL_KERNELS=kernels, over as many calls as take `least` seconds."""
    os.environ["QIRL_KERNELS"] = kernels
    call()
    begun, calls = time.process_time(), 0
    while time.process_time() - begun < least:
        call()
        calls += 1
    return (time.process_time() - begun) / calls


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--cpu", action="store_true", help="the C++ ops against eager PyTorch on this CPU")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a goal is missed")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/kernels_GPU.json")
    args = parser.parse_args(arguments)
    if args.cpu:
        torch.set_num_threads(1)
        rows = on_cpu([op for op in args.ops if op in kernel_sampler.OPS])
        write_json(args.out or HERE / "results/kernels_cpu.json", {"machine": machine(), "rows": rows})
        for row in rows:
            print("{op} {pass} {tokens}: {eager_ms:.3f} ms eager, {ms:.3f} ms ours, {ratio:.2f} times".format(**row))
        return 0
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here; times of a CPU would say nothing about these ops", file=sys.stderr)
        return 2
    return on_gpu(args.ops, args.quick, args.check, args.out)


def on_gpu(ops: Sequence[str], quick: bool, check: bool, out: Path | None) -> int:
    """The whole benchmark; returns the exit code."""
    import triton

    some = slice(1 if quick else None)
    places = [(op, tokens, model) for op in ops for model in OPS[op].models[some] for tokens in TOKENS[some]]
    with kernel_checks.compiling_ahead(places):  # while the tests run: the GPU is not timed yet
        red = kernel_checks.red(ops, {name: op.tests for name, op in OPS.items()})
    facts = machine(triton=triton.__version__)
    out = out or HERE / f"results/kernels_{facts['gpu'].replace(' ', '_')}.json"
    copy, launch, goals = copy_bandwidth(), launch_time(), {name: op.goal for name, op in OPS.items()}
    measured = {
        "machine": facts,
        "copy_gb_per_s": copy,
        "launch_ms": launch,
        "rows": [],
        "not_reported": red,
        "notes": [],
    }
    measure_all([place for place in places if place[0] not in red], measured, out)
    rows = measured["rows"]
    measured["missed"] = verdict(rows, goals, copy, launch)
    write_json(out, measured)
    shown = table(rows, goals, copy, launch)
    out.with_suffix(".md").write_text(shown + "\n")
    if rows:
        plot(rows, goals, f"{facts['gpu']}, copy {copy:.0f} GB/s", out.with_suffix(".png"))
    print(shown)
    for line in [*measured["notes"], *(f"missed: {m}" for m in measured["missed"])]:
        print(line)
    if measured["not_reported"]:
        names = ", ".join(dict.fromkeys(measured["not_reported"]))
        print(f"kernels: not reported, for their tests or their own runs fail: {names}", file=sys.stderr)
    return int(bool(measured["not_reported"] or (check and measured["missed"])))


if __name__ == "__main__":
    raise SystemExit(main())
