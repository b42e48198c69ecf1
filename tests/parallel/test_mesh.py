"""Degrees of the mesh against the world, the model and each other; and the axes of a mesh of four ranks."""

import pytest
from gloo import spawn
from parallel_runs import axes

from qirl.config_parallel import Parallel
from qirl.errors import UserError
from qirl.models.qwen_image_21 import QwenImage21Config
from qirl.parallel.mesh import Degrees


def test_data_parallel_is_what_the_other_axes_leave():
    assert Degrees.of(Parallel(), 6) == Degrees(dp=6)
    assert Degrees.of(Parallel(tp=2), 6) == Degrees(dp=3, tp=2)
    assert Degrees.of(Parallel(tp=2, dp=3), 6) == Degrees(dp=3, tp=2)


@pytest.mark.parametrize(
    ("options", "world", "numbers"),
    [
        (dict(tp=4), 6, "parallel.tp=4 does not divide the number of ranks, 6; start 8 of them"),
        (dict(tp=4), 6, "or use 2"),
        (dict(tp=3), 1, "start 3 of them"),
        (dict(tp=2, dp=2), 6, "parallel.dp=2 x 2 (parallel.tp=2) is 4 ranks and torchrun starts 6; use parallel.dp=3"),
    ],
)
def test_a_world_that_does_not_factor_is_refused_with_the_numbers(options, world, numbers):
    with pytest.raises(UserError) as error:
        Degrees.of(Parallel(**options), world)
    assert numbers in str(error.value)


def test_heads_and_layers_that_cannot_be_cut_are_refused_with_what_can():
    config = QwenImage21Config(num_attention_heads=6, num_layers=2)
    Degrees(tp=3).check(config)
    with pytest.raises(UserError, match=r"tp=4 does not divide the model's 6 attention heads .*; use 1 or 2 or 3 or 6"):
        Degrees(tp=4).check(config)
    with pytest.raises(UserError, match="pp=3 is more than the model's 2 layers; use 2 or fewer"):
        Degrees(pp=3).check(config)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (dict(pp=2), "parallel.pp=2 is not supported yet; use parallel.pp=1"),
        (dict(cp=4), "parallel.cp=4 is not supported yet; use parallel.cp=1"),
        (dict(sequence=True), "parallel.tp=1; set parallel.tp=2 or more"),
    ],
)
def test_what_is_not_there_is_refused(options, fix):
    with pytest.raises(ValueError, match=fix):
        Parallel(**options)


def test_ranks_of_one_tensor_parallel_group_are_neighbours_and_groups_sum_along_their_axis():
    seen = spawn(4, axes)
    assert [r["places"] for r in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r["first"] for r in seen] == [True, False, False, False]
    assert [r["tp"] for r in seen] == [0 + 1, 0 + 1, 2 + 3, 2 + 3]
    assert [r["dp"] for r in seen] == [0 + 2, 1 + 3, 0 + 2, 1 + 3]
    assert all(
        r["turned"] == [[0, 2], [1, 3]] and r["objects"] == [10 * r["places"][0], 10 * r["places"][0] + 1] for r in seen
    )
