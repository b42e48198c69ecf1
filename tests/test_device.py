"""Which device a command uses: run.device, serve.device, --device, and the devices of rewards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distill_runs
import numpy as np
import pytest
import torch
import yaml
from cli_runs import qirl, refused
from PIL import Image
from tiny_judges import RUBRIC, save_judge, save_records
from tiny_runs import BASE, PRETRAIN, TEXT_DIM, merge, train_config

from qirl.errors import UserError
from qirl.parallel.data import device_of, run_device
from qirl.policy.trainer import train
from qirl.rewards.registry import build

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
NONE = "=cuda, but torch finds no GPU here (see `qirl doctor`); use "


@pytest.fixture
def commands(tmp_path, tiny_model):
    """The arguments of every command that computes, by name; what they read and write lies below `tmp_path`."""

    def config(name: str, values: dict) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        return path

    def plain(name: str, values: dict) -> list:
        return [*name.split(), config(name.replace(" ", "_"), values), "--out", tmp_path / "out"]

    def distill() -> list:
        teacher = distill_runs.save_teacher(tiny_model, tmp_path / "teacher", 1)
        return plain("distill", distill_runs.values(tmp_path / "out", tiny_model, {"t2i": teacher}))

    def judge() -> list:
        base = save_judge(tmp_path / "judge", width=32, layers=1)
        records = save_records(tmp_path / "records", 8, 4)
        return plain("reward train", {"judge": {"path": str(base), "records": str(records), "batch": 4}})

    def rewards(name: str) -> list:
        (tmp_path / "rubric.txt").write_text(RUBRIC)
        (tmp_path / "images").mkdir()
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images/a.png")
        options = {"kind": "judge", "model": str(save_judge(tmp_path / "judge", width=32, layers=1))}
        options |= {"rubric": str(tmp_path / "rubric.txt"), "mode": "expected_direct", "pixels": 1024}
        own = [config("serve", {"rewards": {"seen": options}, "serve": {"port": 0}})]
        return ["reward", name, *own, *([tmp_path / "images"] if name != "serve" else [])]

    model = {"model": {"path": str(tiny_model)}, "world": {"text_dim": TEXT_DIM}}
    makers = {
        "pretrain": lambda: plain("pretrain", PRETRAIN),
        "train": lambda: plain("train", merge(BASE, model)),
        "dry run": lambda: [*plain("train", merge(BASE, model)), "--dry-run"],
        "distill": distill,
        "curate": lambda: plain("curate", model),
        "calibrate": lambda: plain("calibrate", model),
        "evaluate": lambda: plain("evaluate", merge(model, {"evaluation": {"prompts": 2, "group": 2, "steps": 2}})),
        "reward train": judge,
        "reward serve": lambda: rewards("serve"),
        "reward score": lambda: rewards("score"),
        "reward check": lambda: rewards("check"),
        "sample": lambda: ["sample", "--model", tiny_model, "--out", tmp_path / "out.png", "--steps", 2, "a red 7"],
        "quickstart": lambda: ["quickstart", "--out", tmp_path / "out"],
    }
    return lambda name: makers[name]()


NAMES = [
    "pretrain", "train", "dry run", "distill", "curate", "calibrate", "evaluate", "reward train", "reward serve",
    "reward score", "reward check", "sample", "quickstart",
]  # fmt: skip


def on(name: str, arguments: list, device: str) -> list:
    if name in ("sample", "quickstart"):
        return [*arguments, "--device", device]
    section = "run" if name in ("reward train", *NAMES[:7]) else "serve"
    return [*arguments, f"{section}.device={device}"]


@without_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(commands, tmp_path, name):
    arguments = commands(name)
    assert NONE in refused(tmp_path, *on(name, arguments, "cuda"))


@pytest.mark.parametrize("name", ["evaluate", "reward score", "sample"])
def test_a_command_can_be_told_to_leave_the_gpu_alone(commands, monkeypatch, name):
    arguments = commands(name)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("a GPU was chosen"))
    code, _, err = qirl(*on(name, arguments, "cpu"))
    assert code == 0, err


def test_a_run_on_the_cpu_has_all_its_weights_there(tmp_path, tiny_model):
    engine = train(train_config(tmp_path / "run", tiny_model, {"run": {"device": "cpu", "steps": 1}}), quiet=True)
    assert engine.ranks.device.type == "cpu" and not engine.optimizer.fused
    assert {p.device.type for p in engine.model.parameters()} == {"cpu"}


def test_a_name_that_is_no_device_is_refused(commands, tmp_path):
    assert 'run.device="gpu": ' in refused(tmp_path, *on("train", commands("train"), "gpu"))
    assert 'run.device="gpu": ' in refused(tmp_path, *on("sample", commands("sample"), "gpu"))


def test_a_run_goes_on_where_it_was_and_runs_older_than_the_option_go_on(commands, tmp_path):
    arguments, written = commands("pretrain"), tmp_path / "out/config.yaml"
    assert qirl(*arguments, "run.steps=2")[0] == 0
    line = refused(tmp_path, *arguments, "run.steps=2", "run.device=cpu")
    assert 'another config: run.device ("auto" there, "cpu" now)' in line
    values = yaml.safe_load(written.read_text())
    assert values["run"].pop("device") == "auto" and values["optimizer"].pop("impl") == "auto"
    written.write_text(yaml.safe_dump(values))
    assert 'run.device ("auto" there, "cpu" now)' in refused(tmp_path, *arguments, "run.steps=2", "run.device=cpu")
    code, _, err = qirl(*arguments, "run.steps=3", "optimizer.impl=torch")
    assert code == 0, err
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3


@without_gpu
def test_apex_on_a_cpu_is_refused_before_anything_is_written(commands, tmp_path):
    arguments = commands("pretrain")
    line = refused(tmp_path, *arguments, "optimizer.impl=apex")
    assert "optimizer.impl=apex runs on a GPU alone; use optimizer.impl=torch" in line


def test_one_gpu_for_several_ranks_is_refused_once(commands):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qirl"]
    command = [*ranks, *map(str, on("pretrain", commands("pretrain"), "cuda:0"))]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    line = (
        "run.device=cuda:0 is one GPU for all 2 ranks of torchrun; use run.device=cuda, which gives every rank its own"
    )
    assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr[-2000:]


def test_ranks_take_the_gpu_of_their_number(monkeypatch):
    """torch is told of two GPUs: what is checked is a choice, nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(run_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda:0",
        "cpu",
        "cuda:0",
        "cuda:1",
    ]
    with pytest.raises(UserError, match="^run.device=cuda:2: there are 2 GPUs here, cuda:0 to cuda:1; use one of them"):
        run_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(run_device(name)) for name in ("auto", "cpu", "cuda")] == ["cuda:1", "cpu", "cuda:1"]
    assert str(device_of("cuda:0", "device")) == "cuda:0"  # a reward of all ranks may have one of its own
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="^run.device=auto of LOCAL_RANK 2: there are 2 GPUs here"):
        run_device("auto")


@without_gpu
def test_rewards_without_a_device_run_where_the_run_computes(commands):
    *_, path, _ = commands("reward score")
    from qirl.config import load

    rewards = load("serve", path).rewards
    (reward,) = build(rewards, "cpu")
    assert reward.chat.model.device.type == "cpu"
    with pytest.raises(UserError, match="^device=cuda, but torch finds no GPU"):
        build(rewards, "cuda")
    own = load("serve", path, ["rewards.seen.device=cpu"]).rewards
    (reward,) = build(own, "cuda")
    assert reward.chat.model.device.type == "cpu"
