"""Checkpoints of one layout load into every other, to the bit, and training goes on from there."""

import pytest
import torch
from gloo import spawn
from parallel_runs import layouts_in_turn

FOUR = [(None, "dp2 tp2"), ("dp2 tp2", "dp4"), ("dp4", "dp2 tp2")]
TWO = [("dp4", "tp2"), ("dp2 tp2", "tp2 in FSDP"), ("tp2", "tp2 in FSDP")]
FAMILIES = ("single", "dual")


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """{(family, (checkpoint, layout)): (what was loaded, the next update's norm, weights after it)}."""
    folder = str(tmp_path_factory.mktemp("layouts"))
    found = spawn(4, layouts_in_turn, folder, FOUR)[0] | spawn(2, layouts_in_turn, folder, TWO)[0]
    return found | layouts_in_turn(0, folder, [("tp2", "one")]), folder


def same(first, other):
    (start, norm, after), (own_start, own_norm, own_after) = first, other
    assert start.keys() == own_start.keys() and len(start) > 10
    for name, value in start.items():
        assert torch.equal(own_start[name], value), name
    assert own_norm == pytest.approx(norm, rel=1e-9)
    for name, value in after.items():
        torch.testing.assert_close(own_after[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [*FOUR[1:], *TWO, ("tp2", "one")], ids=" to ".join)
def test_a_checkpoint_loads_bit_equal_in_another_layout_and_goes_on(turns, family, turn):
    same(turns[0][family, FOUR[0]], turns[0][family, turn])


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_loads_on_four(turns):
    back = [("tp2", "dp2 tp2"), ("tp2 in FSDP", "dp4"), ("one", "dp2 tp2")]
    found = spawn(4, layouts_in_turn, turns[1], back)[0]
    for family in FAMILIES:
        for turn in back:
            same(turns[0][family, FOUR[0]], found[family, turn])
