"""What a user can get wrong, through the command line: one line with cause and fix, exit code 2, nothing touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import contents, qirl, refused
from safetensors.torch import load_file, save_file
from tiny_runs import BASE, PRETRAIN, TEXT_DIM, merge

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def commands(model, tmp_path):
    """The arguments of every command that reads a model; all write below `tmp_path`."""
    train, evaluate = tmp_path / "train.yaml", tmp_path / "evaluate.yaml"
    train.write_text(yaml.safe_dump(merge(BASE, {"model": {"path": str(model)}})))
    evaluate.write_text(yaml.safe_dump({"model": {"path": str(model)}, "world": {"text_dim": TEXT_DIM}}))
    return {
        "train": ["train", train, "--out", tmp_path / "out"],
        "evaluate": ["evaluate", evaluate, "--out", tmp_path / "out"],
        "sample": ["sample", "--model", model, "--out", tmp_path / "out.png", "a red 7"],
        "export": ["export", model, "--out", tmp_path / "out"],
        "dry run": ["train", train, "--dry-run"],
    }


READERS = ("train", "evaluate", "sample", "export", "dry run")


def pretrain_yaml(path: Path, *parts: dict) -> Path:
    path.write_text(yaml.safe_dump(merge(PRETRAIN, {"model": {"architecture": {"rope_axes": [4, 6, 6]}}}, *parts)))
    return path


def test_the_line_is_all_that_a_process_prints(tmp_path):
    command = [sys.executable, "-m", "qirl", "train", "digits/t2i", "policy.gruop=4", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qirl: unknown option 'policy.gruop'; did you mean 'policy.group'?\n"


@pytest.mark.parametrize("command", READERS)
def test_a_missing_model(commands, model, tmp_path, command):
    shutil.rmtree(model)
    assert f"{model} holds no model" in refused(tmp_path, *commands[command])


@pytest.mark.parametrize("command", READERS)
def test_missing_weights(commands, model, tmp_path, command):
    (model / WEIGHTS).unlink()
    assert f"{WEIGHTS} does not exist; copy the model folder again" in refused(tmp_path, *commands[command])


@pytest.mark.parametrize("command", READERS)
def test_truncated_weights(commands, model, tmp_path, command):
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 10)
    assert f"{WEIGHTS} is truncated or damaged" in refused(tmp_path, *commands[command])


def shard(model: Path) -> None:
    state = load_file(model / WEIGHTS)
    names = sorted(state)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, own in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({n: state[n] for n in own}, model / file, metadata={"format": "pt"})
    weight_map = {n: files[i % 2] for i, n in enumerate(names)}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / WEIGHTS).unlink()


def test_a_missing_shard(commands, model, tmp_path):
    shard(model)
    assert qirl(*commands["dry run"])[0] == 0
    (model / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    for command in READERS:
        assert "model-00002-of-00002.safetensors does not exist" in refused(tmp_path, *commands[command])


@pytest.mark.parametrize("text", ['{"weight_m', "[]", '{"weight_map": 3}'])
def test_a_broken_index_of_shards(commands, model, tmp_path, text):
    (model / f"{WEIGHTS}.index.json").write_text(text)
    assert "index.json is truncated or no index of shards" in refused(tmp_path, *commands["train"])


@pytest.mark.parametrize("text", ['{"num_lay', "[]", '{"num_layers": "two"}', '{"axes_dims_rope": 3}', '{"layers": 2}'])
def test_a_broken_model_config(commands, model, tmp_path, text):
    (model / "config.json").write_text(text)
    for command in READERS:
        refused(tmp_path, *commands[command])


def test_broken_facts_of_a_model(commands, model, tmp_path):
    (model / "qirl.json").write_text('{"world": "dig')
    assert "qirl.json is truncated" in refused(tmp_path, *commands["train"])


@pytest.mark.parametrize("command", READERS)
def test_weights_of_another_shape(commands, model, tmp_path, command):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"mlp_ratio": 3}))
    line = refused(tmp_path, *commands[command])
    assert "has shape (" in line and "config.json asks for (" in line and "take both from one model" in line


@pytest.mark.parametrize("command", READERS)
def test_weights_of_another_depth(commands, model, tmp_path, command):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    assert "lacks" in refused(tmp_path, *commands[command])


def test_a_model_of_another_world(commands, tmp_path):
    line = refused(tmp_path, *commands["train"], "world.text_dim=64")
    assert f"set world.text_dim={TEXT_DIM}" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: many}", "run.steps=\"many\": should be a whole number; the default is 100"),
        ("run: {steps: true}", "run.steps=true: should be a whole number"),
        ("run: {seed: null}", "run.seed=null: should be a whole number; the default is 0"),
        ("optimizer: {lr: fast}", "optimizer.lr=\"fast\": should be a number"),
        ("flow: {rescale: 1}", "flow.rescale=1: should be true or false"),
        ("optimizer: {betas: 0.9}", "optimizer.betas=0.9: should be a list"),
        ("optimizer: [lr, 1]", "'optimizer' is a section"),
        ("- run", "holds a list; a config is a mapping"),
        ("run: {steps: 3", "is not valid YAML"),
        ("run: {steps: 3}\nrun: {seed: 1}", "'run' is given twice"),
    ],
)  # fmt: skip
def test_yaml_of_the_wrong_type(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert words in refused(tmp_path, "pretrain", tmp_path / "c.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize("command", ["train", "evaluate", "dry run"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n \n", "holds no prompt; write one a line"),
        ("a red 7\na red cat\n", "the word 'cat' is unknown"),
        ("in red", "has no digit"),
        (None, "does not exist; check the path"),
    ],
)
def test_prompt_files(commands, tmp_path, command, text, words):
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    assert words in refused(tmp_path, *commands[command], f"world.prompts={tmp_path}/prompts.txt")


def test_a_prompt_to_sample_without_a_known_digit(commands, tmp_path):
    assert "has no digit" in refused(tmp_path, *commands["sample"][:-1], "a red")
    assert "the word 'dog' is unknown" in refused(tmp_path, *commands["sample"][:-1], "a dog")
    assert "has no digit" in refused(tmp_path, *commands["sample"][:-1], "")


def test_a_group_of_one(commands, tmp_path):
    line = refused(tmp_path, *commands["train"], "policy.group=1")
    assert "policy.group=1: a group of one sample has no advantage; use 2 or more" in line


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_guidance_without_an_unconditional_embedding(commands, model, tmp_path, command):
    facts = json.loads((model / "qirl.json").read_text())
    (model / "qirl.json").write_text(json.dumps(facts | {"unconditional": False}))
    guided = {"train": ["flow.guidance=4"], "evaluate": ["evaluation.guidance=[1, 4]"], "sample": ["--guidance", 4]}
    assert "needs an unconditional embedding" in refused(tmp_path, *commands[command], *guided[command])


@pytest.mark.parametrize(
    ("command", "option", "need"),
    [
        ("train", "policy.micro_tokens", 16),
        ("train", "flow.rollout_tokens", 16),
        ("evaluate", "evaluation.batch_tokens", 32),
        ("pretrain", "pretrain.micro_tokens", 20),
    ],
)
def test_a_token_budget_smaller_than_one_sample(commands, tmp_path, command, option, need):
    config = pretrain_yaml(tmp_path / "pretrain.yaml")
    commands |= {"pretrain": ["pretrain", config, "--out", tmp_path / "out"]}
    line = refused(tmp_path, *commands[command], f"{option}={need - 1}")
    assert f"{option}={need - 1} tokens is smaller than one sample of {need} tokens; set it to {need} or more" in line


def test_an_unwritable_out_folder(commands, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    below = tmp_path / "file" / "out"
    for arguments in (
        [*commands["train"], "--out", below],
        [*commands["evaluate"], "--out", below],
        [*commands["sample"], "--out", below / "a.png"],
        [*commands["export"], "--out", below],
        ["pretrain", pretrain_yaml(tmp_path / "pretrain.yaml"), "--out", below],
        ["pretrain", tmp_path / "pretrain.yaml", "--out", tmp_path / "file"],
        ["quickstart", "--out", below],
        ["report", tmp_path / "run", "--out", below / "report.html"],
    ):
        line = refused(tmp_path, *arguments)
        assert "cannot write" in line and "choose another" in line, line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("finished")
    config = pretrain_yaml(folder / "pretrain.yaml", {"run": {"steps": 2, "checkpoint_every": 1, "threads": 0}})
    arguments = ["pretrain", config, "--out", folder / "run"]
    code, out, err = qirl(*arguments)
    assert code == 0 and "model: " in out, (code, out, err)
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """The command that continues a copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return ["pretrain", finished / "pretrain.yaml", "--out", tmp_path / "run"]


