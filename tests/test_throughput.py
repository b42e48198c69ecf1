"""The benchmark compares like with like: equal gradients, equal images. (How fast is not tested here.)"""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks/throughput_baselines.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("throughput", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(bench):
    return bench.make_models(num_layers=2)


@pytest.mark.parametrize("references", [0, 2])
def test_the_update_that_is_timed_gives_the_gradients_of_diffusers(bench, models, references):
    case = bench.Case(references, side=4, text=5, pairs=8, micro=4)
    assert bench.check_update(models, case) <= bench.GRADIENT
    row = bench.bench_update(models, case, repetitions=1)
    assert row["diffusers_batch"] <= case.micro
    assert row["ratio"] > 0


@pytest.mark.parametrize("references", [0, 2])
def test_the_rollout_that_is_timed_gives_the_latents_of_diffusers(bench, models, references):
    case = bench.Case(references, side=4, text=5, pairs=3)
    assert bench.check_rollout(models, case, steps=3) <= bench.LATENTS
    row = bench.bench_rollout(models, case, steps=3, repetitions=1)
    assert row["ratio"] > 0 and row["ratio_batch"] > 0


def test_other_gradients_are_told(bench, models):
    theirs, _ = models
    other = bench.make_models(num_layers=2, eps=1e-2)[1]
    with pytest.raises(AssertionError, match="gradients differ"):
        bench.check_update((theirs, other), bench.Case(1, side=4, text=5, pairs=4, micro=4))


def test_what_a_gpu_is_timed_with_runs_in_bfloat16_as_near_to_float32_as_diffusers(bench):
    """The shape of the large model with fewer and narrower heads."""
    small = bench.LARGE | {"num_layers": 1, "num_attention_heads": 2, "context_in_dim": 64}
    theirs, ours = models = bench.make_models(dtype=torch.bfloat16, **small)
    case = bench.Case(1, side=4, text=5, pairs=4, micro=4)
    exact, data = copy.deepcopy(ours).float(), bench.with_our_noise(ours, case)
    expected = bench.our_rollout(exact, case, data, 3)
    off = [
        (got - expected).norm()
        for got in (bench.our_rollout(ours, case, data, 3), bench.their_rollout(theirs, case, data, 3, shared=True))
    ]
    assert 0 < off[0] < 1.25 * off[1] and off[0] < 0.1 * expected.norm()
    assert bench.bench_update(models, case, repetitions=1)["ratio"] > 0


def test_cases_beyond_the_time_budget_are_named_and_the_first_always_runs(bench, monkeypatch):
    seconds = iter(range(0, 1000, 4))  # the clock moves on four seconds at every look
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(bench, "make_models", lambda device: None)
    monkeypatch.setattr(bench, "TIMED", {part: lambda *case: {"references": case[2]} for part in ("update", "rollout")})
    for allowed, expected in ((1, 1), (25, 2), (1000, 7)):
        row, writes = {}, []
        bench.compare(row, "cpu", False, 1, bench.Budget(allowed), lambda row=row, w=writes: w.append(str(row)))
        assert len(writes) == expected == len(row["update"] + row["rollout"])
        assert row["left_out"] == [f"{part} {references}" for part, references in bench.CASES[expected:]]


def test_without_a_gpu_it_says_so(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main([]) == 2 and "--cpu" in capsys.readouterr().err
