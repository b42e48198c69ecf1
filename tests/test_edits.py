import json

import numpy as np
import pytest
import torch
from PIL import Image

from qirl.config_sections import World
from qirl.data import digits, edits, latents
from qirl.data.digit_set import EDITED
from qirl.data.edits import EditSpec, parse_instruction, picture_of, wanted
from qirl.data.prompts import FIRST_EDIT, Prompt
from qirl.data.words import WordVectors, tokens
from qirl.errors import UserError
from qirl.rewards.judge import held_out_judge
from qirl.rewards.protocol import Sample
from qirl.world import make_world


def data(task="mixed"):
    return make_world(World(task=task)).data


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, digits.UNIFORMS))


@pytest.mark.parametrize(
    "text, spec",
    [
        ("make it yellow", EditSpec("recolour", "yellow")),
        ("turn the background white", EditSpec("repaint", "white")),
        ("swap the two digits", EditSpec("swap")),
        ("put the digit of image 1 on the background of image 2", EditSpec("compose")),
    ],
)
def test_an_instruction_is_read_and_written(text, spec):
    assert parse_instruction(text) == spec and spec.text == text
    assert parse_instruction(f"  {text.upper()} ") == spec


@pytest.mark.parametrize(
    "text, message",
    [
        ("make it black", "black is no ink; known: white"),
        ("turn the background cyan", "cyan is no paper"),
        ("make it yelow", "did you mean 'yellow'"),
        ("swap digits", "did you mean 'swap the two digits'"),
        ("rotate it", "known: make it yellow, put"),
        ("", "known: make it yellow, put"),
        ("a red 7", "'a red 7' draws a picture .* leave its sources out"),
    ],
)
def test_an_instruction_outside_the_grammar_is_refused_with_the_fix(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_instruction(text)
    assert "\n" not in str(error.value)


def test_what_is_wanted_follows_from_instruction_and_sources():
    one, two = picture_of((7,), "red", "white"), picture_of((3, 5), "cyan", "black")
    assert wanted("make it blue", [one]) == picture_of((7,), "blue", "white")
    assert wanted("turn the background red", [two]) == picture_of((3, 5), "cyan", "red")
    assert wanted("swap the two digits", [two]) == picture_of((5, 3), "cyan", "black")
    other = picture_of((1,), "white", "green")
    assert wanted(edits.EXAMPLES[3], [one, other]) == picture_of((7,), "red", "green")
    with pytest.raises(UserError, match="needs 2 source images, not 1"):
        wanted(edits.EXAMPLES[3], [one])
    with pytest.raises(UserError, match="needs sources of 2 digits, not 1"):
        wanted("swap the two digits", [one])
    with pytest.raises(UserError, match="needs sources of 1 and 1 digits, not 2 and 1"):
        wanted(edits.EXAMPLES[3], [two, other])


def test_every_word_of_an_instruction_has_its_role_and_vector():
    assert tokens("turn the background white") == ["turn", "the", "on:white"]
    assert tokens(edits.EXAMPLES[3]) == "put the digit of image:1 on the background of image:2".split()
    assert tokens("image 1") == ["image:1"]
    assert torch.isfinite(WordVectors(8).encode(edits.EXAMPLES[3])).all()


def test_splits_share_neither_tasks_nor_glyphs_nor_ids():
    train, held = edits.prompts("train"), edits.prompts("held_out")
    for split, count in ((train, 150), (held, 40)):
        assert {c: sum(p.category == c for p in split) for c in edits.CATEGORIES} == dict.fromkeys(
            edits.CATEGORIES, count
        )
    ids = [p.id for p in train + held]
    assert len(set(ids)) == len(ids) and min(ids) == FIRST_EDIT and max(p.id for p in digits.prompts("train")) < 2**20
    tasks = {category: [task[:2] for task in tasks] for category, tasks in edits._world().items()}
    assert all(len(set(own)) == 190 for own in tasks.values())
    for split, part, places in ((train, "generator", slice(40, 190)), (held, "source", slice(0, 40))):
        known = digits.bank(part).single
        composed = [prompt for prompt in split if prompt.category == "compose"]
        for prompt, (_, specs) in zip(composed, tasks["compose"][places], strict=True):
            for source, spec in zip(prompt.sources, specs, strict=True):
                assert np.abs(known - _cover(source, spec)).max((1, 2)).min() < 0.02  # of rounding to bytes


def _cover(picture: np.ndarray, spec: digits.DigitSpec) -> np.ndarray:
    ink, paper = np.array(digits.INKS[spec.ink]), np.array(digits.PAPERS[spec.paper])
    return (picture - paper) @ (ink - paper) / ((ink - paper) ** 2).sum()


def test_the_prompts_did_not_change():
    held = edits.prompts("held_out")
    assert [p.text for p in held[::40]] == [
        "make it red",
        "turn the background yellow",
        "swap the two digits",
        "put the digit of image 1 on the background of image 2",
    ]
    assert edits.prompts("train")[0].id == FIRST_EDIT + 40


def test_an_example_depends_on_its_own_uniforms_only():
    for task in ("t2i", "edit", "mixed"):
        u = uniforms(64)
        prompts, images = data(task).examples(u)
        for row in (0, 17, 63):
            (prompt,), own = data(task).examples(u[row : row + 1])
            assert prompt == prompts[row] and np.array_equal(own[0], images[row])
            assert all(np.array_equal(a, b) for a, b in zip(prompt.sources, prompts[row].sources, strict=True))


def test_examples_balance_the_categories_of_the_task():
    prompts, images = data("mixed").examples(uniforms(8000))
    assert images.shape == (8000, 16, 16, 3) and images.dtype == np.uint8
    drawn = [digits.parse(p.text).category if not p.sources else p.category for p in prompts]
    for categories, share in ((digits.CATEGORIES, 1 - EDITED), (edits.CATEGORIES, EDITED)):
        shares = [drawn.count(c) / 8000 for c in categories]
        assert np.abs(np.array(shares) - share / 4).max() < 0.02
    assert all(p.sources for p in data("edit").examples(uniforms(50))[0])
    assert not any(p.sources for p in data("t2i").examples(uniforms(50))[0])
    for task in ("edit", "mixed"):
        data(task).examples(np.full((1, digits.UNIFORMS), np.nextafter(1.0, 0.0)))


def test_an_examples_target_is_the_true_edit_of_its_sources():
    u = uniforms(300)
    prompts, targets = edits.examples(u)
    for row, prompt, target in zip(u, prompts, targets, strict=True):
        edit, specs = edits._task(prompt.category, row[1], row[4])
        shown = wanted(prompt.text, specs)
        assert edit.text == prompt.text and digits.contrasting(shown.ink, shown.paper)
        assert all(
            np.abs(target.astype(int) - source).mean() > 5 for source in prompt.sources if prompt.category != "compose"
        )
        before, after = _cover(prompt.sources[0], specs[0]), _cover(target, shown)
        if prompt.category == "swap":
            before = np.concatenate([before[:, 8:], before[:, :8]], axis=1)
        np.testing.assert_allclose(after, before, atol=0.02)
        if prompt.category == "compose":
            assert shown.paper == specs[1].paper != specs[0].paper and shown.ink == specs[0].ink


def test_a_base_sees_copies_and_other_hands_among_true_edits():
    u = uniforms(4000)
    prompts, true = edits.examples(u)
    again, flawed = edits.examples(u, flaws=True)
    assert [(p.text, p.category) for p in prompts] == [(p.text, p.category) for p in again]
    kinds = {"copied": [], "redrawn": [], "true": []}
    for row, (prompt, asked, given) in enumerate(zip(prompts, true, flawed, strict=True)):
        if np.array_equal(given, asked):
            kinds["true"].append(row)
        else:
            kinds["copied" if np.array_equal(given, prompt.sources[0]) else "redrawn"].append(row)
    for kind, share in edits.FLAWS.items():
        assert abs(len(kinds[kind]) / 4000 - share) < 0.02
    # another hand: the digits that were asked for in their colours, and other strokes
    judge = held_out_judge()
    rows = kinds["redrawn"]
    samples = [Sample(i, i, prompts[i].text, flawed[i], prompts[i].category, prompts[i].sources) for i in rows]
    specs = judge._specs(samples)
    assert judge.digits_correct(flawed[rows], specs).mean() > 0.9 and judge.correct(samples).mean() < 0.15


def test_a_condition_holds_each_source_after_its_mark_and_then_the_instruction():
    ours, by_category = make_world(World(task="edit")).family, {p.category: p for p in edits.prompts("held_out")}
    prompt = by_category["compose"]
    condition, negative = ours.condition(prompt), ours.negative(prompt)
    mark = (("text", 1), ("image", 4, 4))
    assert condition.layout == (*mark, *mark, ("text", 10)) and negative.layout == (*mark, *mark, ("text", 1))
    words = ours.words.encode
    assert torch.equal(condition.text, torch.cat([words("image 1"), words("image 2"), words(prompt.text)]))
    assert torch.equal(negative.text, torch.cat([words("image 1"), words("image 2"), words("")]))
    for one in (condition, negative):
        assert torch.equal(torch.stack(one.references), latents.encode(np.stack(prompt.sources)))
    assert ours.condition(by_category["recolour"]).layout == (*mark, ("text", 3))
    plain = Prompt(0, "a red 7")
    assert ours.condition(plain).layout == (("text", 3),) and ours.negative(plain) is ours.negative(Prompt(1, "a 1"))


def test_the_task_decides_the_built_in_prompts():
    for task, tasks in (("t2i", {"t2i"}), ("edit", {"edit"}), ("mixed", {"t2i", "edit"})):
        for split in ("train", "held_out"):
            assert {p.task for p in data(task).prompts(split)} == tasks


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "art").mkdir()
    shown = edits.prompts("held_out")[-1].sources
    for number, source in enumerate(shown):
        Image.fromarray(source).save(tmp_path / f"art/{number}.png")
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    return tmp_path


