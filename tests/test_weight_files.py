"""Model folders as diffusers writes them, variants and shards included, and saves that are cut off."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from cli_runs import qirl, refused
from safetensors.torch import load_file, save_file
from tiny_runs import BASE, architecture, merge

from qirl.curation.probe import policy_hash
from qirl.errors import UserError
from qirl.models.qwen_image_21 import QwenImage21
from qirl.models.weight_files import NAME, weight_files
from qirl.models.weights import load_model, save_model

SHARD = "20KB"
FP16 = [f"{NAME}.fp16.safetensors"]


@pytest.fixture(scope="module")
def theirs(tiny_model):
    """The tiny model as diffusers holds it."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.QwenImage21Transformer2DModel.from_pretrained(tiny_model)


@pytest.fixture
def train(tmp_path):
    """The arguments that train from tmp_path/model."""
    config = tmp_path / "train.yaml"
    values = {"model": {"path": str(tmp_path / "model")}, "run": {"steps": 1}}
    config.write_text(yaml.safe_dump(merge(BASE, values)))
    return ["train", config, "--out", tmp_path / "out"]


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("size", ["10GB", SHARD])
def test_a_folder_of_one_variant_is_read_without_being_asked(theirs, tiny_model, train, tmp_path, size):
    theirs.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=size)
    found = weight_files(tmp_path / "model")
    assert len(found) > 2 if size == SHARD else [p.name for p in found] == FP16
    assert found == weight_files(tmp_path / "model", "fp16")
    assert same(load_model(tmp_path / "model").state_dict(), load_model(tiny_model).state_dict())
    for extra in ([], ["model.variant=fp16", "--out", tmp_path / "asked"]):
        code, _, err = qirl(*train, *extra, "world.text_dim=8")
        assert code == 0, err


def test_an_index_with_the_variant_before_the_extension_is_found(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size=SHARD)
    found = weight_files(tmp_path)
    os.rename(tmp_path / f"{NAME}.safetensors.index.fp16.json", tmp_path / f"{NAME}.fp16.safetensors.index.json")
    assert weight_files(tmp_path) == weight_files(tmp_path, "fp16") == found


def test_the_variant_that_is_asked_for_is_the_one_that_is_read(theirs, tiny_model, train, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    plain = load_model(model).state_dict()
    for variant, factor in (("fp16", 2), ("ema", 3)):
        state = {k: v * factor for k, v in load_file(model / f"{NAME}.safetensors").items()}
        save_file(state, model / f"{NAME}.{variant}.safetensors", metadata={"format": "pt"})
    assert same(load_model(model).state_dict(), plain)
    assert same(load_model(model, variant="ema").state_dict(), {k: v * 3 for k, v in plain.items()})
    assert policy_hash(model) == policy_hash(tiny_model) != policy_hash(model, "fp16")
    line = refused(tmp_path, *train, "model.variant=bf16")
    assert "has no weights of model.variant=bf16, it has no variant and ema and fp16" in line
    (model / f"{NAME}.safetensors").unlink()
    assert "several variants, ema and fp16; choose one with model.variant" in refused(tmp_path, *train)
    code, _, err = qirl(*train, "model.variant=ema")
    assert code == 0, err


def test_the_weights_of_every_command_are_those_of_the_variant(theirs, train, tmp_path):
    """A damaged variant is refused where it is asked for, and only there."""
    theirs.save_pretrained(tmp_path / "model")
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / FP16[0], metadata={"format": "pt"})
    evaluate = tmp_path / "evaluate.yaml"
    evaluate.write_text(yaml.safe_dump({"model": {"path": str(tmp_path / "model")}, "world": {"text_dim": 8}}))
    for command in (train, [*train[:2], "--dry-run"], ["evaluate", evaluate, "--out", tmp_path / "out"]):
        assert "fp16.safetensors holds 'x'" in refused(tmp_path, *command, "model.variant=fp16")
    assert qirl("export", tmp_path / "model", "--out", tmp_path / "exported")[0] == 0
    assert names(tmp_path / "exported") == ["config.json", f"{NAME}.safetensors"]


def test_pickles_are_not_read_and_the_line_says_how_to_convert_them(theirs, tiny_model, train, tmp_path, monkeypatch):
    import diffusers

    theirs.save_pretrained(tmp_path / "model", safe_serialization=False)
    line = refused(tmp_path, *train)
    assert f"as pickles only ({NAME}.bin), which are never read" in line
    monkeypatch.chdir(tmp_path)
    eval(line.strip().split("convert it: ")[1], {"diffusers": diffusers})  # the line itself works
    assert same(load_model(tmp_path / "NEW_FOLDER").state_dict(), load_model(tiny_model).state_dict())


