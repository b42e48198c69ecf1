"""Every command on complete tiny pipelines of both families: runs, learns, is killed and goes on, exports for diffusers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bright import bright
from openai_server import MODEL, Server
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import pipeline

import qirl
from qirl import config as configuration
from qirl.config_sections import World
from qirl.errors import UserError
from qirl.families.registry import family_of
from qirl.run.logs import read

pytestmark = pytest.mark.usefixtures("small_references")
T21, T1, PLUS = (f"QwenImage{part}Pipeline" for part in ("21", "", "EditPlus"))


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A cache of conditions of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QIRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Files of drawing prompts (two sizes) and of edits, each with an image to learn from."""
    folder, draw = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    for name, size in (("a", (40, 60)), ("b", (64, 64)), ("target", (70, 50))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    drawn = [
        {"text": t, "image": "target.png", "category": c} for t, c in (("a red 7", "number"), ("a blue dog", "animal"))
    ]
    drawn += [{"text": "three cats", "height": 96, "width": 32, "image": "target.png", "category": "animal"}]
    drawn += [{"text": "a tall tree in the rain", "image": "target.png", "category": "number", "metadata": {"of": 1}}]
    edits = [
        {"text": t, "sources": s, "image": "b.png"}
        for t, s in (("make it red", ["a.png"]), ("swap them", ["b.png", "a.png"]))
    ]
    for name, lines in (("t2i", drawn), ("edit", edits * 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: folder / f"{name}.jsonl" for name in ("t2i", "edit")}


def merge(*parts):
    out = {}
    for part in parts:
        for key, value in part.items():
            out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def values(folder, file, out, *parts):
    task = file.stem
    return merge(
        {
            "world": {"name": "prompts", "prompts": str(file), "resolution": 64, "task": task}, "model": {"path": str(folder)},
            "flow": {"steps": 4}, "run": {"steps": 3, "out": str(out), "report": False, "samples_every": 2, "checkpoint_every": 2},
        },
        *parts,
    )  # fmt: skip


RL = {"policy": {"prompts": 4, "group": 3, "timesteps": {"count": 2}}, "optimizer": {"lr": 3e-3}}
GRPO = {"policy": {"loss": "grpo", "kl": 0.1}, "flow": {"sampler": "sde"}}
GUIDED = {"flow": {"guidance": 3.0}}
LORA = {"model": {"lora": {"rank": 2, "targets": ["to_q", "to_out.0"]}}}
CASES = {
    "2.1, nft, guided": (T21, "t2i", GUIDED),
    "2.1, grpo, LoRA": (T21, "t2i", merge(GRPO, LORA)),
    "2.1, guard, edits": (T21, "edit", merge(GRPO, {"policy": {"loss": "guard"}})),
    "1.x, nft, guided, LoRA": (T1, "t2i", merge(GUIDED, LORA, {"flow": {"rescale": True}})),
    "1.x, grpo, guidance in the objective": (T1, "t2i", merge(GRPO, GUIDED, {"guidance": {"scope": "both"}})),
    "1.x, guard, edits, small packs": (PLUS, "edit", merge(GRPO, {"policy": {"loss": "guard", "micro_tokens": 450}})),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_trains_and_its_export_runs_in_diffusers(folders, prompts, tmp_path, case):
    kind, task, parts = CASES[case]
    folder = folders(kind)
    qirl.train(values(folder, prompts[task], tmp_path / "run", RL, parts), [bright], quiet=True)
    rows = list(read(tmp_path / "run/metrics.jsonl"))
    assert len(rows) == 3 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
    before = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "run/model/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    sources = [np.asarray(Image.open(prompts[task].parent / "a.png"))] if task == "edit" else []
    ours = qirl.sample(tmp_path / "run", ["a red 7"], guidance=1.0, steps=3, seed=5, sources=sources, resolution=64)[0]
    shown = theirs(folder, kind, tmp_path / "run/model", sources, ours.shape[:2])
    assert np.abs(ours.astype(int) - shown).max() <= 1
    if "LoRA" in case:
        with_adapter = theirs(folder, kind, None, sources, ours.shape[:2], adapter=tmp_path / "run/adapter")
        assert np.abs(ours.astype(int) - with_adapter).max() <= 1


def theirs(folder, kind, transformer, sources, size, adapter=None) -> np.ndarray:
    """What diffusers' pipeline draws from the noise of `qirl.sample(..., seed=5)`."""
    from qirl.kernels.philox import INITIAL, normal, stream

    pipe = pipeline(folder, kind, transformer)
    if adapter:
        pipe.load_lora_weights(adapter)
    tokens = size[0] * size[1] // 256
    zeros, channels = torch.zeros(tokens, dtype=torch.int64), pipe.transformer.config.in_channels
    noise = normal(stream(5, [0], [0], 0), zeros, torch.arange(tokens), channels, 0, INITIAL)
    given = {"image": [Image.fromarray(s) for s in sources]} if sources else {}
    if kind == T21:
        given["output_resolution"] = 64
    if not (kind == T21 and sources):
        given |= {"height": size[0], "width": size[1]}
    image = pipe(prompt="a red 7", num_inference_steps=3, latents=noise[None], true_cfg_scale=1.0, **given).images[0]
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    return np.asarray(white).astype(int)


@pytest.mark.parametrize("kind, floor", [(T21, 0.05), (T1, 0.01)])
def test_reinforcement_learning_moves_a_reward(folders, prompts, tmp_path, kind, floor):
    """Brightness; what remains of the change is many times the spread between steps of the untrained model."""
    parts = {"run": {"steps": 20, "samples_every": 0}, "policy": {"kl": 0.0, "group": 4}}
    qirl.train(values(folders(kind), prompts["t2i"], tmp_path / "run", RL, parts), [bright], quiet=True)
    rewards = [row["reward/bright"] for row in read(tmp_path / "run/metrics.jsonl")]
    assert np.mean(rewards[-3:]) - np.mean(rewards[:3]) > floor


@pytest.mark.parametrize("kind", [T21, T1])
def test_supervised_fine_tuning_learns_pairs_of_text_and_image(folders, prompts, tmp_path, kind):
    parts = {"pretrain": {"batch": 4}, "run": {"steps": 25}, "optimizer": {"lr": 3e-3}}
    qirl.pretrain(values(folders(kind), prompts["t2i"], tmp_path / "run", parts), quiet=True)
    losses = [row["loss"] for row in read(tmp_path / "run/metrics.jsonl")]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("kind", [T21, T1])
def test_prompts_are_curated_calibrated_trained_on_evaluated_and_distilled(folders, prompts, tmp_path, kind):
    folder, file = folders(kind), prompts["t2i"]
    drawing = {"probe": {"group": 3, "prompts": 0}}
    curated = qirl.curate(
        values(folder, file, tmp_path / "c", drawing, {"curate": {"tau": 1e-6}}), [bright], quiet=True
    )
    kept = [json.loads(line) for line in curated.read_text().splitlines()]
    assert {row.get("height") for row in kept} == {None, 96} and [
        row["metadata"] for row in kept if "metadata" in row
    ] == [{"of": 1}]
    calibration = qirl.calibrate(
        values(folder, curated, tmp_path / "k", drawing, {"world": {"task": "t2i"}}),
        [bright], quiet=True,
    )  # fmt: skip
    use = {"world": {"task": "t2i"}, "advantage": {"calibration": str(calibration), "weights": {}}}
    qirl.train(values(folder, curated, tmp_path / "r", RL, use), [bright], quiet=True)
    exam = {
        "evaluation": {"prompts": 3, "group": 2, "steps": 3, "guidance": [1.0, 2.0]},
        "model": {"path": str(tmp_path / "r")},
    }
    found = qirl.evaluate(values(folder, file, tmp_path / "e", exam), [bright], quiet=True)
    assert set(found) == {"1", "2"} and 0 < found["1"]["rewards"]["bright"] < 1 and "judge_accuracy" in found["1"]
    teachers = {"a": {"path": str(tmp_path / "r"), "guidance": 2.0}, "b": {"path": str(folder)}}
    distilled = values(folder, file, tmp_path / "d", {"distill": {"prompts": 2, "group": 2, "teachers": teachers}})
    del distilled["world"]["task"]
    qirl.distill(distilled, quiet=True)
    assert len(list(read(tmp_path / "d/metrics.jsonl"))) == 3 and (tmp_path / "d/model/config.json").exists()


COMMAND = [sys.executable, "-W", "ignore", "-m", "qirl"]


def start(command: str, config: dict, folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [*COMMAND, command, str(folder / "c.yaml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("kind, parts", [(T21, merge(GRPO, LORA)), (T1, GUIDED)], ids=["2.1", "1.x"])
def test_a_killed_run_goes_on_to_the_same_weights_by_the_real_command(folders, prompts, tmp_path, kind, parts):
    reward = {"rewards": {"bright": {"kind": "python", "target": "bright:bright"}}, "run": {"steps": 6}}
    bits = []
    for name in ("whole", "killed"):
        out = tmp_path / name / "out"
        config = values(folders(kind), prompts["t2i"], out, RL, parts, reward)
        process = start("train", config, tmp_path / name)
        if name == "killed":
            deadline = time.monotonic() + 120
            while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (out / "model").exists()
            process = start("train", config, tmp_path / name)
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
        bits.append((out / "model/diffusion_pytorch_model.safetensors").read_bytes())
    assert bits[0] == bits[1]


def test_the_dry_run_and_sample_commands_know_pipelines(folders, prompts, tmp_path):
    config = values(
        folders(T1),
        prompts["t2i"],
        tmp_path / "run",
        RL,
        {"rewards": {"b": {"kind": "python", "target": "bright:bright"}}},
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [*COMMAND, "train", str(tmp_path / "c.yaml"), "--dry-run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "memory per rank, activations" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()
    picture = tmp_path / "x.png"
    done = subprocess.run(
        [*COMMAND, "sample", "a red 7", "a dog", "--model", str(folders(T21)), "--out", str(picture), "--steps", "2"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and Image.open(picture).size == (2 * 1028, 1028), done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"world": {"prompts": None}}, "world.prompts is missing: name a file"),
        ({"flow": {"max_shift": 1.2}}, "flow.max_shift=1.2, the scheduler of .* has max_shift=0.9"),
        ({"policy": {"micro_tokens": 15}}, "policy.micro_tokens=15 tokens is smaller than one sample of"),
        ({"model": {"path": "nobody/nothing"}}, "nobody/nothing holds no model .*or hf://nobody/nothing for the hub's"),
        (
            {"model": {"lora": {"rank": 2, "targets": ["gate_layer"]}}},
            "no linear module in the blocks is called 'gate_layer'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(folders, prompts, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        qirl.train(values(folders(T1), prompts["t2i"], tmp_path / "run", RL, change), [bright], quiet=True)
    assert not (tmp_path / "run").exists()


def test_data_without_a_reward_is_refused(folders, prompts, tmp_path):
    with pytest.raises(UserError, match="no reward is named: add some under `rewards`"):
        qirl.train(values(folders(T1), prompts["t2i"], tmp_path / "run", RL), quiet=True)


def test_a_run_goes_on_after_its_pipeline_moved_where_it_is_named(folders, prompts, tmp_path):
    moved = Path(shutil.copytree(folders(T21), tmp_path / "pipeline"))
    qirl.train(values(moved, prompts["t2i"], tmp_path / "run", RL, {"run": {"steps": 1}}), [bright], quiet=True)
    moved.rename(tmp_path / "elsewhere")
    exam = {"evaluation": {"prompts": 2, "group": 2, "steps": 2, "guidance": [1.0]}}
    own = values(tmp_path / "run", prompts["t2i"], tmp_path / "e", exam)
    with pytest.raises(UserError, match="pipeline is no pipeline .*set model.pipeline to where it lies now"):
        qirl.evaluate(own, [bright], quiet=True)
    own["model"]["pipeline"] = str(tmp_path / "elsewhere")
    assert qirl.evaluate(own, [bright], quiet=True)["1"]["rewards"]["bright"] > 0


class Bright:
    """A judge that scores by brightness: what `openai_server.Server` answers."""

    def write(self, body, images):
        return "it is bright</think>", True

    def tokens(self, body, images):
        from math import log

        share = float(images[-1].mean() / 255)
        return {"5": log(share + 1e-9), "1": log(1 - share + 1e-9)}


@pytest.mark.parametrize("kind", [T21, PLUS])
def test_an_edit_pipeline_trains_with_a_judge_over_http(folders, prompts, tmp_path, kind):
    """The judge is shown sources and image; its expectation over the five digits is the reward."""
    with Server(Bright()) as server:
        judge = {
            "kind": "judge",
            "servers": [server.address],
            "model": MODEL,
            "rubric": "edit_instruction",
            "chains": 2,
        }
        config = values(
            folders(kind), prompts["edit"], tmp_path / "run", RL, {"rewards": {"bright": judge}, "run": {"steps": 2}}
        )
        qirl.train(config, quiet=True)
        shown = [sum(part["type"] == "image_url" for part in _parts(body)) for body in server.requests]
    assert set(shown) == {2, 3}  # one or two sources, then the image
    rows = list(read(tmp_path / "run/scores.jsonl"))
    assert len(rows) == 2 * 4 * 3 and all(0 < row["scores"]["bright"] < 1 for row in rows)
    notes = [json.loads(p.read_text()) for p in (tmp_path / "run/checkpoints").rglob("extra.json")]
    assert notes and all(own["notes"]["noise"]["bright"][1] > 0 for own in notes)


def _parts(body):
    return [part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]]


def test_a_name_of_the_hub_is_found_in_the_local_cache_and_else_told(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from qirl.models.folders import find_model, local

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--someone--tiny"
    shutil.copytree(folders(T21), repository / "snapshots/abc123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    assert local("hf://someone/tiny") == repository / "snapshots/abc123"
    assert find_model("hf://someone/tiny@main") == repository / "snapshots/abc123/transformer"
    (repository / "refs/v2").write_text("def456")
    shutil.copytree(folders(T1), repository / "snapshots/def456")
    model = configuration.load("train", None, ["model.path=hf://someone/tiny", "model.revision=v2"]).model
    assert family_of(World(name="prompts"), model).folder == repository / "snapshots/def456"
    for missing in ("hf://someone/other", "hf://someone/tiny@v3"):
        with pytest.raises(UserError, match=f"{missing} is not in the local cache and cannot be fetched"):
            local(missing)
