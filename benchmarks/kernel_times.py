"""How fast are the fused ops on a GPU, against eager PyTorch and torch.compile? One JSON row per op, pass and shape.

    python benchmarks/kernel_times.py                        every op at every shape
    python benchmarks/kernel_times.py --ops swiglu --quick   one op at its first shape

Shapes are the real ones: Qwen-Image 2.1 is 4096 wide with 32 heads of 128, 1.x 3072 wide with 24, at 1,024 to 16,384
tokens. Device time is triton.testing.do_bench's (the cache is flushed before each run): 20, 50 and 80 per cent quantiles
in milliseconds. GB/s counts the bytes that an op must move, as its file says; `of_copy` is their share of the bandwidth of a
copy of 1 GiB on the same machine. `host_us` is what one call costs the host. An op whose tests fail is not reported.
Rows go to OUT (benchmarks/results/kernels_GPU.json), with the machine they were measured on. (This file is not called
kernels.py: diffusers and transformers import a package of that name where they find one.)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qirl.kernels import gated_residual, merge_attention, norm_modulate, qk_norm_rope, residual_norm, swiglu
from qirl.run.folder import write_json
from qirl.run.machine import machine

HERE = Path(__file__).resolve().parent
TOKENS = (1024, 4096, 16384)
SIZES = ((4096, 32), (3072, 24))  # width and heads of 2.1 and of 1.x
ROWS = 9  # noise levels in a pack: the prefix's and eight targets'


@dataclass(frozen=True)
class Work:
    """One op at one shape. run and reference take `inputs`; forward and backward: bytes they must move, 0 for none."""

    run: Callable
    reference: Callable
    inputs: list[torch.Tensor]
    forward: int
    backward: int = 0

    def gradients(self, function: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """A call that runs the backward of function(*inputs) alone."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        outputs = torch.utils._pytree.tree_leaves(function(*leaves))
        douts = [torch.randn_like(x) for x in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, douts, retain_graph=True)


