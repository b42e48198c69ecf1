"""Where the time of a phase goes: shares of the device's time by kind of kernel, launches, and how long the device waits.

On a GPU by the names of kernels, on a CPU by operators. Gaps are the wall time of a run without the profiler, less what the
device was busy: the host could not keep up, or waited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from throughput_step import finish
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
OWN, OTHER = "qirl's ops", "other"
# (kind, pattern of a kernel's name), the first that is found; attention before products, whose types it names
KERNELS = (
    ("collectives", r"nccl"),
    ("attention", r"flash|fmha|sdpa|attention|attn|mha"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|xmma|wgmma|scaled_mm|splitk|gemv|dot_kernel"),
    ("copies", r"memcpy|memset|copy|catarray|index|gather|scatter|transpose"),
    ("elementwise", r"elementwise|reduce|foreach|multi_tensor|softmax|norm|triton_|fill|adam"),
)
OPERATORS = (
    ("collectives", r"^c10d::|^gloo:|^nccl:"),
    ("attention", r"scaled_dot_product|flash|efficient_attention"),
    ("matrix products", r"^aten::(mm|addmm_?|bmm|baddbmm|_scaled_mm|_int_mm|matmul|linear|dot|mv)$"),
    ("copies", r"^aten::(copy_|_to_copy|clone|contiguous|cat|stack|index.*|gather|scatter.*|select_backward|slice_backward)$"),
    ("elementwise", r"^aten::(add|sub|mul|div|neg|silu|gelu|sigmoid|tanh|exp|log|pow|sqrt|rsqrt|lerp|where|sum|mean|norm|_foreach|"
                    r"linalg|addc|fill|zero|clamp|native_layer_norm|rms_norm|_fused_adam)"),
)  # fmt: skip


@lru_cache(1)
def own_kernels() -> re.Pattern:
    """The kernels of this repository, by their names in its sources, and its operators, by their namespace."""
    names = {"qirl"}
    for folder, files, pattern in (
        ("kernels", "*.py", r"^@(?:triton\.)?jit[^\n]*\n(?:@[^\n]*\n)*def (\w*kernel)\b"),
        ("csrc", "*.cu", r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)"),
    ):
        for path in (ROOT / folder).glob(files):
            names |= set(re.findall(pattern, path.read_text(), re.M))
    return re.compile(rf"^(?:void )?(?:{'|'.join(sorted(names))})\b")


def kind_of(name: str, kinds=KERNELS) -> str:
    """What a kernel (or with kinds=OPERATORS an operator) does, by its name."""
    if own_kernels().search(name):
        return OWN
    return next((kind for kind, pattern in kinds if re.search(pattern, name, re.I)), OTHER)


def profiled(run: Callable[[], object], device: str, wall: float) -> dict:
    """One run under the profiler. wall: its seconds without.

    Returns {"ms": by kind, "launches": by kind, "busy_ms", "gap_ms" (None on a CPU), "top": the ten names that take most}.
    """
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu, acc_events=True) as found:
        run()
        finish(device)
    ms: dict[str, float] = {}
    launches: dict[str, int] = {}
    names: dict[str, float] = {}
    for event in found.key_averages():
        spent = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
        if not spent or gpu and not _on_device(event):
            continue
        kind = kind_of(event.key, KERNELS if gpu else OPERATORS)
        ms[kind] = ms.get(kind, 0.0) + spent
        launches[kind] = launches.get(kind, 0) + event.count
        names[event.key] = names.get(event.key, 0.0) + spent
    busy = _busy_ms(found) if gpu else sum(ms.values())
    top = dict(sorted(names.items(), key=lambda item: -item[1])[:10])
    gap = max(0.0, wall * 1e3 - busy) if gpu else None
    return {"ms": ms, "launches": launches, "busy_ms": busy, "gap_ms": gap, "top": top}


def _on_device(event) -> bool:
    """Whether it is a kernel or a copy, and no span of the host that is drawn over them, such as an optimizer's step."""
    drawn = getattr(event, "is_user_annotation", False) or event.key.startswith(
        ("Optimizer.", "FSDP::", "ProfilerStep")
    )
    return event.device_type == torch.autograd.DeviceType.CUDA and not drawn


def _busy_ms(found) -> float:
    """Milliseconds in which the device ran anything: kernels of several streams overlap."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in found.events() if _on_device(e))
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3


def table(profiles: Mapping[str, dict]) -> str:
    """Markdown: for each phase the share of every kind and its launches, the largest first; then totals and gaps."""
    names = list(profiles)
    total = {name: sum(own["ms"].values()) or 1.0 for name, own in profiles.items()}
    kinds = {kind for own in profiles.values() for kind in own["ms"]}
    order = sorted(kinds, key=lambda kind: -sum(own["ms"].get(kind, 0) for own in profiles.values()))
    cells = [["", *(f"{name}: {what}" for name in names for what in ("share", "launches"))]]
    cells.append(["---"] * len(cells[0]))
    for kind in order:
        row = [kind]
        for name, own in profiles.items():
            row += [f"{own['ms'].get(kind, 0) / total[name]:.1%}", str(own["launches"].get(kind, 0))]
        cells.append(row)
    row = ["all"]
    for own in profiles.values():
        row += [f"{own['busy_ms']:.1f} ms", str(sum(own["launches"].values()))]
    cells.append(row)
    if any(own["gap_ms"] is not None for own in profiles.values()):
        gaps = [
            [f"{own['gap_ms']:.1f} ms", f"{own['gap_ms'] / (own['gap_ms'] + own['busy_ms']):.1%}"]
            for own in profiles.values()
        ]
        cells.append(["device waits", *(cell for pair in gaps for cell in pair)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
