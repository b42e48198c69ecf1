"""Tensor and sequence parallel transformers of both families against the same ones on one rank."""

import pytest
import torch
from gloo import spawn
from parallel_runs import CASES, transformers

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def alone():
    return transformers(0, 1, (False,))


@pytest.fixture(scope="module")
def two():
    return spawn(2, transformers, 2, (False, True))


def compare(one, many, limit):
    """Velocities by norm, gradients against their own norm or a thousandth of the largest."""
    for (v, grads), (own_v, own_grads) in zip(one, many, strict=True):
        assert (own_v - v).norm() <= limit * v.norm()
        assert own_grads.keys() == grads.keys() and grads
        largest = max(g.norm() for g in grads.values())
        for name, grad in grads.items():
            error = (own_grads[name] - grad).norm() / torch.maximum(grad.norm(), 1e-3 * largest)
            assert error <= limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens whole", "tokens cut"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_velocities_and_gradients_of_two_ranks_equal_those_of_one(alone, two, case, sequence):
    compare(alone[case, False], two[0][case, sequence], LIMITS[case[1]])


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens whole", "tokens cut"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ranks_have_the_same_velocity_to_the_bit(two, case, sequence):
    for (v, _), (other, _) in zip(two[0][case, sequence], two[1][case, sequence], strict=True):
        assert torch.equal(v, other)


@pytest.mark.slow
def test_velocities_and_gradients_of_four_ranks_equal_those_of_one(alone):
    seen = spawn(4, transformers, 4, (False, True))[0]
    for (case, _), found in seen.items():
        compare(alone[case, False], found, LIMITS[case[1]])