def test_a_run_folder_of_another_config(again, tmp_path):
    line = refused(tmp_path, *again, "optimizer.lr=0.5", "run.seed=9")
    assert "holds a run of another config: run.seed (3 there, 9 now), optimizer.lr (0.001 there, 0.5 now)" in line


def test_a_folder_that_holds_something_else(again, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert "so it is no run folder; choose another" in refused(tmp_path, *again, "--out", tmp_path / "other")


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "no manifest", "broken config"])
def test_damaged_files_of_a_run(again, tmp_path, damage):
    newest = tmp_path / "run/checkpoints/step_000002"
    data = next(newest.glob("*.distcp"))
    if damage == "missing":
        data.unlink()
    elif damage == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "altered":
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (tmp_path / "run/config.yaml").write_text("run: {out")
    line = refused(tmp_path, *again)
    assert "delete" in line if damage == "broken config" else "delete that folder to resume from step_000001" in line


def test_a_finished_run_is_left_as_it_is(again, tmp_path):
    kept = {k: v for k, v in contents(tmp_path).items() if "samples" not in k}
    assert qirl(*again)[0] == 0
    assert {k: v for k, v in contents(tmp_path).items() if "samples" not in k} == kept


def test_export_does_not_write_over_a_folder(again, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = refused(tmp_path, "export", tmp_path / "run", "--out", tmp_path / "mine")
    assert "exists already; name a new folder" in line


def test_a_run_that_is_not_finished_has_no_model_to_export(again, tmp_path):
    shutil.rmtree(tmp_path / "run/model")
    assert "no model/ of a finished run" in refused(tmp_path, "export", tmp_path / "run", "--out", tmp_path / "new")


def test_reports_of_folders_that_are_no_run(again, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused(tmp_path, "report", tmp_path / "empty")
    (tmp_path / "run" / "evaluation.json").write_text('{"guidance')
    assert "evaluation.json is truncated" in refused(tmp_path, "report", tmp_path / "run")


def test_ranks_that_do_not_divide_the_prompts(commands, tmp_path):
    """Two ranks of torchrun: the line is printed once, and no folder is made."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qirl"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, commands["train"]), "policy.prompts=3"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.count("policy.prompts / policy.minibatches = 3 is not a multiple of the 2 ranks") == 1
    assert "exitcode  : 2" in done.stderr


def test_adapters_on_modules_that_do_not_exist(commands, tmp_path):
    line = refused(tmp_path, *commands["train"], "model.lora.rank=2", "model.lora.targets=[to_qq]")
    assert "to_qq" in line
