"""Several models: each measured as if it were alone, then battles; what was found is not drawn again."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from cli_runs import qirl, refused
from safetensors.torch import load_file, save_file
from tiny_runs import TEXT_DIM, save_random_model

from qirl.config import load
from qirl.data.prompts import Prompt
from qirl.evaluation.compare import compare, config_of
from qirl.evaluation.evaluate import evaluate
from qirl.evaluation.measure import measure
from qirl.evaluation.statistics import interval
from qirl.tables import print_results

SHARED = {
    "run": {"threads": 1},
    "world": {"text_dim": TEXT_DIM},
    "evaluation": {"prompts": 6, "group": 2, "steps": 3, "guidance": [1.0, 2.0]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models, of which `twin` has the weights of `base`."""
    root = tmp_path_factory.mktemp("models")
    base = save_random_model(root / "base")
    for name in ("other", "twin"):
        shutil.copytree(base, root / name)
    (path,) = (root / "other").glob("*.safetensors")
    torch.manual_seed(1)
    save_file({k: v + 0.1 * torch.randn_like(v) for k, v in load_file(path).items()}, path)
    return root


def values(root, out, names=("base", "other", "twin"), **arena):
    evaluation = SHARED["evaluation"] | {"models": {name: str(root / name) for name in names}}
    return SHARED | {
        "run": {"threads": 1, "out": str(out)},
        "evaluation": evaluation,
        "arena": {"battles": True} | arena,
    }


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "arena"
    given = values(models, out, anchor="other", rating=1500, resamples=100, guidance={"other": 3.0})
    config = load("evaluate", given)
    return out, given, compare(config, quiet=True)


def test_each_model_is_measured_as_if_it_were_alone(models, compared, tmp_path):
    _, _, found = compared
    alone = {"model": {"path": str(models / "other")}, "run": {"threads": 1, "out": str(tmp_path)}}
    own = evaluate(load("evaluate", SHARED | alone), quiet=True)
    as_text = lambda results: json.dumps(results, sort_keys=True)  # noqa: E731  NaN (one prompt has no error) equals NaN
    assert as_text(own) == as_text({g: found["models"]["other"][g] for g in ("1", "2")})
    assert list(found["models"]["other"]) == ["1", "2", "3"] and list(found["models"]["base"]) == ["1", "2"]
    assert as_text(found["models"]["base"]) == as_text(found["models"]["twin"])


def test_every_pair_battles_on_every_sample_at_the_scale_of_each(compared):
    arena = compared[2]["arena"]
    assert arena["battles"] == 3 * 12 and arena["prompts"] <= 6 and arena["anchor"] == "other"
    assert arena["guidance"] == {"base": 1.0, "other": 3.0, "twin": 1.0}
    assert arena["elo"]["other"]["rating"] == 1500 and arena["elo"]["base"]["games"] == 24
    assert arena["elo"]["base"]["rating"] == pytest.approx(arena["elo"]["twin"]["rating"])
    assert arena["differences"]["base - twin"]["value"] == pytest.approx(0, abs=1e-6)
    assert set(arena["differences"]) == {"base - other", "base - twin", "other - twin"}


def test_the_results_are_in_the_folders(models, compared):
    out, _, found = compared
    written = json.loads((out / "arena.json").read_text())
    assert written["arena"] == found["arena"] and set(written["paths"]) == {"base", "other", "twin"}
    own = json.loads((models / "other/evaluation.json").read_text())
    assert list(own["guidance"]) == ["1", "2", "3"]


def test_started_again_nothing_is_drawn(models, compared, monkeypatch):
    out, given, found = compared

    def draw(*_):
        raise InterruptedError("asked to draw")

    monkeypatch.setattr("qirl.evaluation.evaluate.draw", draw)
    assert compare(load("evaluate", given), quiet=True)["arena"] == found["arena"]
    alone = given | {"arena": {}, "evaluation": given["evaluation"] | {"guidance": [2.0]}}
    assert list(compare(load("evaluate", alone), quiet=True)["models"]["base"]) == ["2"]
    changed = given | {"evaluation": given["evaluation"] | {"seed": 5}}
    with pytest.raises(InterruptedError):
        compare(load("evaluate", changed), quiet=True)


