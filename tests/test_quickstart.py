"""The main job with tiny budgets: its stages, files and resumption; and the evaluation's numbers."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qirl import quickstart_results as results
from qirl.data import digits, latents
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.evaluation.arena import Battle, arena, arena_by_task
from qirl.evaluation.evaluate import balanced, draw
from qirl.evaluation.measure import measure
from qirl.evaluation.statistics import mean_and_error
from qirl.quickstart import STAGES, load_recipes, quickstart, train_base
from qirl.rewards.judge import held_out_judge
from qirl.rewards.registry import own_rewards

TOKENS = latents.TOKENS  # of an image; the curation draws 4 prompts of 4 images and their twins at a time
SHORT = ["run.steps=2", "run.samples_every=2", "run.monitor_prompts=4", "flow.steps=4"]
RL = [*SHORT, "policy.prompts=8", "policy.group=3", "policy.timesteps.count=2"]
TINY = {
    "base": ["run.steps=6", "pretrain.batch=8", "model.architecture.layers=2", "optimizer.warmup=0"],
    "curate": [
        "probe.prompts=16",
        "probe.group=4",
        "flow.steps=4",
        f"flow.rollout_tokens={2 * 4 * 4 * TOKENS}",
        "curate.tau=0.001",
    ],
    "calibrate": ["flow.steps=4"],
    "t2i": RL,
    "edit": RL,
    "mix": RL,
    "student": [*SHORT, "distill.prompts=4", "distill.teachers.t2i.guidance=3", "distill.teachers.edit.guidance=2"],
    "arena": [
        "evaluation.prompts=16",
        "evaluation.group=2",
        "evaluation.steps=3",
        "evaluation.guidance=[1, 2]",
        "arena.resamples=100",
    ],
}
MODELS = ("base", "t2i", "edit", "mix", "student")


def run(out):
    return quickstart(str(out), seed=3, quiet=True, overrides=TINY)


def interrupted(out, where, when):
    """A start that is stopped at the first call of `where` for which `when(calls before, *arguments)` holds."""
    module, _, name = where.rpartition(".")
    real, calls = getattr(importlib.import_module(module), name), []

    def stopped(*args, **more):
        if when(calls, *args):
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, stopped)
        run(out)
    return calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Stopped in the middle of the curation, of an RL stage and of the arena, then finished."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    interrupted(out, "qirl.curation.probe.draw", lambda calls, *_: len(calls) == 2)
    half = len((out / "curate/ledger.jsonl").read_text().splitlines())
    calls = interrupted(out, "qirl.policy.trainer.train_step", lambda _, trainer, n: stage_of(trainer) == "mix" and n)
    assert [(stage_of(trainer), n) for trainer, n in calls] == [
        ("t2i", 0),
        ("t2i", 1),
        ("edit", 0),
        ("edit", 1),
        ("mix", 0),
    ]
    before = kept(out)
    assert half == 1 + 4 and len(before[Path("curate/ledger.jsonl")].splitlines()) == 1 + 16
    interrupted(out, "qirl.evaluation.evaluate.draw", lambda calls, *_: len(calls) == 4)
    after = kept(out)
    assert all(after[name] == data for name, data in before.items() if name.parts[0] != "mix")
    return out, run(out)


def stage_of(trainer):
    return Path(trainer.config.run.out).name


def kept(out):
    """What a second start must not change: weights, logs, decisions, evaluations."""
    names = ("*.safetensors", "*.jsonl", "calibration.json", "evaluation.json", "arena.json")
    return {path.relative_to(out): path.read_bytes() for name in names for path in out.rglob(name)}


def test_every_stage_is_evaluated_on_both_tasks_at_what_it_is_for(finished):
    out, summary = finished
    written = json.loads((out / "summary.json").read_text())
    assert written["seconds"] > 0 and list(written["seconds_by_stage"]) == ["readers", *STAGES, "report"]
    assert tuple(written["stages"]) == tuple(summary["stages"]) == MODELS
    for name, stage in written["stages"].items():
        assert 0 <= stage["judge_accuracy"] <= 1 and stage["diversity"] > 0 and set(stage["by_task"]) == {"t2i", "edit"}
        assert set(stage["rewards"]) == {"digit", "attribute", "ink", "instruction", "identity"}
        assert "1" in stage["by_guidance"] and f"{stage['best_guidance']:g}" in stage["by_guidance"], name
    best = max((1.0, 2.0), key=lambda g: written["stages"]["base"]["by_guidance"][f"{g:g}"]["judge_accuracy"])
    for_what = {"base": best, "t2i": 3.0, "edit": 2.0, "mix": 2.0, "student": 1.0}
    assert {name: stage["guidance"] for name, stage in written["stages"].items()} == for_what
    assert {"1", "2"} <= set(written["stages"]["base"]["by_guidance"])


def test_ratings_and_differences_to_the_student_have_intervals_for_each_task(finished):
    out, _ = finished
    written = json.loads((out / "summary.json").read_text())
    for scope in ("overall", "t2i", "edit"):
        assert tuple(written["elo"][scope]) == MODELS and written["elo"][scope]["base"]["rating"] == 1000
        for row in written["elo"][scope].values():
            assert row["low"] <= row["rating"] <= row["high"]
        differences = written["elo_differences"][scope]
        assert list(differences) == [f"student - {name}" for name in MODELS[:-1]]
        assert differences["student - base"]["value"] == pytest.approx(
            written["elo"][scope]["student"]["rating"] - 1000
        )
    assert {name: row["guidance"] for name, row in written["elo"]["edit"].items()} == {
        name: stage["guidance"] for name, stage in written["stages"].items()
    }


def test_both_tasks_train_on_the_curated_prompts_with_the_calibrated_weights(finished):
    out, _ = finished
    lines = [json.loads(line) for line in (out / "curate/curated.jsonl").read_text().splitlines()]
    categories = {
        task: {x["category"] for x in lines if ("sources" in x) == (task == "edit")} for task in ("t2i", "edit")
    }
    categories["mix"] = categories["t2i"] | categories["edit"]
    assert categories["edit"] == {"recolour", "repaint", "swap", "compose"} and categories["t2i"]
    known = json.loads((out / "calibrate/calibration.json").read_text())["categories"]
    assert set(known) == categories["mix"]
    for task, own in categories.items():
        texts = [(out / task / name).read_text().splitlines() for name in ("scores.jsonl", "metrics.jsonl")]
        scores, metrics = ([json.loads(line) for line in lines] for lines in texts)
        assert {row["category"] for row in scores} <= own, task
        shares = {key.split("/")[1] for row in metrics for key in row if key.startswith("share/")}
        assert shares and shares <= own, task


def test_page_picture_and_table_show_it(finished, capsys):
    out, summary = finished
    page = (out / "report.html").read_text()
    assert "data:image/png" in page and "http://" not in page.replace("http://www.w3.org", "")
    for words in ("Elo edit", "judge t2i", "candidate prompts", "wanted share", "<h2>student</h2>"):
        assert words in page, words
    picture = Image.open(out / "before_after.png")
    assert picture.width > 12 * 96 and picture.height > 4 * 96
    results.print_table(summary)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and all(any(name in line for line in lines) for name in MODELS)


def test_a_table_of_wide_numbers_fits_100_columns(finished, capsys):
    summary = json.loads(json.dumps(finished[1]))
    for scope in summary["elo"].values():
        for row in scope.values():
            row |= {"rating": 1234.5, "low": 1111.1, "high": 1357.9}
    summary["stages"]["base"]["guidance"] = 2.0
    results.print_table(summary)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum("1234 (1111–1358)   1234 (1111–1358)" in line for line in lines) == 5
    assert sum(line.split()[:1] == ["base"] for line in lines) == 2


def test_started_again_it_repeats_nothing_and_changes_nothing(finished, monkeypatch):
    out, _ = finished
    before = kept(out)
    for name in (
        "evaluation.evaluate.draw",
        "curation.probe.draw",
        "pretraining.train_step",
        "policy.trainer.train_step",
    ):
        monkeypatch.setattr(f"qirl.{name}", lambda *a, name=name, **k: pytest.fail(f"{name} again"))
    monkeypatch.setattr("qirl.distillation.trainer.distill_step", lambda *a, **k: pytest.fail("distilled again"))
    monkeypatch.setattr(results, "picture", lambda *a, **k: Image.new("RGB", (8, 8)))
    run(out)
    assert kept(out) == before


def test_deleted_stages_are_made_again_and_no_other(finished, monkeypatch):
    out, _ = finished
    before, steps = kept(out), []
    from qirl.policy import trainer as training

    step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda own, n: steps.append(own.config.run.out) or step(own, n))
    monkeypatch.setattr("qirl.curation.probe.draw", lambda *a, **k: pytest.fail("probed again"))
    monkeypatch.setattr("qirl.distillation.trainer.distill_step", lambda *a, **k: pytest.fail("distilled again"))
    monkeypatch.setattr("qirl.pretraining.train_step", lambda *a, **k: pytest.fail("pretrained again"))
    shutil.rmtree(out / "edit")
    shutil.rmtree(out / "arena")
    (out / "curate/curated.jsonl").unlink()
    (out / "calibrate/calibration.json").unlink()
    run(out)
    assert steps == [str(out / "edit")] * 2
    after = kept(out)
    timed = {name for name in before if name.name in ("metrics.jsonl",) and name.parts[0] == "edit"}
    assert set(after) == set(before) and {name for name in before if before[name] != after[name]} <= timed


def test_another_seed_and_overrides_of_no_stage_are_refused(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match=r"holds a run of another config: run.seed \(3 there, 4 now\)"):
        quickstart(str(out), seed=4, quiet=True, overrides=TINY)
    with pytest.raises(UserError, match="overrides of 'pretrain', which is no stage"):
        quickstart(str(tmp_path / "new"), overrides={"pretrain": []})
    with pytest.raises(UserError, match="run.stps"):
        quickstart(str(tmp_path / "new"), overrides={"student": ["run.stps=2"]})
    assert not (tmp_path / "new").exists()


def test_the_base_comes_from_the_cache_where_its_content_is_known(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("qirl.pretraining.train_step", lambda *a, **k: pytest.fail("pretrained again"))
    assert train_base(load_recipes(tmp_path, 3, TINY)["base"], quiet=True)
    name = "base/model/diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_base_that_other_code_began_does_not_enter_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "cache"))
    config = load_recipes(tmp_path, 4, TINY)["base"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qirl.quickstart.base_key", lambda config: "0" * 64)
        assert not train_base(config, quiet=True)
    assert not train_base(config, quiet=True)  # continued: nothing is left to train
    assert [p.name for p in (tmp_path / "cache").glob("digits-base-*") if p.is_dir()] == [f"digits-base-{'0' * 16}"]


def test_ratings_of_hand_made_battles_are_told_by_task():
    """The student wins 30 of 40 on text-to-image and 10 of 40 on edits: 3 to 1 are 190.85 points."""
    source = (np.zeros((16, 16, 3), np.uint8),)
    prompts = [Prompt(i, "a 7") for i in range(40)] + [
        Prompt(40 + i, "make it red", "recolour", source) for i in range(40)
    ]
    battles = [Battle(i, "base", "student", "b" if i < 30 or i >= 70 else "a") for i in range(80)]
    found = arena(battles, "base", resamples=200) | {"by_task": arena_by_task(battles, prompts, "base", resamples=200)}
    told = results.elo_of(found | {"guidance": {"base": 4.0, "student": 1.0}})
    rated = {scope: own["student"]["rating"] for scope, own in told["elo"].items()}
    assert rated == {
        "overall": pytest.approx(1000, abs=1e-6),
        "t2i": pytest.approx(1190.85, abs=0.1),
        "edit": pytest.approx(1000 - 190.85, abs=0.1),
    }
    assert told["elo"]["t2i"]["base"] == {"rating": 1000, "low": 1000, "high": 1000, "guidance": 4.0}
    lead = told["elo_differences"]["t2i"]["student - base"]
    assert lead["value"] == pytest.approx(190.85, abs=0.1) and 50 < lead["low"] < lead["value"] < lead["high"] < 400
    behind = told["elo_differences"]["edit"]["student - base"]
    assert behind["low"] < behind["value"] < behind["high"] < 0


def test_clustered_standard_error_counts_prompts_not_images():
    values, clusters = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1])
    mean, error = mean_and_error(values, clusters)
    assert mean == 0.5 and error == pytest.approx(0.5)  # two independent prompts: std 0.707 / sqrt(2)
    assert mean_and_error(values, np.arange(4))[1] == pytest.approx(values.std(ddof=1) / 2)


def test_evaluation_prompts_are_balanced_and_repeats_draw_new_noise():
    chosen = balanced(digits.prompts("held_out"), 80, 1)
    categories = [p.category for p, _ in chosen]
    assert {categories.count(c) for c in digits.CATEGORIES} == {20}
    assert len({(p.id, before) for p, before in chosen}) == 80
    plain = [before for p, before in chosen if p.category == "plain"]
    assert sorted(plain) == sorted([*range(10), *range(10)])  # two held-out plain prompts, ten groups each


def test_perfect_pictures_score_perfectly_and_blank_ones_do_not():
    prompts = [Prompt(i, t, "colour") for i, t in enumerate(["a red 1", "a green 0", "a blue 4"])]
    strokes, labels, _ = digits.glyphs("generator")
    real = np.stack(
        [
            [digits.render(digits.parse(p.text), strokes[labels == int(p.text[-1])][i : i + 1]) for i in range(8)]
            for p in prompts
        ]
    )
    good = measure(real, prompts, own_rewards("t2i"), held_out_judge())
    blank = measure(np.zeros_like(real), prompts, own_rewards("t2i"), held_out_judge())
    assert good["judge_accuracy"] > 0.85
    assert blank["judge_accuracy"] <= 1 / 3 + 1e-9  # one reading for all: right for one of the three prompts at most
    assert good["diversity"] > 0.1 and blank["diversity"] == 0
    assert good["pairs"] == 24


def test_two_models_are_compared_on_the_same_noise(finished):
    """The draw depends on seed, prompt and sample only; the same model gives the same picture in any company."""
    from qirl.config_sections import Flow, World
    from qirl.models.weights import load_model
    from qirl.world import make_world

    out, _ = finished
    model, family = load_model(out / "base/model"), make_world(World()).family
    flow = Flow(steps=3, guidance=2.0)
    listed = [(Prompt(5, "a red 7", "colour"), 0), (Prompt(9, "a 3", "plain"), 1)]
    together = draw(model, family, listed, 2, flow, 7, 10**6)
    alone = draw(model, family, listed[1:], 2, flow, 7, 1)
    assert (
        np.abs(np.stack(together[1]).astype(int) - np.stack(alone[0]).astype(int)).max() <= 1
    )  # one rounding of a pixel
    assert torch.is_grad_enabled()
