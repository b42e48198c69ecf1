"""The registry of the kernel benchmark: what it times, the bytes it counts, and what it says of its numbers."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_suite  # noqa: E402
import kernel_checks  # noqa: E402
import kernel_ops  # noqa: E402
import kernel_report as report  # noqa: E402
import kernel_times as benchmark  # noqa: E402
import throughput  # noqa: E402

TOKENS = 24  # three for each row of modulation
SMALL = [kernel_ops.Model("small 2.1", 64, 4), kernel_ops.Model("small 1.x", 48, 3, shifted=True, bounded=False)]
EVERY = [(op, model) for op in benchmark.OPS for model in SMALL]
NAMES = [f"{op}, {model.name}" for op, model in EVERY]


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize("op, model", EVERY, ids=NAMES)
def test_an_op_is_timed_on_what_its_reference_computes_from_the_same_inputs(op, model):
    work = benchmark.OPS[op].build(TOKENS, model, "cpu")
    copies = lambda: [x.clone() for x in work.inputs]  # noqa: E731  an op may work in place
    ours, theirs = (leaves(f(*copies())) for f in (work.run, work.reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    if work.backward:
        ours, theirs = (kernel_ops.gradients(f, work.inputs)() for f in (work.run, work.reference))
        assert [x.shape for x in ours] == [x.shape for x in theirs] == [x.shape for x in work.inputs]


@pytest.mark.parametrize("op, model", EVERY, ids=NAMES)
def test_what_diffusers_has_computes_the_same_in_bfloat16(op, model):
    work = benchmark.OPS[op].build(TOKENS, model, "cpu")
    if "diffusers" not in work.others:
        pytest.skip("nothing of that kind")
    baseline = work.others["diffusers"]()
    assert kernel_ops.disagreement(work, baseline) <= benchmark.SAME
    if work.backward:
        assert all(x.isfinite().all() for x in kernel_ops.gradients(baseline.run, baseline.inputs)())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: Liger's kernels are not interpreted")
@pytest.mark.parametrize("op", ["swiglu", "qk_norm_rope"])
def test_what_liger_has_computes_the_same_in_bfloat16(op):
    pytest.importorskip("liger_kernel")
    work = benchmark.OPS[op].build(1024, kernel_ops.MODELS[0], "cuda")
    assert kernel_ops.disagreement(work, work.others["liger"]()) <= benchmark.SAME


def test_a_baseline_that_is_missing_or_computes_something_else_is_left_out_with_a_note():
    def absent():
        raise ImportError("No module named 'liger_kernel'")

    x = torch.ones(4, 2)
    other = lambda factor: lambda: kernel_ops.Baseline(lambda x: factor * x, [x])  # noqa: E731
    others = {"liger": absent, "same": other(2.001), "other": other(2.1)}
    found, notes = benchmark.baselines(kernel_ops.Work(None, lambda x: 2 * x, [x], 0, others=others))
    assert list(found) == ["same"]
    assert notes == [
        "liger left out: No module named 'liger_kernel'",
        "other left out: its result is 5.0e-02 off the reference",
    ]


def test_gradients_leave_the_inputs_alone_whatever_a_backward_writes():
    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            ctx.saved_tensors[0].data.zero_()
            return dout * 2

    x = torch.ones(3)
    kernel_ops.gradients(Overwrites.apply, [x])()
    assert x.eq(1).all()


@pytest.mark.parametrize("op, model", EVERY, ids=NAMES)
def test_bytes_are_at_least_those_of_the_large_inputs_and_outputs(op, model):
    """Rows of modulation and weights are left out: they stay in the cache."""
    work = benchmark.OPS[op].build(4096, model, "cpu")
    outputs = leaves(work.reference(*work.inputs))
    large = sum(x.nbytes for x in (*work.inputs, *work.constants, *outputs) if len(x) == 4096)
    assert large <= work.forward <= 1.6 * large


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert benchmark.main([]) == 2 and "no CUDA device" in capsys.readouterr().err


def measured(ms, of_copy=0.9, moved=100 << 20, **others):
    """Rows of one place: ours and others, by their times."""
    place = {"op": "swiglu", "pass": "forward", "tokens": 1024, "width": 4096, "of_copy": of_copy, "bytes": moved}
    return [place | {"implementation": name, "ms_p50": t} for name, t in {"qirl": ms, **others}.items()]


GOALS = {"swiglu": kernel_ops.Goal(forward=0.85)}
COPY, LAUNCH = 4000.0, 0.002  # GB/s, ms


def test_the_table_gives_times_ratios_and_goals():
    rows = measured(0.01, eager=0.05, compile=0.011, liger=0.02)
    assert report.table(rows, GOALS, COPY, LAUNCH).splitlines()[-1] == (
        "| swiglu | forward | 1024 x 4096 | 0.0100 | 90% | 5.00 | 1.10 | 2.00 |  | met |"
    )
    missed = measured(0.01, of_copy=0.8, eager=0.05, compile=0.009)
    assert report.table(missed, GOALS, COPY, LAUNCH).endswith(
        "| missed: 80% of copy, goal 85%; 1.11 x torch.compile, goal 1.05 |"
    )


@pytest.mark.parametrize(
    "rows, missed",
    [
        (measured(0.01, eager=0.05, compile=0.01), []),
        (measured(0.01, of_copy=0.84, eager=0.05, compile=0.01), ["swiglu forward 1024 x 4096: 84% of copy, goal 85%"]),
        # 8 MB at 4000 GB/s are 0.002 ms, with the launch 0.004
        (measured(0.005, of_copy=0.4, moved=8_000_000, eager=0.05, compile=0.005), []),
        (
            measured(0.006, moved=8_000_000, eager=0.05, compile=0.006),
            ["swiglu forward 1024 x 4096: 1.50 x floor, goal 1.3"],
        ),
        (
            measured(0.0106, eager=0.05, compile=0.01),
            ["swiglu forward 1024 x 4096: 1.06 x torch.compile, goal 1.05"],
        ),
        (measured(0.01, eager=0.029, compile=0.01), ["geometric mean over eager 2.90, goal 3.0"]),
        ([], []),
    ],
)
def test_each_goal_is_judged_at_its_own_limit(rows, missed):
    assert report.verdict(rows, GOALS, COPY, LAUNCH) == missed


@pytest.mark.parametrize("of_copy, check, code", [(0.9, True, 0), (0.8, False, 0), (0.8, True, 1)])
def test_check_fails_with_a_missed_goal_and_results_are_written(of_copy, check, code, tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "machine", lambda **versions: {"gpu": "a GPU", **versions})
    monkeypatch.setattr(kernel_checks, "red", lambda ops, tests: [])
    monkeypatch.setattr(kernel_checks, "compiling_ahead", lambda places: contextlib.nullcontext())
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: COPY)
    monkeypatch.setattr(benchmark, "launch_time", lambda: LAUNCH)
    rows = measured(0.01, of_copy=of_copy, eager=0.05, compile=0.01)
    monkeypatch.setattr(benchmark, "measure", lambda *a: (rows, ["a note"]))
    out = tmp_path / "kernels.json"
    arguments = ["--ops", "swiglu", "--quick", "--out", str(out), *["--check"] * check]
    assert benchmark.main(arguments) == code
    written = json.loads(out.read_text())
    assert written["rows"] == rows and written["notes"] == ["a note"] and len(written["missed"]) == (of_copy < 0.85)
    assert out.with_suffix(".png").exists() and out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_ops_whose_tests_fail_are_red(tmp_path):
    sources = {
        "good": "def test_one():\n    pass\ndef test_two():\n    pass",
        "mixed": "def test_three():\n    pass\ndef test_four_is_wrong():\n    assert 0",
        "shared": "def test_five():\n    pass\ndef test_six():\n    pass\ndef test_what_holds_for_all():\n    assert 0",
        "broken": "import nothing_of_that_name",
    }
    ops = {"good": ("one", "two"), "mixed": ("three", "four"), "shared": ("five", "six"), "broken": ("seven",)}
    tests = {op: str(tmp_path / f"test_{file}.py") for file, own in ops.items() for op in own}
    for file, source in sources.items():
        (tmp_path / f"test_{file}.py").write_text(source)
    assert kernel_checks.red(list(tests), tests) == ["four", "five", "six", "seven"]
    assert kernel_checks.red(["three", "five"], tests) == ["five"]


AHEAD = """
import kernel_checks, torch
from kernel_ops import Model
if __name__ == "__main__":
    place, counters = ("swiglu", 8, Model("small", 64, 4)), torch._dynamo.utils.counters
    with kernel_checks.compiling_ahead([place], "cpu"):
        pass
    kernel_checks._compile(*place, "cpu")
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_what_is_compiled_ahead_is_found_again(tmp_path):
    """Forward, and forward and backward for gradients, in a program as the benchmark is one."""
    (tmp_path / "ahead.py").write_text(AHEAD)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, tmp_path / "ahead.py"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "0"], done.stderr[-2000:]


