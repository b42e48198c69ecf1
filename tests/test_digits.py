import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from qirl.data import digits
from qirl.data.prompts import Prompt, load_prompts
from qirl.data.words import WordVectors, tokens
from qirl.errors import UserError
from qirl.evaluation.diversity import in_group_diversity


def test_an_image_of_one_part_is_never_in_another():
    ids = [digits.glyphs(part)[2].tolist() for part in digits.PARTS]
    assert sorted(sum(ids, [])) == list(range(1797))


def test_each_part_has_its_share_of_every_digit():
    for part, share in zip(digits.PARTS, (0.45, 0.05, 0.25, 0.25), strict=True):
        images, labels, ids = digits.glyphs(part)
        assert images.dtype == np.float32 and images.shape == (len(ids), 8, 8)
        assert images.min() == 0 and images.max() == 1
        assert np.abs(np.bincount(labels, minlength=10) - 180 * share).max() <= 4


def test_the_split_did_not_change():
    assert digits.glyphs("judge")[2][:8].tolist() == [0, 3, 4, 8, 14, 17, 23, 30]
    assert digits.glyphs("reward")[2][:4].tolist() == [1, 2, 6, 7]
    assert len(digits.glyphs("source")[2]) == 92


def test_an_unknown_part_names_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'judge'"):
        digits.glyphs("juge")


def test_every_prompt_is_parsed_back_to_itself():
    for split in ("train", "held_out"):
        for prompt in digits.prompts(split):
            spec = digits.parse(prompt.text)
            assert digits.describe(spec) == prompt.text and spec.category == prompt.category


