"""What `--dry-run` says of tensor parallel layouts, and layouts that are refused."""

import pytest
from tiny_runs import train_config

from qirl.config import load
from qirl.errors import UserError
from qirl.plan import plan
from qirl.policy.trainer import open_trainer


def test_the_plan_of_two_ranks_counts_their_parts_and_the_work_once(tiny_model, tmp_path):
    one = plan(train_config(tmp_path, tiny_model))
    two = plan(train_config(tmp_path, tiny_model, {"parallel": {"tp": 2}}), 2)
    four = plan(train_config(tmp_path, tiny_model, {"parallel": {"tp": 2}}), 4)
    assert [found["world_size"] for found in (one, two, four)] == [1, 2, 4]
    assert one["parameters"] == two["parameters"] and one["flops"] == two["flops"] and one["tokens"] == two["tokens"]
    assert two["memory"]["optimizer"] < 0.8 * one["memory"]["optimizer"]
    assert four["memory"]["optimizer"] == pytest.approx(two["memory"]["optimizer"] / 2, rel=0.01)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({"tp": 2}, 1, "parallel.tp=2 does not divide the number of ranks, 1; start 2 of them"),
        ({"tp": 3}, 3, "parallel.tp=3 does not divide the model's 2 attention heads (width 32); use 1 or 2"),
        ({"tp": 2, "dp": 4}, 4, "use parallel.dp=2, or start 8 ranks"),
        ({"tp": 2}, 6, "is not a multiple of the 3 ranks"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_the_run_folder_is_touched(
    tiny_model, tmp_path, monkeypatch, parallel, world, message
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError) as error:
        open_trainer(train_config(tmp_path / "run", tiny_model, {"parallel": parallel}), ())
    assert message in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["parallel.pp=2", "parallel.cp=2", "parallel.sequence=true", "parallel.tp=0"])
def test_what_is_not_there_is_refused_in_one_line(option):
    with pytest.raises(UserError) as error:
        load("train", {"model": {"path": "base"}}, [option])
    assert option.split("=")[0] in str(error.value) and "\n" not in str(error.value)
