"""Runs that are stopped anywhere and started again end as an uninterrupted one, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import yaml
from tiny_runs import BASE, PRETRAIN, merge

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def rl_values(folder: Path, model: Path) -> dict:
    """Prompts come back in the middle of a step (5 of one category, 2 a step) and checkpoints in that of an epoch."""
    prompts = folder / "prompts.jsonl"
    texts = ["a red 7", "35 in green", "a 4", "a red 7", "a 9 on blue"]
    prompts.write_text("".join(json.dumps({"text": t, "id": 3 * i}) + "\n" for i, t in enumerate(texts)))
    return merge(
        BASE,
        {
            "run": {"steps": 14, "checkpoint_every": 3, "samples_every": 4, "monitor_prompts": 2},
            "world": {"prompts": str(prompts)},
            "model": {"path": str(model)},
            "optimizer": {"ema": 0.6, "warmup": 2, "decay": "cosine", "weight_decay": 0.01},
            "policy": {"prompts": 2, "nft": {"old_decay": 0.5, "old_ramp": 0.1}, "kl": 0.1},
        },
    )


def start(command: str, folder: Path, values: dict) -> subprocess.Popen:
    config = folder / "config.json"
    config.write_text(json.dumps(merge(values, {"run": {"out": str(folder / "out")}})))
    arguments = [sys.executable, tiny_runs.__file__, command, str(config), *(["patchy"] if command == "train" else [])]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=log, stderr=log)


def finish(command: str, folder: Path, values: dict) -> None:
    code = start(command, folder, values).wait(120)
    assert code == 0, (folder / "log.txt").read_text()[-3000:]


def stop_when(process: subprocess.Popen, condition, how=signal.SIGKILL) -> int:
    """Signals the process as soon as the condition holds; its exit code."""
    limit = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < limit
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(how)
    return process.wait(120)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def content(folder: Path) -> dict:
    """Everything of a run that must not depend on its interruptions."""
    out = folder / "out"
    timed = lambda key: key.startswith(("time/", "timing/")) or key.endswith("_per_second")  # noqa: E731
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in record.items() if not timed(k)} for record in metrics]}
    for path in sorted([*(out / "model").iterdir(), *(out / "samples").iterdir(), out / "scores.jsonl"]):
        if path.exists():
            found[path.name] = path.read_bytes()
    return found


def assert_same(folder: Path, reference: dict) -> None:
    found = content(folder)
    assert found["metrics"] == reference["metrics"]
    assert found.keys() == reference.keys()
    assert [name for name in found if found[name] != reference[name]] == []


@pytest.fixture(scope="module", params=["pretrain", "train"])
def uninterrupted(request, tmp_path_factory, tiny_model):
    """(command, config values, folder of the finished run, what it left behind)."""
    folder = tmp_path_factory.mktemp("whole")
    values = merge(PRETRAIN, {"run": {"steps": 14, "checkpoint_every": 3}, "pretrain": {"batch": 24}})
    if request.param == "train":
        values = rl_values(folder, tiny_model)
    finish(request.param, folder, values)
    found = content(folder)
    assert len(found["metrics"]) == 14 and "diffusion_pytorch_model.safetensors" in found
    return request.param, values, folder, found


def damage(out: Path) -> None:
    """What a machine that lost its power leaves behind: torn lines, a checkpoint half written."""
    for log in (out / "metrics.jsonl", out / "scores.jsonl"):
        if log.exists():
            with log.open("ab") as file:
                file.write(b'{"step": 99, "loss": 0.')
    stale = out / "checkpoints" / "step_000015.tmp"
    stale.mkdir()
    (stale / "__0_0.distcp").write_bytes(b"half")


def test_run_killed_at_many_points_ends_as_an_uninterrupted_one(uninterrupted, tmp_path):
    command, values, _, reference = uninterrupted
    out = tmp_path / "out"
    half = lambda: any(p.suffix == ".tmp" for p in out.glob("checkpoints/*"))  # noqa: E731
    lucky = random.Random().choice([5, 6, 7])
    points = [
        half,  # while the first checkpoint is written
        lambda: lines(out / "metrics.jsonl") >= lucky,
        lambda: lines(out / "metrics.jsonl") >= 10,  # steps after the last checkpoint are done again
        lambda: (out / "model").exists(),  # while the model is exported
    ]
    if command == "train":
        points.insert(0, lambda: (out / "config.yaml").exists())  # before the first step
    killed = []
    for point in points:
        killed.append(stop_when(start(command, tmp_path, values), point))
        if lines(out / "metrics.jsonl") >= 10 and not (out / "model").exists():
            damage(out)
    # the export is over in a moment, so that the last one may be late
    assert killed[:-1] == [-signal.SIGKILL] * (len(points) - 1), (tmp_path / "log.txt").read_text()[-3000:]
    finish(command, tmp_path, values)
    assert_same(tmp_path, reference)


def test_sigterm_ends_on_a_checkpoint_with_code_143_and_resumes(uninterrupted, tmp_path):
    command, values, _, reference = uninterrupted
    out = tmp_path / "out"
    code = stop_when(start(command, tmp_path, values), lambda: lines(out / "metrics.jsonl") >= 4, how=signal.SIGTERM)
    assert code == 143, (tmp_path / "log.txt").read_text()[-3000:]
    done = lines(out / "metrics.jsonl")
    assert (out / "checkpoints" / f"step_{done:06d}" / "manifest.json").exists() and done < 14
    finish(command, tmp_path, values)
    assert_same(tmp_path, reference)


def test_finished_run_is_left_as_it_is_by_the_same_command_and_by_another_config(uninterrupted):
    command, values, folder, reference = uninterrupted
    out = folder / "out"
    finish(command, folder, values)
    assert_same(folder, reference)
    state = lambda: {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(out.rglob("*")) if p.is_file()}  # noqa: E731
    before = state()
    other = start(command, folder, merge(values, {"optimizer": {"lr": 0.5}}))
    assert other.wait(120) != 0
    assert "holds a run of another config: optimizer.lr (0.001 there, 0.5 now)" in (folder / "log.txt").read_text()
    assert state() == before


@pytest.mark.parametrize("command", ["pretrain", "train"])
def test_finished_run_with_a_higher_run_steps_goes_on_as_one_uninterrupted_longer_run(command, tmp_path, tiny_model):
    folders = {name: tmp_path / name for name in ("whole", "longer")}
    for folder in folders.values():
        folder.mkdir()
    values = merge(PRETRAIN, {"pretrain": {"batch": 24}})
    if command == "train":
        values = rl_values(tmp_path, tiny_model)
    values = merge(values, {"run": {"checkpoint_every": 3, "samples_every": 4}, "optimizer": {"decay": "none"}})
    finish(command, folders["whole"], merge(values, {"run": {"steps": 8}}))
    finish(command, folders["longer"], merge(values, {"run": {"steps": 4}}))
    finish(command, folders["longer"], merge(values, {"run": {"steps": 8, "checkpoint_every": 5}}))
    assert_same(folders["longer"], content(folders["whole"]))
    config = yaml.safe_load((folders["longer"] / "out" / "config.yaml").read_text())
    assert (config["run"]["steps"], config["run"]["checkpoint_every"]) == (8, 5)
    line = "run.steps was 4 and is 8 now: the run goes on from step 4, the constant learning rate stays as it is"
    assert line in (folders["longer"] / "log.txt").read_text()
