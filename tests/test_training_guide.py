"""The commands of docs/training.md, in their order, on a small pipeline; and the recipes they name."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import save_pipeline

from qirl import config as configuration
from qirl.paths import configs
from qirl.plan import plan

TESTS = Path(__file__).parent
GUIDE = (TESTS.parent / "docs/training.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^qirl .*$", GUIDE, re.M)]
SMALL = {  # of a run that takes seconds
    "train": ["policy.prompts=2", "policy.group=2", "policy.timesteps.count=1", "flow.steps=2", "policy.kl=0.01"],
    "curate": ["probe.group=2", "flow.steps=2", "curate.tau=0.000001"],
    "distill": ["distill.prompts=2", "distill.nodes=1", "flow.steps=2"],
    "pretrain": ["pretrain.batch=2"],
}
RECIPES = sorted(f"{p.parent.name}/{p.stem}" for p in configs().glob("qwen_image*/*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    save_pipeline(folder / "pipeline", "QwenImage21Pipeline")
    (folder / "bright.py").write_text((TESTS / "bright.py").read_text())
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    drawn = [{"text": "a red 7", "image": "b.png"}, {"text": "a dog", "category": "animal", "image": "b.png"}]
    edits = [{"text": "make it red", "sources": ["a.png"]}, {"text": "add a dog", "sources": ["a.png"]}]
    for name, lines in (("prompts", drawn), ("pairs", drawn), ("edits", edits), ("both", drawn + edits)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_command_of_the_guide_runs(folder):
    environment = os.environ | {"QIRL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    assert [c[1] for c in COMMANDS] == ["train", "train", "sample", "curate", "train", "distill", "pretrain"]
    for _, name, *rest in COMMANDS:
        small = []
        if name != "sample":
            small = ["world.resolution=64", "model.dtype=float32", *SMALL[name]]
            small += ["run.report=false", "run.steps=1"] if name != "curate" else []
            small += ["run.samples_every=0"] if name in ("train", "distill") else []
        command = [sys.executable, "-m", "qirl", name, *rest, *small]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    made = (
        "runs/lora/adapter/pytorch_lora_weights.safetensors",
        "runs/curate/curated.jsonl",
        "runs/student/model/config.json",
    )
    assert all((folder / name).exists() for name in (*made, "sample.png", "runs/sft/model/config.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_and_plans_on_a_small_pipeline(folder, name, tmp_path):
    family, task = name.split("/")
    kind = (
        "QwenImage21Pipeline" if family.endswith("21") else f"QwenImage{'EditPlus' if task == 'edit' else ''}Pipeline"
    )
    pipeline = folder / "pipeline" if family.endswith("21") else save_pipeline(tmp_path / "pipeline", kind)
    file = folder / ("edits.jsonl" if task == "edit" else "prompts.jsonl")
    small = [f"model.path={pipeline}", f"world.prompts={file}", "world.resolution=64"]
    command = {"distill": "distill", "curate": "curate", "sft": "pretrain"}.get(task, "train")
    small += [f"distill.teachers.t2i.path={pipeline}"] if task == "distill" else []
    found = plan(configuration.load(command, configs() / f"{name}.yaml", small))
    if command == "curate":
        assert found["flops"]["probe"]["total"] > 0
        return
    assert command != "train" or f"| {name} |" in GUIDE
    assert found["memory"]["activations"] > 0 and (
        found["parameters"]["trainable"] == found["parameters"]["total"]
    ) == ("full" in task)


@pytest.mark.parametrize("name", sorted(p.stem for p in (configs() / "presets").glob("*.yaml")))
def test_the_settings_of_other_trainers_are_whole_and_plan(folder, name, tmp_path):
    pipeline = save_pipeline(tmp_path / "pipeline", "QwenImagePipeline")
    small = [f"model.path={pipeline}", f"world.prompts={folder / 'prompts.jsonl'}", "world.resolution=64"]
    found = plan(configuration.load("train", configs() / f"presets/{name}.yaml", small), 2)
    assert found["tokens"]["update"]["pairs"] > 0 and f"presets/{name}" in GUIDE