@pytest.mark.parametrize(
    "text, spec",
    [
        ("a 7", digits.DigitSpec((7,))),
        ("a red 7", digits.DigitSpec((7,), "red", "black", "colour")),
        ("a red 7 on blue", digits.DigitSpec((7,), "red", "blue", "background")),
        ("35 in green", digits.DigitSpec((3, 5), "green", "black", "two_digits")),
        ("05 in white", digits.DigitSpec((0, 5), "white", "black", "two_digits")),
        ("35 in green on white", digits.DigitSpec((3, 5), "green", "white", "two_digits")),
        ("a blue 8 on white", digits.DigitSpec((8,), "blue", "white", "background")),
    ],
)
def test_the_grammar_reads_and_writes(text, spec):
    assert digits.parse(text) == spec and digits.describe(spec) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("a red cat", "'cat' is unknown"),
        ("a red", "has no digit"),
        ("", "has no digit"),
        ("345 in red", "has 345"),
        ("3 and 5", "'and' is unknown"),
        ("a ³", "unknown"),
        ("7 8", "has 7 and 8"),
        ("a rad 7", "did you mean 'red'"),
        ("a red 7 on blu", "did you mean 'blue'"),
        ("a black 7", "black is no ink"),
        ("a red 7 on cyan", "cyan is no paper"),
        ("a red blue 7", "two colours"),
        ("a red 7 on", "no colour after it"),
        ("a red 7 on red", "cannot be told from red paper; use white"),
        ("a 7 on white", "cannot be told from white paper"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_with_the_cause(text, message):
    with pytest.raises(UserError, match=message) as error:
        digits.parse(text)
    assert f"'{text}'" in str(error.value) and "\n" not in str(error.value)


def test_ids_are_stable_and_unique_over_both_splits():
    texts = {}
    for prompt in digits.prompts("train") + digits.prompts("held_out"):
        assert texts.setdefault(prompt.id, prompt.text) == prompt.text
    assert sorted(texts) == list(range(970)) and len(set(texts.values())) == 970
    assert digits.prompts("train")[0] == Prompt(0, "a 0", "plain")
    assert texts[340] == "10 in white"


def test_held_out_combinations_never_occur_in_train():
    train, held = digits.prompts("train"), digits.prompts("held_out")
    for category in digits.CATEGORIES:
        seen = {p.text for p in train if p.category == category}
        kept = {p.text for p in held if p.category == category}
        assert not seen & kept and 0.19 < len(kept) / len(seen | kept) < 0.21


def test_train_still_shows_every_colour_and_digit_of_a_category():
    for category in ("colour", "background", "two_digits"):  # two of the ten plain digits are held out
        specs = {split: [digits.parse(p.text) for p in digits.prompts(split) if p.category == category]
                 for split in ("train", "held_out")}  # fmt: skip
        for field in ("ink", "paper"):
            assert {getattr(s, field) for s in specs["held_out"]} <= {getattr(s, field) for s in specs["train"]}
        assert {d for s in specs["train"] for d in s.digits} == set(range(10))


def test_a_render_shows_full_ink_and_bare_paper():
    images, labels, _ = digits.glyphs("generator")
    for prompt in digits.prompts("held_out"):
        spec = digits.parse(prompt.text)
        picture = digits.render(spec, np.stack([images[labels == d][0] for d in spec.digits]))
        colours = picture.reshape(-1, 3).tolist()
        assert list(digits.INKS[spec.ink]) in colours and list(digits.PAPERS[spec.paper]) in colours


def test_two_digits_stand_in_reading_order():
    one, eight = (digits.glyphs("generator")[0][digits.glyphs("generator")[1] == d][0] for d in (1, 8))
    both = digits.render(digits.parse("18 in white"), np.stack([one, eight]))
    alone = digits.render(digits.parse("88 in white"), np.stack([eight, eight]))
    assert np.array_equal(both[:, 8:], alone[:, 8:]) and not np.array_equal(both[:, :8], alone[:, :8])


def test_an_example_depends_on_its_own_uniforms_only():
    u = np.random.default_rng(0).random((64, digits.UNIFORMS))
    texts, pictures = digits.examples(u)
    assert pictures.dtype == np.uint8 and pictures.shape == (64, 16, 16, 3)
    for row in (0, 17, 63):
        text, picture = digits.example(u[row])
        assert text == texts[row] and np.array_equal(picture, pictures[row])


def test_examples_are_generator_glyphs_drawn_as_their_text_says():
    images, labels, _ = digits.glyphs("generator")
    texts, pictures = digits.examples(np.random.default_rng(1).random((40, digits.UNIFORMS)))
    singles = [(t, p) for t, p in zip(texts, pictures, strict=True) if len(digits.parse(t).digits) == 1]
    for text, picture in singles:
        spec = digits.parse(text)
        assert any(np.array_equal(picture, digits.render(spec, g[None])) for g in images[labels == spec.digits[0]])


def test_examples_balance_the_categories_and_reach_every_glyph_and_prompt():
    u = np.random.default_rng(2).random((20000, digits.UNIFORMS))
    texts, _ = digits.examples(u)
    counts = np.unique([digits.CATEGORIES.index(digits.parse(t).category) for t in texts], return_counts=True)[1]
    assert np.abs(counts / len(u) - 0.25).max() < 0.02
    assert len(set(texts)) == 970
    largest = np.full((1, digits.UNIFORMS), np.nextafter(1.0, 0.0))
    assert digits.examples(largest)[0] == ["99 in magenta"]


def test_words_carry_their_role_so_that_order_means_nothing():
    assert tokens("a red 7 on blue") == ["a", "red", "digit:7", "on:blue"]
    assert tokens("35 in green") == ["tens:3", "units:5", "in", "green"]
    assert tokens("") == tokens("  ") == ["<null>"]


def test_word_vectors_have_unit_rms_and_differ_by_word_seed_and_dim():
    vectors = WordVectors(64, seed=3)
    encoded = vectors.encode("a red 7 on blue")
    assert encoded.shape == (4, 64) and encoded.dtype == torch.float32
    torch.testing.assert_close(encoded.square().mean(-1), torch.ones(4))
    assert (encoded @ encoded.T / 64 - torch.eye(4)).abs().max() < 0.5
    assert torch.equal(vectors.encode("red")[0], encoded[1])
    assert not torch.equal(WordVectors(64, seed=4).encode("red"), vectors.encode("red"))


def test_word_vectors_are_the_same_in_another_process():
    code = "from qirl.data.words import WordVectors; print(WordVectors(8, 5).encode('35 in red').tolist())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == WordVectors(8, 5).encode("35 in red").tolist()


def test_prompt_files_are_read(tmp_path):
    (tmp_path / "p.txt").write_text("a red 7\n\n  35 in green \n")
    assert load_prompts(tmp_path / "p.txt") == [Prompt(0, "a red 7"), Prompt(1, "35 in green")]
    (tmp_path / "p.jsonl").write_text('{"text": "a 7", "category": "plain", "id": 12}\n{"text": "a 8"}\n')
    assert load_prompts(tmp_path / "p.jsonl") == [Prompt(12, "a 7", "plain"), Prompt(1, "a 8")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.csv", "a 7", ".txt .one a line., .jsonl"),
        ("p.jsonl", '{"text": "a 7"}\n{"text": ', "p.jsonl:2: not JSON"),
        ("p.jsonl", '{"txt": "a 7"}', 'p.jsonl:1: no "text"'),
        ("p.jsonl", '["a 7"]', "p.jsonl:1: a list, not an object"),
        ("p.jsonl", '{"text": "a 7", "colour": 1}', "unknown key 'colour'"),
        ("p.jsonl", '{"text": "a 7", "id": "x"}', "must be an integer"),
        (
            "p.jsonl",
            '{"text": "a 7", "id": 1}\n\n{"text": "a 8", "id": 1}',
            "p.jsonl:3: id 1 is taken by line 1",
        ),
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_a_missing_prompt_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(tmp_path / "none.txt")


def test_diversity_is_the_mean_distance_of_pairs():
    images = np.zeros((3, 16, 16, 3), np.uint8)
    images[2] = 255
    assert in_group_diversity(images) == pytest.approx(2 / 3)
    assert in_group_diversity(images[:2]) == 0
    with pytest.raises(UserError, match="at least 2 images"):
        in_group_diversity(images[:1])