def written(folder, *rows: dict) -> str:
    (folder / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "p.jsonl")


def test_a_file_of_edits_brings_its_sources(folder):
    both = ["art/0.png", "art/1.png"]
    path = written(
        folder,
        {"text": "a red 7"},
        {"text": edits.EXAMPLES[3], "sources": both, "category": "compose"},
        {"text": "make it red", "sources": both[:1], "id": 5},
    )
    plain, compose, recolour = data("mixed").prompts("train", path)
    shown = edits.prompts("held_out")[-1].sources
    assert plain == Prompt(0, "a red 7") and recolour.id == 5 and recolour.task == "edit"
    assert compose == Prompt(FIRST_EDIT + 1, edits.EXAMPLES[3], "compose")
    assert all(np.array_equal(a, b) for a, b in zip(compose.sources, shown, strict=True))


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("edit", {"text": "make it red", "sources": ["none.png"]}, "none.png cannot be read"),
        ("edit", {"text": "make it red", "sources": ["art"]}, "cannot be read"),
        ("edit", {"text": "make it red", "sources": ["broken.png"]}, "broken.png is no image of format PNG"),
        ("edit", {"text": "make it red", "sources": ["large.png"]}, "24 x 20 pixels.*16 x 16"),
        ("edit", {"text": "make it red", "sources": "art/0.png"}, "must be a list"),
        ("edit", {"text": "make it red", "sources": ["art/0.png"] * 2}, "needs 1 source image, not 2"),
        ("edit", {"text": edits.EXAMPLES[3], "sources": ["art/0.png"]}, "needs 2 source images, not 1"),
        ("edit", {"text": "paint it red", "sources": ["art/0.png"]}, "known: make it yellow"),
        ("edit", {"text": "a red 7", "sources": ["art/0.png"]}, "leave its sources out"),
        ("edit", {"text": "a red cat"}, "'cat' is unknown"),
        ("mixed", {"text": "make it red"}, "has no sources"),
        ("t2i", {"text": "make it red"}, "has no sources"),
        ("t2i", {"text": "paint it red", "sources": ["art/0.png"]}, "known: make it yellow"),
        ("mixed", {"text": "a red cat"}, "'cat' is unknown"),
    ],
)
def test_a_bad_edit_in_a_file_is_refused_with_its_line(folder, task, row, message):
    good = {"text": "a 7"} if task == "t2i" else {"text": "make it red", "sources": ["art/0.png"]}
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{message}"):
        data(task).prompts("train", written(folder, good, row))


def test_a_task_takes_its_prompts_of_a_file_of_both(folder):
    edit = {"text": "make it red", "sources": ["art/0.png"]}
    path = written(folder, {"text": "a red 7"}, edit, {"text": "a 3"}, edit | {"text": "make it blue"})
    own = {task: data(task).prompts("train", path) for task in ("t2i", "edit", "mixed")}
    assert [p.text for p in own["t2i"]] == ["a red 7", "a 3"]
    assert [p.text for p in own["edit"]] == ["make it red", "make it blue"]
    assert own["mixed"] == [own["t2i"][0], own["edit"][0], own["t2i"][1], own["edit"][1]]  # ids stay with their lines


def test_a_file_without_a_prompt_of_the_task_is_refused_with_the_counts(folder):
    edit = {"text": "make it red", "sources": ["art/0.png"]}
    with pytest.raises(
        UserError, match="p.jsonl holds 2 prompts of task edit and none of world.task=t2i; set world.task=edit"
    ):
        data("t2i").prompts("train", written(folder, edit, edit | {"id": 5}))
    with pytest.raises(UserError, match="holds 1 prompts of task t2i and none of world.task=edit"):
        data("edit").prompts("train", written(folder, {"text": "a 7"}))
