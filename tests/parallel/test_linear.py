"""Collectives in both directions, and column and row parallel layers of every kind against whole ones."""

import pytest
import torch
from gloo import spawn
from parallel_runs import feed_forwards, moves

WHOLE = torch.arange(10.0).view(5, 2)
OWN = WHOLE[:3], torch.cat([WHOLE[3:], torch.zeros(1, 2)])  # three rows a rank, the last one filled up
BOTH = torch.full((3, 2), 1.0), torch.tensor([[2.0, 2], [2, 2], [0, 0]])
SPLIT = torch.tensor([[1.0] * 2] * 3 + [[2.0] * 2] * 2)


@pytest.fixture(scope="module")
def moved():
    return spawn(2, moves)


@pytest.mark.parametrize(
    ("name", "out", "grad"),
    [
        ("copy", (WHOLE, WHOLE), (torch.full((5, 2), 3.0),) * 2),
        ("reduce", (2 * WHOLE, 2 * WHOLE), (torch.ones(5, 2), torch.full((5, 2), 2.0))),
        ("split", OWN, (SPLIT, SPLIT)),
        ("join", (WHOLE, WHOLE), (torch.ones(3, 2), BOTH[1])),
        ("gather", (WHOLE, WHOLE), (torch.full((3, 2), 3.0), 1.5 * BOTH[1])),
        ("scatter", tuple(2 * x for x in OWN), (SPLIT, SPLIT)),
        ("columns", (WHOLE, WHOLE), (torch.ones(5, 1), torch.full((5, 1), 2.0))),
        ("partial columns", (WHOLE, WHOLE), (torch.full((5, 1), 3.0),) * 2),
    ],
)
def test_a_collective_moves_rows_and_gradients_as_its_table_says(moved, name, out, grad):
    for rank in range(2):
        y, x_grad = moved[rank][name]
        assert torch.equal(y, out[rank]) and torch.equal(x_grad, grad[rank])


@pytest.fixture(scope="module")
def layers():
    return feed_forwards(0, 1), spawn(2, feed_forwards, 2)


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens whole", "tokens cut"])
@pytest.mark.parametrize("kind", ["plain", "biased", "lora"])
def test_a_cut_feed_forward_equals_the_whole_one_with_every_gradient(layers, kind, sequence):
    y, of_x, grads = layers[0][kind, False]
    for own_y, own_x, _ in (rank[kind, sequence] for rank in layers[1]):
        torch.testing.assert_close(own_y, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_x, of_x, rtol=1e-5, atol=1e-5)
    own_grads = layers[1][0][kind, sequence][2]
    assert own_grads.keys() == grads.keys() and any(name.endswith("bias") for name in grads) == (kind == "biased")
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens whole", "tokens cut"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_cut_layers_of_8_bits_round_no_more_than_whole_ones(layers, kind, sequence):
    """Row layers have scales of their own on every rank, so the two are not equal: each is a rounding of the exact one."""
    exact, rounded = layers[0]["lora", False], layers[0][kind, False]
    for place in (0, 1):
        error = (rounded[place] - exact[place]).norm()
        for rank in layers[1]:
            own = (rank[kind, sequence][place] - exact[place]).norm()
            assert 0 < own <= 1.2 * error, f"{own:.2e} against {error:.2e}"
