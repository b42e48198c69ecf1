"""Two gloo ranks against one: gradients, metrics, scores, images, exported weights."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import BASE, PRETRAIN, SDE, merge

from qirl.config_sections import World
from qirl.data.sampler import PromptSampler
from qirl.world import make_world

FLOAT64 = {"model": {"dtype": "float64"}, "flow": {"storage": "float64"}}
# a large epsilon: AdamW then does not blow up the rounding of gradients near zero into whole steps
COMMON = {"run": {"steps": 2, "samples_every": 1, "monitor_prompts": 3}, "optimizer": {"eps": 1e-2}}
SPREAD = {"policy": {"minibatches": 2, "old": "recompute"}, "flow": {"sampler": "sde", "guidance": 2.0}}


def uneven_budget() -> int:
    """Both prompts of one rank fit into a pack of this size at step 0, those of the other rank do not."""
    world = make_world(World(text_dim=tiny_runs.TEXT_DIM))
    chosen = PromptSampler(world.data.prompts("train"), BASE["run"]["seed"]).step(0, 4)
    cost = [6 * 16 + world.family.condition(p).tokens for p, _ in chosen]
    ranks = [cost[0] + cost[2], cost[1] + cost[3]]
    assert ranks[0] != ranks[1], "choose another seed"
    return min(ranks)


def cases(model: Path) -> dict[str, tuple[dict, str | None]]:
    rl = lambda *parts: merge(BASE, COMMON, {"model": {"path": str(model)}}, *parts)  # noqa: E731
    base = merge(PRETRAIN, COMMON, {"pretrain": {"batch": 5, "micro_tokens": 40}})
    return {
        "nft": (rl(FLOAT64, {"optimizer": {"ema": 0.5}}), "colours"),
        "nft with an average": (rl(FLOAT64, {"policy": {"nft": {"old_decay": 0.5, "old_ramp": 0.3}}}), "patchy"),
        "grpo": (rl(FLOAT64, SDE, SPREAD), "patchy"),
        "seam": (rl(FLOAT64, SDE, {"policy": {"micro_tokens": 50, "kl": 0.1}}), "colours"),
        "uneven": (rl(FLOAT64, {"policy": {"micro_tokens": uneven_budget()}}), "colours"),
        "lora": (rl(FLOAT64, SDE, {"model": {"lora": {"rank": 2}}, "policy": {"kl": 0.1}}), "colours"),
        "nft float32": (rl({}), "luck"),
        "grpo float32": (rl(SDE, SPREAD), "luck"),
        "seam float32": (rl(SDE, {"policy": {"micro_tokens": 50}}), "luck"),
        "pretrain": (merge(base, {"model": {"dtype": "float64"}}), None),
        "pretrain float32": (base, None),
    }


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NAMES = list(cases(Path("model")))
RL = [name for name in NAMES if "pretrain" not in name]


def in_folder(cases: dict, folder: Path) -> dict:
    return {
        name: (merge(values, {"run": {"out": str(folder / name)}}), reward) for name, (values, reward) in cases.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """All cases on one rank (here) and on two (one torchrun): {ranks: ({case: observed}, folder)}."""
    found, work = {}, tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        folder = work / str(ranks)
        folder.mkdir()
        own = in_folder(cases(tiny_model), folder)
        (folder / "cases.json").write_text(json.dumps(own))
        start = [sys.executable] if ranks == 1 else TORCHRUN
        command = [*start, tiny_runs.__file__, "observe", str(folder / "cases.json"), str(folder / "seen.pt")]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[ranks] = torch.load(folder / "seen.pt"), folder
    return found


def tolerance(name: str) -> float:
    return 1e-5 if "float32" in name else 1e-9


def records(folder: Path, name: str, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / file).read_text().splitlines()]


def assert_close(one, two, limit, where):
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_close(one[key], two[key], limit, f"{where}.{key}")
    elif isinstance(one, float):
        assert math.isclose(one, two, rel_tol=limit, abs_tol=limit), f"{where}: {one} and {two}"
    else:
        assert one == two, where


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_update_equal_those_of_one_rank(runs, name):
    one, two = (runs[ranks][0][name]["gradients"] for ranks in (1, 2))
    assert len(one) == len(two) == (4 if name.startswith("grpo") else 2)
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys() and a
        # the second step's gradient carries what AdamW made of the first one's rounding
        limit = tolerance(name) * (1 if step == 0 else 10)
        largest = max(value.norm() for value in a.values())
        for key, value in a.items():
            error = (b[key] - value).norm() / torch.maximum(value.norm(), 1e-3 * largest)
            assert error <= limit, f"update {step}, {key}: {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_metrics_equal_those_of_one_rank(runs, name):
    one, two = (records(runs[ranks][1], name, "metrics.jsonl") for ranks in (1, 2))
    assert [r["step"] for r in one] == [1, 2]
    for a, b in zip(one, two, strict=True):
        plain = [
            {k: v for k, v in r.items() if not k.startswith(("time/", "timing/")) and k != "images_per_second"}
            for r in (a, b)
        ]
        assert_close(*plain, tolerance(name) * 10, f"step {a['step']}")


@pytest.mark.parametrize("name", RL)
def test_scores_of_all_ranks_are_written_once_in_order(runs, name):
    one, two = (records(runs[ranks][1], name, "scores.jsonl") for ranks in (1, 2))
    assert [r["id"] for r in two] == list(range(24))
    assert one == two


@pytest.mark.parametrize("name", RL)
def test_images_equal_those_of_one_rank(runs, name):
    one, two = (runs[ranks][0][name]["latents"] for ranks in (1, 2))
    torch.testing.assert_close(two, one, atol=tolerance(name) * 10, rtol=tolerance(name) * 10)  # after two updates
    names = [{p.name for p in (runs[ranks][1] / name / "samples").iterdir()} for ranks in (1, 2)]
    assert names[0] == names[1] and "step_000002.png" in names[0]


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_equal_those_of_one_rank(runs, name):
    one, two = (load_file(runs[ranks][1] / name / "model" / "diffusion_pytorch_model.safetensors") for ranks in (1, 2))
    assert one.keys() == two.keys() and not any("lora" in key for key in one)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=tolerance(name), rtol=tolerance(name))


def test_ranks_agree_on_the_seam_and_on_the_number_of_packs(runs):
    packs = {name: runs[2][0][name]["packs"] for name in ("seam", "uneven")}
    assert all(part[0] for rank in packs["seam"] for step in rank for part in step)
    first = [rank[0][0] for rank in packs["uneven"]]
    assert not any(seam for seam, _, _ in first)
    assert sorted(live for _, live, _ in first) == [1, 2] and {count for _, _, count in first} == {2}


def test_sigterm_stops_both_ranks_on_one_checkpoint_and_they_resume_bit_for_bit(tmp_path, tiny_model):
    """The signal reaches ranks in different steps; a checkpoint that only one of them writes would hang."""

    def start(name: str) -> subprocess.Popen:
        options = {"run": {"steps": 40, "checkpoint_every": 11, "out": str(tmp_path / name)}}
        values = merge(BASE, {"model": {"path": str(tiny_model)}}, options)
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(values))
        command = [*TORCHRUN, tiny_runs.__file__, "train", str(config), "patchy"]
        log = (tmp_path / f"{name}.log").open("ab")
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    whole, stopped = start("whole"), start("stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while stopped.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) != 0
    done = metrics.read_bytes().count(b"\n")
    log = (tmp_path / "stopped.log").read_text()[-3000:]
    assert done < 40 and (tmp_path / "stopped" / "checkpoints" / f"step_{done:06d}").exists(), log
    assert whole.wait(120) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    assert start("stopped").wait(120) == 0, (tmp_path / "stopped.log").read_text()[-3000:]
    for file in ("scores.jsonl", "model/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