def test_both_tasks_battle_where_the_world_has_both(models, tmp_path):
    given = values(models, tmp_path / "out", ("base", "other"))
    given["world"] = given["world"] | {"task": "mixed"}
    given["evaluation"] = given["evaluation"] | {"prompts": 8, "guidance": [2.0]}
    found = compare(load("evaluate", given), quiet=True)
    own = found["models"]["other"]["2"]
    assert set(own["by_task"]) == {"t2i", "edit"} and len(own["by_category"]) == 8
    assert "instruction" in own["by_task"]["edit"]["rewards"] and "digit" in own["by_task"]["t2i"]["rewards"]
    arena = found["arena"]
    assert arena["battles"] == 16 and arena["elo"]["base"]["rating"] == 1000
    assert {task: (own["battles"], own["prompts"]) for task, own in arena["by_task"].items()} == {
        "t2i": (8, 4),
        "edit": (8, 4),
    }
    assert sum(own["elo"]["other"]["wins"] for own in arena["by_task"].values()) == arena["elo"]["other"]["wins"]


def test_the_command_prints_models_and_ratings(models, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "arena.yaml").write_text(yaml.safe_dump(values(models, tmp_path / "out", ("base", "other"))))
    code, out, err = qirl("evaluate", tmp_path / "arena.yaml")
    assert code == 0, err
    assert "artifacts" in out and "12 battles" in out and "fixed" in out and " to " in out
    code, out, _ = qirl("evaluate", tmp_path / "arena.yaml", "--dry-run")
    assert code == 0 and "packs of other, guidance 2" in out


def test_models_that_cannot_be_compared_are_refused_before_anything_is_drawn(models, tmp_path):
    given = values(models, tmp_path / "out", ("base", "other"))
    path = tmp_path / "arena.yaml"
    path.write_text(yaml.safe_dump(given))
    ask = lambda *more: refused(tmp_path, "evaluate", path, *more)  # noqa: E731
    assert "arena.anchor=bse is not among evaluation.models (base, other)" in ask("arena.anchor=bse")
    assert "arena.guidance.twin is not among" in ask("arena.guidance.twin=1")
    assert "arena.guidance.base=-1 is negative" in ask("arena.guidance.base=-1")
    assert "arena.battles needs two models or more" in ask("evaluation.models={base: x}")
    assert "no-such-model holds no model" in ask("evaluation.models.third=no-such-model")
    path.write_text(yaml.safe_dump(given | {"run": {}}))
    assert "run.out is missing" in ask()


def test_the_evaluation_of_one_of_several_is_keyed_like_its_own(models):
    config = load("evaluate", values(models, "nowhere", guidance={"twin": 2.0}))
    one = config_of(config, "twin")
    assert one.evaluation.guidance == (1.0, 2.0) and one.model.path == str(models / "twin")
    assert "out" not in one.run.model_fields_set and one.run.threads == 1 and not one.evaluation.models


class Bright:
    """A judge of both tasks that calls bright images right."""

    def correct(self, samples):
        return np.array([s.image.mean() > 100 for s in samples])


def glow(samples):
    """A component for text-to-image only and one for edits only; one failed reading."""
    name = {"t2i": "digit", "edit": "instruction"}
    return [{name[s.task]: np.nan if s.id == 0 else float(s.image.mean() / 255)} for s in samples]


