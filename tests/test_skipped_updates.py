"""Runs whose gradient stays non-finite end, with the cause, on the last good checkpoint: real runs that diverge.

A learning rate of 1e30 takes the weights so far in one update that every later loss overflows.
"""

import json
import subprocess
import sys
from pathlib import Path

import distill_runs
import pytest
import torch
import yaml
from cli_runs import qirl
from tiny_judges import save_judge, save_records
from tiny_runs import BASE, PRETRAIN, merge
from torch.distributed.checkpoint import FileSystemReader

from qirl.run import checkpoint

DIVERGING = {"run": {"steps": 9, "checkpoint_every": 1, "threads": 1}, "optimizer": {"lr": 1e30, "max_skipped": 3}}


@pytest.fixture
def commands(tmp_path, tiny_model):
    """The arguments of every command that trains, below `tmp_path`."""

    def written(name: str, values: dict) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        return path

    def pretrain() -> list:
        return ["pretrain", written("pretrain", merge(PRETRAIN, DIVERGING, {"optimizer": {"ema": 0.0}}))]

    def train() -> list:  # the latents of diverged weights are failed samples: let the run go on with them
        own = {"model": {"path": str(tiny_model)}, "advantage": {"max_failed": 1.0}}
        return ["train", written("train", merge(BASE, DIVERGING, own))]

    def distill() -> list:
        teacher = distill_runs.save_teacher(tiny_model, tmp_path / "teacher", 1)
        own = distill_runs.values(tmp_path / "out", tiny_model, {"t2i": teacher}, DIVERGING)
        return ["distill", written("distill", own)]

    def reward() -> list:
        base = save_judge(tmp_path / "judge", width=32, layers=1)
        records = save_records(tmp_path / "records", 8, 4)
        judge = {"path": str(base), "records": str(records), "batch": 4, "dtype": "float32"}
        return ["reward", "train", written("reward", merge(DIVERGING, {"judge": judge}))]

    makers = {"pretrain": pretrain, "train": train, "distill": distill, "reward train": reward}
    return lambda name: [*makers[name](), "--out", tmp_path / "out"]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in saved.items() if k.startswith("weights/")}
    checkpoint.load(path, tensors)
    return tensors


@pytest.mark.filterwarnings("ignore:step", "ignore:.*latents are not finite")
@pytest.mark.parametrize("command", ["pretrain", "train", "distill", "reward train"])
def test_a_run_whose_updates_are_all_skipped_ends_on_its_last_good_checkpoint(commands, tmp_path, command):
    arguments = commands(command)
    code, _, err = qirl(*arguments)
    line = err.splitlines()[-1]
    assert code == 2 and "step 4: 3 updates in a row were skipped because the gradient is not finite" in line, err
    kept = sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir())
    assert kept == ["step_000002", "step_000003"] and f"{tmp_path}/out/checkpoints/step_000003 stays" in line
    assert not (tmp_path / "out/model").exists()
    first, last = (weights_of(tmp_path / "out/checkpoints" / name) for name in kept)
    assert all(v.isfinite().all() and torch.equal(v, last[k]) for k, v in first.items())
    code, _, err = qirl(*arguments)  # two of them stand in the checkpoint: one more is enough
    assert code == 2 and "step 4: 3 updates in a row" in err, err
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore:step", "ignore:.*latents are not finite")
def test_zero_lets_a_run_skip_to_its_end(commands, tmp_path):
    arguments = commands("pretrain")
    assert qirl(*arguments)[0] == 2
    code, _, err = qirl(*arguments, "optimizer.max_skipped=0")  # the same run: the option changes no number
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records] == [0] + [1] * 8


@pytest.mark.filterwarnings("ignore:step", "ignore:.*latents are not finite")
def test_an_update_that_is_not_skipped_begins_the_count_anew(opened):
    engine = opened({"optimizer": {"max_skipped": 2}}).engine
    parameter = next(iter(engine.weights.current.values()))
    for step, value in enumerate((torch.nan, 1.0, torch.inf, 1.0, torch.nan)):
        parameter.grad = torch.full_like(parameter, value)
        assert engine.outcome(step, [engine.update(step)])["skipped"] == (value != 1.0)


def test_two_ranks_end_together(commands, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qirl"]
    done = subprocess.run([*command, *map(str, commands("pretrain"))], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stderr.count("step 4: 3 updates in a row were skipped") == 1
    assert "exitcode  : 2" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["step_000002", "step_000003"]
