"""How the trainer treats what rewards say of themselves, and what they do wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import colours, experience, train_config

from qirl.errors import UserError
from qirl.policy.trainer import open_trainer


def declared(samples):
    return colours(samples)


declared.components = ("red", "edge")


def test_a_weight_of_no_component_is_refused_before_the_run_folder_is_made(tmp_path, tiny_model):
    config = train_config(tmp_path / "run", tiny_model, {"advantage": {"weights": {"rde": 1.0}}})
    with pytest.raises(UserError, match="advantage.weights names 'rde'.*did you mean 'red'"):
        open_trainer(config, [declared])
    assert not (tmp_path / "run").exists()


def test_where_rewards_do_not_declare_it_only_warns_for_a_component_may_apply_later(opened):
    trainer = opened({"advantage": {"weights": {"later": 1.0}}})
    with pytest.warns(UserWarning, match="no reward has returned later"):
        experience(trainer)


def test_read_noise_of_a_reward_silences_components_that_vary_less(opened):
    def noisy(samples):
        return colours(samples)

    noisy.read_noise = {"red": 1.0, "edge": 1.0}  # more than any group varies
    assert float(experience(opened(reward=colours))[0].advantage.abs().max()) > 0
    assert float(experience(opened(reward=noisy))[0].advantage.abs().max()) == 0


def test_a_prompt_repeated_beyond_its_noise_counters_is_refused(tmp_path, tiny_model):
    (tmp_path / "one.txt").write_text("a red 7\n")
    config = train_config(
        tmp_path / "run",
        tiny_model,
        {"world": {"prompts": str(tmp_path / "one.txt")}, "policy": {"prompts": 400, "group": 12}},
    )
    with pytest.raises(UserError, match="4096 samples"):
        open_trainer(config, [colours])


def test_rewards_run_inside_a_live_event_loop(opened):
    """A notebook has one; asyncio.run would refuse there."""
    import asyncio

    async def cell():
        return experience(opened())[0]

    assert torch.isfinite(asyncio.run(cell()).advantage).all()


PROGRAM = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
from tiny_runs import colours, train_config
from qirl.errors import UserError
from qirl.policy.trainer import train

def broken(samples):
    return [{{"red": "1.5"}} for _ in samples] if os.environ["RANK"] == "1" else colours(samples)

if __name__ == "__main__":
    try:
        train(train_config({out!r}, {model!r}), [broken], quiet=True)
    except UserError as error:
        pathlib.Path({refused!r} + os.environ["RANK"]).write_text(str(error))
"""


def test_an_error_of_one_ranks_reward_stops_all_ranks(tmp_path, tiny_model):
    program = tmp_path / "program.py"
    names = {"tests": str(Path(__file__).parent), "out": str(tmp_path / "run"), "model": str(tiny_model)}
    program.write_text(PROGRAM.format(**names, refused=str(tmp_path / "refused")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for rank in (0, 1):
        refusal = tmp_path / f"refused{rank}"
        assert refusal.exists(), done.stderr[-2000:]
        assert "red='1.5' is no number" in refusal.read_text()