def test_tables_by_task_and_category_have_intervals_over_prompts():
    level = np.array([[50, 250], [150, 150], [0, 255], [255, 255]], np.uint8)
    images = np.broadcast_to(level[:, :, None, None, None], (4, 2, 16, 16, 3))
    source = (np.zeros((16, 16, 3), np.uint8),)
    prompts = [Prompt(0, "a 7", "plain"), Prompt(1, "a 8", "plain"), Prompt(2**20, "make it red", "recolour", source)]
    found = measure(images, [*prompts, prompts[2]], [glow], Bright())
    assert found["rewards"]["digit"] == pytest.approx((250 + 150) / 2 / 255)  # the failed reading is left out
    assert found["by_task"]["t2i"]["judge_accuracy"] == interval(np.array([0.5, 1.0]), np.arange(2))
    assert found["by_task"]["t2i"]["judge_accuracy"]["high"] == pytest.approx(0.75 + 12.706 * 0.25, abs=1e-3)
    assert list(found["by_task"]["edit"]["rewards"]) == ["instruction"]
    edit = found["by_category"]["recolour"]["judge_accuracy"]
    assert edit["value"] == 0.75 and np.isnan(edit["low"])  # two groups of one prompt: no spread between prompts
    assert found["gap"] == pytest.approx(np.mean([250 / 255 - 0.5, 150 / 255 - 1, 0.0, 0.0]))
    assert found["judge_by_category"] == {"plain": 0.75, "recolour": 0.75}
    assert found["artifacts"] == pytest.approx(0) and found["pairs"] == 8
    assert found["failed"] == {"digit": 0.25}


def test_rewards_of_the_config_are_measured_and_kept(models, tmp_path, monkeypatch):
    """Two kinds that are called like numbers of ours stay apart from them."""
    monkeypatch.setenv("COLUMNS", "160")
    rewards = {name: {"kind": name} for name in ("artifacts", "diversity")}
    alone = {"model": {"path": str(models / "other")}, "run": {"threads": 1, "out": str(tmp_path)}}
    given = SHARED | alone | {"rewards": rewards}
    found = evaluate(load("evaluate", given), quiet=True)["2"]
    assert set(found["rewards"]) == {"artifacts (reward)", "diversity (reward)"} and found["failed"] == {}
    assert found["diversity"] != found["rewards"]["diversity (reward)"] and np.isnan(found["gap"])
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(given))
    code, out, err = qirl("evaluate", path, "evaluation.guidance=[1]")
    assert code == 0 and "diversity (reward)" in out, err
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["guidance"]) == {"1", "2"}
    qirl("evaluate", path, "evaluation.guidance=[1]", "rewards.artifacts.low=0")
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["guidance"]) == {"1"}  # other rewards: anew


def test_callables_score_every_evaluation_anew_and_failures_are_told(models, tmp_path):
    calls = []

    async def red(samples):
        calls.append([s.id for s in samples])
        return [{"red": np.nan if s.id == 3 else float(s.image[..., 0].mean() / 255)} for s in samples]

    given = values(models, tmp_path / "out", ("base", "other"))
    given["evaluation"] = given["evaluation"] | {"guidance": [1.0]}
    for times in (1, 2):
        found = compare(load("evaluate", given), [red], quiet=True)
        assert calls == [list(range(12))] * 2 * times
    assert found["models"]["base"]["1"]["failed"] == {"red": 1 / 12}


@pytest.mark.parametrize(("group", "sizes"), [(8, [32, 32, 8]), (20, [20] * 9), (40, [40] * 9)])
def test_rewards_get_whole_prompts_in_calls_of_a_training_steps_size(group, sizes):
    calls = []

    def counted(samples):
        calls.append(len(samples))
        return [{"x": s.id / 1000} for s in samples]

    images = np.zeros((9, group, 16, 16, 3), np.uint8)
    found = measure(images, [Prompt(i, "a 7", "plain") for i in range(9)], [counted], Bright())
    assert calls == sizes
    assert found["by_prompt"]["x"][1] == pytest.approx(np.arange(group, 2 * group).mean() / 1000, abs=1e-4)


def test_a_failed_component_has_a_line_below_the_table(capsys):
    row = {name: 0.5 for name in ("judge_accuracy", "judge_accuracy_se", "gap", "diversity", "artifacts")}
    print_results({"2": row | {"rewards": {"text": 0.25}, "failed": {"text": 0.125}}})
    assert "model, guidance 2: text failed on 12% of images" in capsys.readouterr().out
