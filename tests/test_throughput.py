"""The benchmark compares like with like: equal gradients, equal images. (How fast is not tested here.)"""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks/throughput.py"


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
    row = bench.bench_update(models, case, repetitions=1)
    assert row["gradient_error"] <= bench.GRADIENT
    assert row["diffusers_batch"] <= case.micro
    assert row["ratio"] > 0


@pytest.mark.parametrize("references", [0, 2])
def test_the_rollout_that_is_timed_gives_the_latents_of_diffusers(bench, models, references):
    row = bench.bench_rollout(models, bench.Case(references, side=4, text=5, pairs=3), steps=3, repetitions=1)
    assert row["latents_error"] <= bench.LATENTS


def test_an_update_with_other_gradients_is_not_timed(bench, models):
    theirs, _ = models
    other = bench.make_models(num_layers=2, eps=1e-2)[1]
    with pytest.raises(AssertionError, match="gradients differ"):
        bench.bench_update((theirs, other), bench.Case(1, side=4, text=5, pairs=4, micro=4), repetitions=1)
