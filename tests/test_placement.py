"""Where tensors are, and what makes the host wait for them, on a device with a GPU's rules (simulated_gpu.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("placed_runs.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)
def test_ops_and_runs_keep_to_their_device_and_let_the_host_run_ahead(tmp_path):
    """Every op of the kernel benchmark can be captured in a graph; runs lose as on the host, no sampler step waits, and the
    updates of a training step wait once."""
    done = subprocess.run([sys.executable, PROGRAM, tmp_path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    problems = {found["check"]: found["problem"] for found in map(json.loads, done.stdout.splitlines())}
    assert len(problems) > 30 and not any(problems.values()), "\n".join(
        f"{name}: {problem}" for name, problem in problems.items() if problem
    )
