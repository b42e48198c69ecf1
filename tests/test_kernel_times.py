"""The registry of the kernel benchmark: what it times, and the bytes it counts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_suite  # noqa: E402
import kernel_times as benchmark  # noqa: E402


@pytest.mark.parametrize("op", benchmark.OPS)
def test_an_op_is_timed_on_what_its_reference_computes_from_the_same_inputs(op):
    work = benchmark.OPS[op](18, 64, 4, "cpu")
    ours, theirs = (torch.utils._pytree.tree_leaves(f(*work.inputs)) for f in (work.run, work.reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    if work.backward:
        ours, theirs = (work.gradients(f)() for f in (work.run, work.reference))
        assert [x.shape for x in ours] == [x.shape for x in theirs] == [x.shape for x in work.inputs]


@pytest.mark.parametrize("op", benchmark.OPS)
def test_bytes_are_at_least_those_of_the_large_inputs_and_outputs(op):
    """Rows of modulation and weights are left out: they stay in the cache."""
    work = benchmark.OPS[op](4096, 64, 4, "cpu")
    outputs = torch.utils._pytree.tree_leaves(work.reference(*work.inputs))
    large = sum(x.nbytes for x in (*work.inputs, *outputs) if len(x) == 4096)
    assert large <= work.forward <= 1.6 * large


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert benchmark.main([]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_the_table_gives_times_and_ratios():
    row = {"op": "swiglu", "pass": "forward", "tokens": 1024, "width": 4096, "of_copy": 0.9}
    rows = [
        row | {"implementation": name, "ms_p50": ms}
        for name, ms in (("qirl", 0.01), ("eager", 0.05), ("compile", 0.011))
    ]
    assert benchmark.table(rows).splitlines()[-1] == ("| swiglu | forward | 1024 x 4096 | 0.0100 | 90% | 5.00 | 1.10 |")


def test_the_suite_reports_every_step_and_fails_with_one_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_suite, "steps", lambda out: {"good": ["true"], "bad": ["sh", "-c", "exit 3"], "after": ["true"]}
    )
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "good: done" in shown and "bad: FAILED (3)" in shown and "after: done" in shown
    assert '"exit_code": 3' in (tmp_path / "suite.json").read_text()
