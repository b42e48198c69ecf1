"""What is not finite is never trained on or scored: weights that are read, latents that are drawn."""

import json
import shutil

import distill_runs
import pytest
import torch
import yaml
from cli_runs import qirl, refused
from safetensors.torch import load_file, save_file
from tiny_runs import BASE, GUARD, GUIDED, PRETRAIN, SDE, TEXT_DIM, colours, merge, save_random_model

from qirl.config_sections import Scoring
from qirl.errors import UserError
from qirl.flow.rollout import Kept, not_finite, without_failed
from qirl.models.weights import read_weights
from qirl.policy import sampling
from qirl.policy import trainer as training
from qirl.rewards.protocol import Sample
from qirl.rewards.scorer import Scorer

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
    teachers = {"t2i": tmp_path / "lora/adapter"}
    line = refused(tmp_path, *run("distill", distill_runs.values(tmp_path / "out", tiny_model, teachers)))
    assert f"'{name}' holds 1 of " in line


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


# latents

HUGE = 3e38  # finite, so that the weights are read; the forward pass overflows


def overflowing(tiny_model, folder):
    """A copy of the model whose weights are finite and whose latents are not."""
    model = shutil.copytree(tiny_model, folder)
    damage(model / WEIGHTS, *[HUGE] * 32)
    return model


@pytest.fixture
def lossy(monkeypatch):
    """The second sample of every rollout ends in values that are not finite, as an overflow leaves them."""
    real = sampling.rollout

    def rollout(*arguments):
        out = real(*arguments)
        start, end = out.lengths[0], sum(out.lengths[:2])
        out.x0[start:end] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).repeat(4)
        for (sample, _), kept in out.kept.items():
            if sample == 1:
                kept.x_next[-1], kept.v[0] = torch.nan, torch.inf
        return out

    monkeypatch.setattr(sampling, "rollout", rollout)


@pytest.mark.filterwarnings("ignore:.*latents are not finite")
@pytest.mark.parametrize(
    "parts",
    [{}, SDE, GUARD, merge(SDE, GUIDED), {"policy": {"kl": 0.1, "nft": {"old_decay": 0.5}}}, {"policy": {"refill": 1}},
     {"advantage": {"shuffle": True}}],
)  # fmt: skip
def test_a_lost_sample_has_failed_and_the_others_train(opened, lossy, parts):
    seen = []

    def watching(samples):
        seen.extend(s.id for s in samples)
        return colours(samples)

    trainer = opened(parts, {"advantage": {"max_failed": 0.1}}, reward=watching)
    before = {k: v.detach().clone() for k, v in trainer.engine.weights.current.items()}
    record = training.train_step(trainer, 0)
    assert record["scoring/not_finite"] == 1 and sorted(seen)[:11] == [0, *range(2, 12)]
    rows = [json.loads(line) for line in trainer.engine.folder.scores.read_text().splitlines()]
    assert [row["scores"] for row in rows if row["id"] == 1] == [{"edge": None, "red": None}]
    assert all(v is not None for row in rows if row["id"] != 1 for v in row["scores"].values())
    assert record["skipped"] == 0 and record["dropped_samples"] >= 1 and record["grad_norm"] > 0
    assert any(not torch.equal(v, before[k]) for k, v in trainer.engine.weights.current.items())
    assert all(v.isfinite().all() for v in trainer.engine.weights.current.values())


@pytest.mark.filterwarnings("ignore:.*latents are not finite")
def test_more_lost_samples_than_max_failed_end_the_run(opened, lossy):
    trainer = opened({"advantage": {"max_failed": 0.05}})
    with pytest.raises(UserError, match=r"8% of the samples could not be scored \(1 of 12 have latents .* not finite"):
        training.train_step(trainer, 0)


@pytest.mark.filterwarnings("ignore:.*latents are not finite")
@pytest.mark.parametrize("command", ["train", "evaluate", "curate", "sample"])
def test_a_model_whose_latents_overflow_is_never_scored(tmp_path, tiny_model, run, command):
    model = overflowing(tiny_model, tmp_path / "model")
    world = {"model": {"path": str(model)}, "world": {"text_dim": TEXT_DIM}}
    arguments = run(command, merge(BASE, world) if command == "train" else world)
    if command == "evaluate":
        arguments += ["evaluation.prompts=4"]
    if command == "curate":
        arguments += ["probe.prompts=4", "probe.group=2"]
    if command == "sample":
        arguments = ["sample", "--model", model, "--out", tmp_path / "out.png", "a red 7"]
    code, out, err = qirl(*arguments)
    assert code == 2 and "not finite" in err.splitlines()[-1], err
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "out/evaluation.json").exists()


def test_a_failed_sample_weighs_nothing_and_spoils_nothing():
    x0 = [torch.ones(2, 3), torch.full((2, 3), torch.nan), torch.tensor([[torch.inf, 0, 0]])]
    kept = {(i, 0): Kept(x, x, x) for i, x in enumerate(x0)}
    with pytest.warns(UserWarning, match="2 of 3 latents are not finite"):
        assert not_finite(x0) == [False, True, True]
    clean, states = without_failed(x0, kept)
    assert torch.equal(clean[0], x0[0]) and states[0, 0] is kept[0, 0]
    assert all(not v.any() for v in (clean[1], clean[2], states[1, 0].x, states[1, 0].x_next, states[2, 0].v))


def test_the_scores_of_a_failed_sample_are_nan_for_every_component():
    image = torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()
    groups = [[Sample(i, 0, "a 7", image, failed=i in (1, 2, 3)) for i in own] for own in ((0, 1), (2, 3), (4,))]
    calls = []

    def named(name):
        def reward(samples):
            calls.append([s.id for s in samples])
            return [{name: 0.5} for _ in samples]

        return reward

    with Scorer([named("a"), named("b")], Scoring()) as scorer:
        for own in groups:
            scorer.submit(own)
        scores, _ = scorer.collect()
        assert [[row["a"], row["b"]] for row in (scores[0], scores[4])] == [[0.5, 0.5]] * 2
        assert all(row.keys() == {"a", "b"} and all(v != v for v in row.values()) for row in scores[1:4])
        assert sorted(calls) == [[0], [0], [4], [4]]
    with Scorer([named("a")], Scoring()) as scorer:
        scorer.submit(groups[1])
        with pytest.raises(UserError, match="latents of all samples .* are not finite"):
            scorer.collect()