def _draw(*shapes: Sequence[int], device: str, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _rows(tokens: int, device: str) -> torch.Tensor:
    return torch.arange(tokens, device=device) * ROWS // tokens


def _swiglu(tokens, width, heads, device):
    inputs = _draw((tokens, 3 * width), (tokens, 3 * width), device=device)
    size = inputs[0].nbytes
    return Work(swiglu.swiglu, swiglu.reference, inputs, 3 * size, 5 * size)


def _gated_residual(tokens, width, heads, device):
    row, inputs = _rows(tokens, device), _draw((tokens, width), (tokens, width), (ROWS, width), device=device)
    run, reference = (lambda *x, f=f: f(*x, row) for f in (gated_residual.gated_residual, gated_residual.reference))
    return Work(run, reference, inputs, 3 * inputs[0].nbytes, 3 * inputs[0].nbytes)


def _norm_modulate(tokens, width, heads, device):
    row, inputs = _rows(tokens, device), _draw((tokens, width), (ROWS, width), device=device)
    run, reference = (lambda *x, f=f: f(*x, row, 1e-6) for f in (norm_modulate.norm_modulate, norm_modulate.reference))
    return Work(run, reference, inputs, 2 * inputs[0].nbytes, 3 * inputs[0].nbytes)


def _residual_norm(tokens, width, heads, device):
    row = _rows(tokens, device)
    inputs = _draw((tokens, width), (tokens, width), (ROWS, width), (ROWS, width), device=device)
    run, reference = (lambda *x, f=f: f(*x, row, 1e-6) for f in (residual_norm.residual_norm, residual_norm.reference))
    return Work(run, reference, inputs, 4 * inputs[0].nbytes, 6 * inputs[0].nbytes)


def _qk_norm_rope(tokens, width, heads, device):
    dim = width // heads
    inputs = _draw((tokens, heads, dim), (dim,), device=device)
    (angle,) = _draw((tokens, dim // 2), device=device, dtype=torch.float32)
    turn = angle.cos(), angle.sin()
    run, reference = (lambda *x, f=f: f(*x, *turn, 1e-6) for f in (qk_norm_rope.qk_norm_rope, qk_norm_rope.reference))
    angles = 2 * angle.nbytes
    return Work(run, reference, inputs, 2 * inputs[0].nbytes + angles, 3 * inputs[0].nbytes + angles)


def _merge_attention(tokens, width, heads, device):
    outs = _draw((tokens, heads, width // heads), (tokens, heads, width // heads), device=device)
    lses = _draw((tokens, heads), (tokens, heads), device=device, dtype=torch.float32)
    inputs = [outs[0], lses[0], outs[1], lses[1]]
    moved = 3 * outs[0].nbytes + 3 * lses[0].nbytes
    return Work(merge_attention.merge_attention, merge_attention.reference, inputs, moved)


OPS: dict[str, Callable[[int, int, int, str], Work]] = {
    "swiglu": _swiglu,
    "gated_residual": _gated_residual,
    "norm_modulate": _norm_modulate,
    "residual_norm": _residual_norm,
    "qk_norm_rope": _qk_norm_rope,
    "merge_attention": _merge_attention,
}


def tests_are_green(op: str) -> bool:
    """Runs the op's own tests, compiled for this GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QIRL_KERNELS")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE.parent / "tests/test_triton_ops.py"), "-k", op]
    return subprocess.run(command, cwd=HERE.parent, env=environment, stdout=sys.stderr).returncode == 0


def timed(call: Callable[[], object], moved: int, copy: float) -> dict:
    """Quantiles of device time, bandwidth, and the host's time a call."""
    from triton.testing import do_bench

    low, middle, high = do_bench(call, quantiles=[0.2, 0.5, 0.8])
    rate = moved / middle / 1e6
    return {
        "ms_p20": low,
        "ms_p50": middle,
        "ms_p80": high,
        "gb_per_s": rate,
        "of_copy": rate / copy,
        "host_us": host(call),
    }


def host(call: Callable[[], object], times: int = 100) -> float:
    """Microseconds that a call keeps the host, while the device is not waited for."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    spent = time.perf_counter() - begun
    torch.cuda.synchronize()
    return spent / times * 1e6


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), quantiles=[0.5]) / 1e6


def measure(op: str, tokens: int, size: tuple[int, int], copy: float) -> list[dict]:
    """Rows of one op at one shape: every implementation, forward and backward."""
    work = OPS[op](tokens, *size, "cuda")
    functions = {"qirl": work.run, "eager": work.reference, "compile": torch.compile(work.reference)}
    rows = []
    for name, function in functions.items():
        calls = {"forward": (lambda f=function: f(*work.inputs), work.forward)}
        if work.backward:
            calls["backward"] = (work.gradients(function), work.backward)
        for part, (call, moved) in calls.items():
            own = {"op": op, "pass": part, "tokens": tokens, "width": size[0], "implementation": name, "bytes": moved}
            rows.append(own | timed(call, moved, copy))
    return rows


def table(rows: Sequence[dict]) -> str:
    """Markdown: qirl's time and share of the copy bandwidth, and how many times slower the others are."""
    lines = ["| op | pass | tokens x width | ms | of copy | eager | torch.compile |", "|---|---|---|---|---|---|---|"]
    by_place: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        place = row["op"], row["pass"], f"{row['tokens']} x {row['width']}"
        by_place.setdefault(place, {})[row["implementation"]] = row
    for place, own in by_place.items():
        ours = own["qirl"]
        ratios = [f"{own[name]['ms_p50'] / ours['ms_p50']:.2f}" for name in ("eager", "compile")]
        lines.append(f"| {' | '.join(place)} | {ours['ms_p50']:.4f} | {ours['of_copy']:.0%} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/kernels_GPU.json")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here; times of a CPU would say nothing about these ops", file=sys.stderr)
        return 2
    import triton

    red = [op for op in args.ops if not tests_are_green(op)]
    copy, rows = copy_bandwidth(), []
    for op in args.ops:
        if op not in red:
            for size in SIZES[: 1 if args.quick else None]:
                for tokens in TOKENS[: 1 if args.quick else None]:
                    rows += measure(op, tokens, size, copy)
    facts = machine(triton=triton.__version__)
    out = args.out or HERE / f"results/kernels_{facts['gpu'].replace(' ', '_')}.json"
    write_json(out, {"machine": facts, "copy_gb_per_s": copy, "not_reported": red, "rows": rows})
    print(table(rows))
    if red:
        print(f"kernels: not reported, for their tests fail: {', '.join(red)}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
