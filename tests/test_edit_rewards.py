"""Rewards and judge of edits: true edits score high; copies, redraws and wrong colours score low, each where it must."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_runs

from qirl.data import digits, edits
from qirl.data.digits import INKS, PAPERS, bank, glyphs, paint
from qirl.data.words import contrasting
from qirl.errors import UserError
from qirl.rewards.digits import reward_reader
from qirl.rewards.edits import copies, wanted_specs
from qirl.rewards.glyphs import plane, reward_embedding
from qirl.rewards.judge import held_out_judge
from qirl.rewards.protocol import Sample
from qirl.rewards.registry import own_rewards
from qirl.rewards.scorer import score
from qirl.run.cache import folder

COUNT = 240


@pytest.fixture(scope="module")
def truth() -> list[Sample]:
    """True edits, all categories."""
    u = np.random.default_rng(5).random((COUNT, digits.UNIFORMS))
    prompts, images = edits.examples(u)
    return [
        Sample(i, p.id, p.text, image, p.category, p.sources)
        for i, (p, image) in enumerate(zip(prompts, images, strict=True))
    ]


@pytest.fixture(scope="module")
def scored(truth):
    """What becomes of an edit, to the scores of all samples."""
    made = {"true": truth, "copy": copied(truth), "redraw": redrawn(truth), "wrong colour": miscoloured(truth)}
    return made, {name: score(own_rewards("edit"), samples) for name, samples in made.items()}


def copied(truth):
    return [replace(s, image=s.sources[0]) for s in truth]


def redrawn(truth):
    """The right digits in the right colours, by other images."""
    bank_, labels = bank("reward"), glyphs("reward")[1]
    rng, out = np.random.default_rng(6), []
    for s, spec in zip(truth, wanted_specs(reward_reader(folder()), truth), strict=True):
        chosen = [rng.choice(np.flatnonzero(labels == digit)) for digit in spec.digits]
        one = len(chosen) == 1
        cover = bank_.single[chosen[0]] if one else np.concatenate([bank_.half[i] for i in chosen], axis=-1)
        out.append(replace(s, image=paint(cover, np.array(INKS[spec.ink]), np.array(PAPERS[spec.paper]))))
    return out


def miscoloured(truth):
    """The right glyph in an ink that was not asked for."""
    out = []
    for s, spec in zip(truth, wanted_specs(reward_reader(folder()), truth), strict=True):
        other = next(ink for ink in INKS if ink != spec.ink and contrasting(ink, spec.paper))
        image = paint(plane(s.image[None])[0], np.array(INKS[other]), np.array(PAPERS[spec.paper]))
        out.append(replace(s, image=image))
    return out


def true_edits_of_held_out_prompts() -> list[Sample]:
    """What the held-out prompts want, painted from the strokes of their sources."""
    prompts, tasks = edits.prompts("held_out"), [task for own in edits._world().values() for task in own[:40]]
    samples = []
    for prompt, (edit, specs, _) in zip(prompts, tasks, strict=True):
        spec, cover = edits.wanted(edit, specs), plane(prompt.sources[0][None])[0]
        cover = np.roll(cover, 8, axis=1) if edit.operation == "swap" else cover
        image = paint(cover, np.array(INKS[spec.ink]), np.array(PAPERS[spec.paper]))
        samples.append(Sample(prompt.id, prompt.id, prompt.text, image, prompt.category, prompt.sources))
    return samples


def mean(scores, component: str, samples, category: str | None = None) -> float:
    own = [row[component] for row, s in zip(scores, samples, strict=True) if category in (None, s.category)]
    return float(np.mean(own))


@pytest.mark.parametrize("category", edits.CATEGORIES)
def test_true_edits_score_high_and_copies_fail_the_instruction(scored, category):
    made, scores = scored
    assert mean(scores["true"], "instruction", made["true"], category) > 0.9
    assert mean(scores["true"], "identity", made["true"], category) > 0.9
    assert mean(scores["copy"], "instruction", made["copy"], category) < 0.35


def test_a_redrawn_digit_follows_the_instruction_and_loses_identity(scored):
    made, scores = scored
    assert mean(scores["redraw"], "instruction", made["redraw"]) > 0.85
    assert mean(scores["redraw"], "identity", made["redraw"]) < 0.3


def test_a_wrong_colour_keeps_identity_and_fails_the_instruction(scored):
    made, scores = scored
    assert mean(scores["wrong colour"], "identity", made["wrong colour"]) > 0.85
    assert mean(scores["wrong colour"], "instruction", made["wrong colour"]) < 0.5


def test_identity_rises_smoothly_from_another_glyph_to_the_same():
    cover = bank("reward").single
    labels = glyphs("reward")[1]
    pairs = [np.flatnonzero(labels == digit)[:20] for digit in range(10)]
    first = np.concatenate([p[:10] for p in pairs])
    other = np.concatenate([p[10:] for p in pairs])
    embedding = reward_embedding(folder())
    steps = [(1 - share) * cover[other] + share * cover[first] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    means = [float(embedding.identity(x.astype(np.float32), cover[first]).mean()) for x in steps]
    assert means == sorted(means) and means[0] < 0.3 and 0.1 < means[2] < 0.95 and means[-1] > 0.9


def test_the_judge_accepts_true_edits_and_neither_copies_nor_redraws_nor_wrong_colours(scored):
    made, _ = scored
    judge = held_out_judge()
    share = {name: float(judge.correct(samples).mean()) for name, samples in made.items()}
    held_out = judge.correct(true_edits_of_held_out_prompts())
    assert held_out.mean() >= 0.95
    assert share["true"] >= 0.95 and share["copy"] <= 0.02 and share["redraw"] <= 0.1 and share["wrong colour"] <= 0.05
    smooth = {name: float(judge.score(samples).mean()) for name, samples in made.items()}
    assert all(smooth["true"] > smooth[name] + 0.2 for name in ("copy", "redraw", "wrong colour"))


def test_copies_are_counted(scored):
    made, _ = scored
    assert copies(made["copy"]).all() and not copies(made["true"]).any()


def test_the_tasks_rewards_leave_each_others_samples_alone(truth):
    drawn = replace(truth[0], prompt="a red 7", category="colour", sources=())
    rows = score(own_rewards("mixed"), [truth[0], drawn])
    assert set(rows[0]) == {"instruction", "identity", "ink"} and set(rows[1]) == {"digit", "attribute", "ink"}


def test_pictures_of_another_size_are_refused(truth):
    with pytest.raises(UserError, match="16"):
        score(own_rewards("edit"), [replace(truth[0], image=np.zeros((8, 8, 3), np.uint8))])


def test_glyph_strokes_have_no_colour():
    cover = bank("reward").single[:40]
    white = paint(cover, np.array([255, 255, 255]), np.array([0, 0, 0]))
    blue = paint(cover, np.array(INKS["blue"]), np.array(PAPERS["yellow"]))
    assert np.abs(plane(white) - plane(blue)).mean() < 0.02
    assert plane(np.zeros((1, 16, 16, 3), np.uint8)).max() == 0


def test_training_reports_the_share_of_edits_that_return_their_source(opened):
    from qirl.policy import trainer as training

    def lazy(samples):
        return [{"kept": float(copies([s])[0])} for s in samples]

    edit = opened({"world": {"task": "edit"}}, reward=lazy)
    decode = edit.family.decode
    assert training.train_step(edit, 0)["copies"] == 0
    sources = [p.sources[0] for p, _ in edit.prompts.step(1, 4)]
    edit.family.decode = lambda latents, sizes: [
        sources[i // 3] if i < 3 else image for i, image in enumerate(decode(latents, sizes))
    ]
    assert training.train_step(edit, 1)["copies"] == pytest.approx(3 / 12)
    assert "copies" not in training.train_step(opened(reward=lambda s: [{"one": 0.5} for _ in s]), 0)


def test_the_judge_reads_both_tasks_in_one_batch_as_in_two(truth):
    judge, image = held_out_judge(), paint(bank("judge").single[0], np.array(INKS["red"]), np.array(PAPERS["black"]))
    digit = glyphs("judge")[1][0]
    right, wrong = (replace(truth[0], prompt=f"a red {d}", category="colour", image=image, sources=())
                    for d in (digit, (digit + 1) % 10))  # fmt: skip
    assert judge.correct([truth[0], right, truth[1], wrong]).tolist() == [
        *judge.correct(truth[:1]), True, *judge.correct(truth[1:2]), False
    ]  # fmt: skip
    scores = judge.score([truth[0], right, wrong])
    np.testing.assert_allclose(scores[0], judge.score(truth[:1])[0], atol=1e-5)
    assert scores[1] > 0.8 and scores[2] < 0.6
    assert len(judge.correct([])) == len(judge.score([])) == 0


def test_one_redrawn_glyph_of_two_is_seen_by_reward_and_judge(truth):
    swaps = [s for s in truth if s.category == "swap"]
    images = [
        np.concatenate([s.image[:, :8], t.image[:, 8:]], axis=1) for s, t in zip(swaps, redrawn(swaps), strict=True)
    ]
    half = [replace(s, image=image) for s, image in zip(swaps, images, strict=True)]
    assert 0.4 < mean(score(own_rewards("edit"), half), "identity", half) < 0.7
    assert held_out_judge().correct(half).mean() < 0.1


def test_the_base_learns_both_tasks_and_rl_scores_edits_by_the_worlds_own_rewards(tmp_path, tiny_model):
    from qirl.policy import trainer as training
    from qirl.pretraining import pretrain

    engine = pretrain(tiny_runs.pretrain_config(tmp_path / "base", {"world": {"task": "mixed"}}), quiet=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "base/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == engine.config.run.steps and np.isfinite(losses).all()
    for task, components in (("edit", 3), ("mixed", 5)):
        options = {"world": {"task": task}, "policy": {"prompts": 8}}
        trainer = training.open_trainer(tiny_runs.train_config(tmp_path / task, tiny_model, options), ())
        with trainer.scorer:
            record = training.train_step(trainer, 0)
        assert np.isfinite(record["loss"]) and len(trainer.components) == components
