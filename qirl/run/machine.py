"""What measured numbers depend on: processor, GPU, versions, commit."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch


def machine(**more: str) -> dict:
    """One JSON-able record for a row of benchmarks/results/, with `more` (versions of what was compared)."""
    return {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit of the checkout this file is in, "-dirty" if it has changes; "unknown" elsewhere."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"
