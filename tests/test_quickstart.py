"""The main job with tiny budgets: its stages, files and resumption; and the evaluation's numbers."""

import json

import numpy as np
import pytest
import torch

from qirl.data import digits
from qirl.data.prompts import Prompt
from qirl.evaluation.evaluate import balanced, draw
from qirl.evaluation.measure import measure
from qirl.evaluation.statistics import mean_and_error
from qirl.quickstart import quickstart

TINY = {
    "pretrain": ["run.steps=6", "pretrain.batch=8", "model.architecture.layers=2", "optimizer.warmup=0"],
    "train": ["run.steps=2", "run.samples_every=1", "run.monitor_prompts=4", "policy.prompts=4", "policy.group=3"],
    "evaluate": ["evaluation.prompts=4", "evaluation.group=2", "evaluation.steps=3", "evaluation.guidance=[1, 2]"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, quickstart(str(out), seed=3, quiet=True, overrides=TINY)


def test_quickstart_writes_what_it_promises(finished):
    out, summary = finished
    written = json.loads((out / "summary.json").read_text())
    assert written["seconds"] > 0 and set(written["stages"]) == {"base", "t2i"}
    for stage in written["stages"].values():
        assert 0 <= stage["judge_accuracy"] <= 1 and stage["guidance"] == 1.0 and stage["diversity"] > 0
        assert set(stage["rewards"]) == {"digit", "attribute", "ink"}
    assert set(written["stages"]["base"]["by_guidance"]) == {"1", "2"}
    page = (out / "report.html").read_text()
    assert "data:image/png" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (out / "before_after.png").stat().st_size > 1000
    assert summary["stages"].keys() == written["stages"].keys()


def test_started_again_it_repeats_nothing_and_changes_nothing(finished, monkeypatch):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")} | {out: (out / "t2i/metrics.jsonl").read_bytes()}
    monkeypatch.setattr("qirl.evaluation.evaluate.draw", lambda *a, **k: pytest.fail("evaluated again"))
    monkeypatch.setattr("qirl.quickstart.picture", lambda *a, **k: __import__("PIL.Image").Image.new("RGB", (8, 8)))
    quickstart(str(out), seed=3, quiet=True, overrides=TINY)
    assert before == {p: p.read_bytes() for p in out.rglob("*.safetensors")} | {
        out: (out / "t2i/metrics.jsonl").read_bytes()
    }


def test_the_base_comes_from_the_cache_where_its_content_is_known(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("qirl.pretraining.train_step", lambda *a, **k: pytest.fail("pretrained again"))
    from qirl.quickstart import train_base

    train_base(tmp_path / "base", 3, True, TINY["pretrain"])
    name = "model/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / name).read_bytes() == (out / "base" / name).read_bytes()


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
    from qirl.config_sections import World
    from qirl.data.world import make_world

    world = make_world(World())
    prompts = [Prompt(i, t, "colour") for i, t in enumerate(["a red 1", "a green 0", "a blue 4"])]
    strokes, labels, _ = digits.glyphs("generator")
    real = np.stack(
        [
            [digits.render(digits.parse(p.text), strokes[labels == int(p.text[-1])][i : i + 1]) for i in range(8)]
            for p in prompts
        ]
    )
    good = measure(real, prompts, world.rewards(), world.judge())
    blank = measure(np.zeros_like(real), prompts, world.rewards(), world.judge())
    assert good["judge_accuracy"] > 0.85
    assert blank["judge_accuracy"] <= 1 / 3 + 1e-9  # one reading for all: right for one of the three prompts at most
    assert good["diversity"] > 0.1 and blank["diversity"] == 0
    assert good["pairs"] == 24


def test_two_models_are_compared_on_the_same_noise(finished):
    """The draw depends on seed, prompt and sample only; the same model gives the same picture in any company."""
    from qirl.config_sections import Flow, World
    from qirl.data.world import make_world
    from qirl.models.weights import load_model

    out, _ = finished
    model, world = load_model(out / "base/model"), make_world(World())
    flow = Flow(steps=3, guidance=2.0)
    listed = [(Prompt(5, "a red 7", "colour"), 0), (Prompt(9, "a 3", "plain"), 1)]
    together = draw(model, world, listed, 2, flow, 7, 10**6)
    alone = draw(model, world, listed[1:], 2, flow, 7, 1)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1  # one rounding of a pixel
    assert torch.is_grad_enabled()