@pytest.mark.parametrize("value", [3, None, ["a"], "", "../model/a.safetensors", "weights.bin"])
def test_an_index_that_names_no_file_is_refused(theirs, train, tmp_path, value):
    theirs.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    index = tmp_path / "model" / f"{NAME}.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"]["proj_out.weight"] = value
    index.write_text(json.dumps(known))
    for command in (train, [*train[:2], "--dry-run"]):
        line = refused(tmp_path, *command)
        assert f"weight_map gives 'proj_out.weight' the file {json.dumps(value)}, which is no name" in line


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"weight_map": null}', b"3", b"null", b"[" * 5000])
@pytest.mark.parametrize("name", ["config.json", f"{NAME}.safetensors.index.json"])
def test_damaged_json_is_refused(theirs, train, tmp_path, name, content):
    theirs.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    (tmp_path / "model" / name).write_bytes(content)
    assert str(tmp_path / "model") in refused(tmp_path, *train)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("config.json", {"num_layers": None}, "num_layers=None must be a whole number"),
        ("config.json", {"eps": "small"}, "eps='small' must be a number in (0, 1)"),
        ("config.json", {"eps": 0}, "eps=0 must be a number in (0, 1)"),
        ("config.json", {"causal_condition": "no"}, "causal_condition='no' must be true or false"),
        ("config.json", {"axes_dims_rope": [-4, 10, 10]}, "three even numbers of at least 0 that sum to"),
        ("config.json", {"axes_dims_rope": [4, 6, "6"]}, "three even numbers"),
        ("qirl.json", {"text_dim": "8"}, "text_dim='8' must be a whole number"),
        ("qirl.json", {"unconditional": "yes"}, "unconditional='yes' must be true or false"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tiny_model, train, tmp_path, name, values, words):
    path = shutil.copytree(tiny_model, tmp_path / "model") / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    line = refused(tmp_path, *train)
    assert words in line and str(path) in line


def test_a_tensor_in_two_shards_is_refused(theirs, train, tmp_path):
    theirs.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    first, second = weight_files(tmp_path / "model")[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second, metadata={"format": "pt"})
    assert f"{second.name} holds '{name}', which another shard holds too" in refused(tmp_path, *train)


# saving


def states() -> tuple:
    """A config and two states of it, of ones and of twos."""
    model = QwenImage21(architecture())
    return model.config, *({k: torch.full_like(v, x) for k, v in model.state_dict().items()} for x in (1.0, 2.0))


@pytest.mark.parametrize("before", ["5GB", "50KB", SHARD])
@pytest.mark.parametrize("after", ["5GB", "50KB", SHARD])
def test_a_second_save_replaces_the_first_whatever_its_shards(tmp_path, before, after):
    config, old, new = states()
    save_model(config, old, tmp_path / "model", before)
    shutil.copyfile(weight_files(tmp_path / "model")[0], tmp_path / "model" / FP16[0])
    (tmp_path / "model/qirl.json").write_text("{}")
    save_model(config, new, tmp_path / "model", after)
    assert same(load_model(tmp_path / "model").state_dict(), new)
    (tmp_path / "model/qirl.json").unlink()
    save_model(config, new, tmp_path / "fresh", after)
    assert names(tmp_path / "model") == names(tmp_path / "fresh")
    assert policy_hash(tmp_path / "model") == policy_hash(tmp_path / "fresh")


def save_cut_off(after: int, *arguments) -> bool:
    """Saves in a process that ends, without clean-up, at the file operation of that number; whether it got there."""
    if (child := os.fork()) == 0:
        left = after

        def count(event: str, _) -> None:
            nonlocal left
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"):
                left -= 1
                if left < 0:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            save_model(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize(("before", "after"), [("5GB", SHARD), (SHARD, "5GB"), (SHARD, SHARD), ("50KB", SHARD)])
def test_a_save_that_is_cut_off_anywhere_leaves_no_mixture(tmp_path, before, after):
    config, old, new = states()
    save_model(config, old, tmp_path / "old", before)
    save_model(config, new, tmp_path / "other", after)  # imports what a save needs before processes fork
    found = []
    for operation in range(200):
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"model{operation}")
        reached = save_cut_off(operation, config, new, folder, after)
        try:
            state = load_model(folder).state_dict()
            found.append("old" if same(state, old) else "new" if same(state, new) else "mixed")
        except UserError as error:
            assert "does not exist" in str(error)
            found.append("none")
        save_model(config, new, folder, after)  # the next save mends it
        assert same(load_model(folder).state_dict(), new) and names(folder) == names(tmp_path / "other")
        if not reached:
            break
    order = [name for i, name in enumerate(found) if i == 0 or found[i - 1] != name]
    assert order == ["old", "none", "new"] and not reached