def test_an_op_that_fails_does_not_stop_the_others_and_rows_are_kept(tmp_path, monkeypatch):
    def measure(op, *place):
        if op == "bad":
            raise RuntimeError("out of memory")
        return [{"op": op}], []

    monkeypatch.setattr(benchmark, "measure", measure)
    measured = {"copy_gb_per_s": COPY, "rows": [], "not_reported": [], "notes": []}
    places = [(op, 1024, SMALL[0]) for op in ("first", "bad", "last")]
    benchmark.measure_all(places, measured, tmp_path / "kernels.json")
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["op"] for row in written["rows"]] == ["first", "last"] and written["not_reported"] == ["bad"]
    assert written["notes"] == ["bad at 1024 x 64 failed: RuntimeError('out of memory')"]


def test_every_op_has_goals_and_tests_of_its_name():
    for name, op in benchmark.OPS.items():
        assert 0.5 <= op.goal.backward <= op.goal.forward <= 1
        assert f"def test_{name}" in (Path(__file__).parents[1] / op.tests).read_text()


def test_the_picture_is_drawn(tmp_path):
    rows = measured(0.01, eager=0.05, compile=0.011) + [
        row | {"tokens": 4096} for row in measured(0.02, moved=1 << 20, eager=0.05, compile=0.03, liger=0.04)
    ]
    report.plot(rows, GOALS, "a GPU", tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_the_suite_reports_every_step_and_fails_with_one_that_fails(tmp_path, monkeypatch, capsys):
    commands = {"good": ["true"], "bad": ["sh", "-c", "exit 3"], "after": ["true"]}
    monkeypatch.setattr(gpu_suite, "steps", lambda out, seconds=0: commands)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "good: done" in shown and "bad: FAILED (3)" in shown and "after: done" in shown
    assert '"exit_code": 3' in (tmp_path / "suite.json").read_text()
    assert (tmp_path / "suite.log").read_text().split() == ["==", "good", "==", "bad", "==", "after"]


def test_every_throughput_step_ends_in_time_and_together_they_have_every_setting(tmp_path):
    """What argparse makes of the commands, and the settings that they name."""
    seen = set()
    for name, command in gpu_suite.steps(tmp_path).items():
        if name.startswith("throughput"):
            args = throughput.parser().parse_intermixed_args(command[2:])
            assert args.seconds < gpu_suite.LIMIT and args.out == tmp_path / f"{name}.json"
            throughput.kinds_of(args.baselines)
            seen |= {setting.name for setting in throughput.chosen(args.words, cpu=False)}
    assert seen == {setting.name for setting in throughput.SETTINGS}


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LIMIT", 0.5)
    with (tmp_path / "log").open("w") as log:
        assert gpu_suite.run(["sh", "-c", "sleep 60 & echo $!; wait"], log) == "ended after 0.5 s"
    child = int((tmp_path / "log").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_the_page_about_kernels_shows_the_rows_that_were_measured():
    root = Path(__file__).parents[1]
    measured = json.loads((root / "benchmarks/results/kernels_NVIDIA_H200.json").read_text())
    goals = {name: op.goal for name, op in benchmark.OPS.items()}
    shown = report.table(measured["rows"], goals, measured["copy_gb_per_s"], measured["launch_ms"])
    assert shown in (root / "docs/kernels.md").read_text()
