"""What is not finite is never trained on, scored or shown as if it were: weights that are read, latents that are drawn."""

import json
import shutil

import distill_runs
import pytest
import torch
import yaml
from cli_runs import qirl, refused
from safetensors.torch import load_file, save_file
from tiny_runs import BASE, PRETRAIN, TEXT_DIM, merge, save_random_model

from qirl.errors import UserError
from qirl.models.weights import read_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"


def damage(path, *values: float) -> str:
    """Puts the values into one tensor of a file; its name."""
    state = load_file(path)
    name = max(state, key=lambda n: state[n].numel())
    state[name].view(-1)[: len(values)] = torch.tensor(values)
    save_file(state, path, metadata={"format": "pt"})
    return name


@pytest.fixture
def run(tmp_path):
    """run(command, values, *more): the arguments of a command with a config of these values."""

    def arguments(command: str, values: dict, *more) -> list:
        path = tmp_path / f"{command}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        return [command, path, "--out", tmp_path / "out", *more]

    return arguments


@pytest.mark.parametrize("command", ["train", "pretrain", "evaluate", "curate", "calibrate", "sample", "distill"])
def test_weights_that_are_not_finite_are_refused_with_their_name_and_number(tmp_path, tiny_model, run, command):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    name = damage(model / WEIGHTS, torch.nan, torch.inf, -torch.inf)
    world = {"model": {"path": str(model)}, "world": {"text_dim": TEXT_DIM}}
    values = {"train": merge(BASE, world), "pretrain": merge(PRETRAIN, world)}.get(command, world)
    if command == "pretrain":
        del values["model"]["architecture"]
    if command == "distill":
        values = distill_runs.values(tmp_path / "out", model, {"t2i": tiny_model})
    arguments = run(command, values)
    if command == "sample":
        arguments = ["sample", "--model", model, "--out", tmp_path / "out.png", "a red 7"]
    line = refused(tmp_path, *arguments)
    assert f"model/{WEIGHTS}: '{name}' holds 3 of " in line
    assert "values that are NaN or infinite" in line


def test_a_teacher_that_is_not_finite_is_refused(tmp_path, tiny_model, run):
    teacher = distill_runs.save_teacher(tiny_model, tmp_path / "teacher", 1)
    name = damage(teacher / WEIGHTS, torch.nan)
    code, _, err = qirl(*run("distill", distill_runs.values(tmp_path / "out", tiny_model, {"t2i": teacher})))
    assert code == 2 and f"teacher/{WEIGHTS}: '{name}' holds 1 of " in err, err
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_an_adapter_that_is_not_finite_is_refused(tmp_path, tiny_model, run):
    lora = {"model": {"path": str(tiny_model), "lora": {"rank": 2}}, "run": {"steps": 1}}
    assert qirl(*run("train", merge(BASE, lora), "--out", tmp_path / "lora"))[0] == 0
    name = damage(tmp_path / "lora/adapter/adapter_model.safetensors", torch.inf)
    stem = name.removeprefix("base_model.model.")
    teachers = {"t2i": tmp_path / "lora/adapter"}
    line = refused(tmp_path, *run("distill", distill_runs.values(tmp_path / "out", tiny_model, teachers)))
    assert f"'{stem}' holds 1 of " in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_values_of_every_floating_point_type_are_checked(tmp_path, dtype):
    folder = save_random_model(tmp_path / "model")
    state = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert {n for n, _ in read_weights(folder)} == state.keys()
    state["proj_out.weight"][0, 0] = torch.nan
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'proj_out.weight' holds 1 of 512 values that are NaN or infinite"):
        list(read_weights(folder))


def test_whole_numbers_are_no_weights(tmp_path):
    folder = save_random_model(tmp_path / "model")
    state = load_file(folder / WEIGHTS)
    save_file(state | {"proj_out.weight": state["proj_out.weight"].to(torch.int8)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="'proj_out.weight' is int8, not floating point"):
        list(read_weights(folder))
