import math

import numpy as np
import pytest
import torch

from qirl.data.digits import CATEGORIES, INKS, PAPERS, UNIFORMS, examples, glyphs, parse, prompts, render
from qirl.errors import UserError
from qirl.rewards import digits as rewards_module
from qirl.rewards.digit_reader import DigitReader, train_reader
from qirl.rewards.digits import DigitRewards, ink_quality
from qirl.rewards.judge import JUDGE, Judge
from qirl.rewards.protocol import Sample
from qirl.rewards.scorer import score


@pytest.fixture(scope="module")
def reader():
    """A short training; the real ones see three to four times as many pictures."""
    return train_reader("reward", seed=0, members=1, steps=400, width=20)


def pictures(part: str, count: int, seed: int = 0):
    """Renders of one part's glyphs for prompts of all categories in turn, and what they show."""
    images, labels, _ = glyphs(part)
    draw = np.random.default_rng(seed)
    by_category = [[p.text for p in prompts("held_out") if p.category == category] for category in CATEGORIES]
    specs = [parse(draw.choice(by_category[i % len(CATEGORIES)])) for i in range(count)]
    drawn = [
        render(spec, np.stack([images[draw.choice(np.flatnonzero(labels == d))] for d in spec.digits]))
        for spec in specs
    ]
    return np.stack(drawn), specs


def blurred(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return np.rint(sum(padded[:, i : i + 16, j : j + 16] for i in range(3) for j in range(3)) / 9).astype(np.uint8)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def ask(reader: DigitReader, texts: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    samples = [Sample(i, i, text, image) for i, (text, image) in enumerate(zip(texts, images, strict=True))]
    scores = score([DigitRewards(reader)], samples)
    return {name: np.array([row.get(name, math.nan) for row in scores]) for name in ("digit", "attribute", "ink")}


def test_a_shortly_trained_reader_reads_unseen_handwriting(reader):
    images, specs = pictures("judge", 800)
    judge = Judge(reader)
    right = judge.digits_correct(images, specs)
    single = np.array([len(spec.digits) == 1 for spec in specs])
    assert right[single].mean() > 0.92
    assert right[~single].mean() > 0.75
    assert judge.attributes_correct(images, specs).mean() > 0.95


def test_probabilities_are_float32_and_sum_to_one_whatever_the_batch(reader):
    images = np.concatenate([pictures("judge", 290)[0], noise(10)])
    answers = reader.read(images)
    sizes = {"count": 2, "first": 10, "second": 10, "ink": len(INKS), "paper": len(PAPERS)}
    assert {name: answer.shape for name, answer in answers.items()} == {n: (300, k) for n, k in sizes.items()}
    for name, answer in answers.items():
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(reader.read(images[255:258])[name], answer[255:258], atol=1e-5)
        assert reader.read(images[:0])[name].shape == (0, sizes[name])


def test_noise_is_not_read_as_a_digit_with_confidence(reader):
    assert reader.read(noise(200))["first"].max(-1).mean() < 0.6


def test_training_is_the_same_for_the_same_seed():
    images = pictures("judge", 8)[0]
    first, again, other = (train_reader("judge", seed, 2, 5, 8, 5).read(images)["first"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_training_leaves_the_global_random_state_and_thread_count_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train_reader("judge", 1, 1, 2, 4)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_a_saved_reader_reads_the_same(reader, tmp_path):
    reader.save(tmp_path / "reader.safetensors")
    images = pictures("judge", 8)[0]
    loaded = DigitReader.load(tmp_path / "reader.safetensors")
    assert np.array_equal(loaded.read(images)["ink"], reader.read(images)["ink"])


def test_a_damaged_reader_file_is_refused(reader, tmp_path):
    path = tmp_path / "reader.safetensors"
    with pytest.raises(UserError, match="delete it"):
        DigitReader.load(path)
    reader.save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded"):
            DigitReader.load(path)


def test_a_trained_reader_is_cached_until_its_arguments_change(tmp_path, monkeypatch):
    small = {"part": "reward", "seed": 1, "members": 1, "steps": 2, "width": 4, "kernel": 3}
    monkeypatch.setattr(rewards_module, "REWARD", small)
    rewards_module.reward_reader(tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    written = path.stat().st_mtime_ns
    rewards_module.reward_reader(tmp_path / "new")
    assert [path] == list((tmp_path / "new").iterdir()) and path.stat().st_mtime_ns == written
    monkeypatch.setattr(rewards_module, "REWARD", {**small, "seed": 2})
    rewards_module.reward_reader(tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_an_unwritable_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_module, "REWARD", {**rewards_module.REWARD, "members": 1, "steps": 1, "width": 4})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a writable folder"):
        rewards_module.reward_reader(tmp_path / "file")


def test_reward_and_judge_share_neither_handwriting_nor_seed_nor_shape():
    for argument in ("part", "seed", "width", "kernel"):
        assert rewards_module.REWARD[argument] != JUDGE[argument]
    assert "generator" not in (rewards_module.REWARD["part"], JUDGE["part"])


def test_the_right_digit_scores_above_a_wrong_one(reader):
    texts, images = examples(np.random.default_rng(3).random((200, UNIFORMS)))
    other = [text.translate(str.maketrans("0123456789", "1234567890")) for text in texts]
    right, wrong = ask(reader, texts, images)["digit"], ask(reader, other, images)["digit"]
    assert np.median(right) > 0.8 and np.median(wrong) < 0.2
    assert (right > wrong).mean() > 0.9


def test_one_right_digit_of_two_lies_between_none_and_both(reader):
    texts = [f"{a}{b} in white" for a in (1, 2) for b in range(10)]
    images, labels, _ = glyphs("generator")
    firsts = [images[labels == d][0] for d in range(10)]
    drawn = np.stack([render(parse(t), np.stack([firsts[int(t[0])], firsts[int(t[1])]])) for t in texts])
    half = [f"{t[0]}{(int(t[1]) + 3) % 10}{t[2:]}" for t in texts]
    none = [f"{(int(t[0]) + 4) % 10}{(int(t[1]) + 3) % 10}{t[2:]}" for t in texts]
    both_right, one_right, all_wrong = (ask(reader, asked, drawn)["digit"].mean() for asked in (texts, half, none))
    assert both_right > one_right + 0.2 > all_wrong + 0.3


def test_the_wrong_count_scores_low(reader):
    images = np.stack([render(parse("a 3"), glyphs("judge")[0][glyphs("judge")[1] == 3][:1])] * 2)
    scores = ask(reader, ["a 3", "33 in white"], images)["digit"]
    assert scores[0] > 0.7 and scores[1] < 0.45


def test_wrong_colours_score_low_and_a_plain_prompt_has_no_attribute(reader):
    images, labels, _ = glyphs("judge")
    picture = render(parse("a red 7 on yellow"), images[labels == 7][:1])
    texts = ["a red 7 on yellow", "a blue 7 on yellow", "a red 7 on white", "a 7"]
    scores = ask(reader, texts, np.stack([picture] * 4))["attribute"]
    assert scores[0] > 0.8 and scores[1] < 0.35 and scores[2] < 0.35 and math.isnan(scores[3])
    assert "attribute" not in score([DigitRewards(reader)], [Sample(0, 0, "a 7", picture)])[0]


def test_ink_falls_from_real_to_blurred_to_noise():
    images, specs = pictures("generator", 400)
    washed = np.stack([render_mix(image, spec, 0.8) for image, spec in zip(images, specs, strict=True)])
    real, soft, pale = (ink_quality(i, specs) for i in (images, blurred(images), washed))
    assert real.mean() > 0.95 and np.percentile(real, 1) > 0.8
    assert 0.1 < soft.mean() < 0.6 and 0.3 < pale.mean() < 0.8
    assert ink_quality(noise(400), specs).max() < 0.2


def render_mix(image: np.ndarray, spec, strength: float) -> np.ndarray:
    return np.rint(strength * image + (1 - strength) * np.array(PAPERS[spec.paper])).astype(np.uint8)


@pytest.mark.parametrize("fill", ["paper", "ink", "grey", "checkers", "dots", "speckled paper"])
def test_ink_is_not_given_for_pictures_without_strokes(fill):
    for text in ("a 7", "a red 7 on blue", "35 in green"):
        spec = parse(text)
        ink, paper = np.array(INKS[spec.ink]), np.array(PAPERS[spec.paper])
        draw = np.random.default_rng(0).random((16, 16, 1))
        row, column = np.indices((16, 16))[..., None]
        cover = {
            "paper": 0 * draw,
            "ink": 0 * draw + 1,
            "grey": 0 * draw + 0.3,
            "checkers": (row + column) % 2,
            "dots": (row % 2 == 0) & (column % 2 == 0),
            "speckled paper": draw < 0.3,
        }[fill]
        picture = np.rint(paper + cover * (ink - paper)).astype(np.uint8)
        assert ink_quality(picture[None], [spec])[0] < 0.2


def test_ink_falls_as_isolated_dots_are_added():
    picture = render(parse("a 1"), glyphs("generator")[0][glyphs("generator")[1] == 1][:1])
    values = [ink_quality(picture[None], [parse("a 1")])[0]]
    for place in range(0, 16, 3):
        picture[place, 0] = picture[place, 15] = 255
        values.append(ink_quality(picture[None], [parse("a 1")])[0])
    assert values[0] > 0.9 and values[-1] < 0.2 and all(np.diff(values) <= 0)


def test_every_score_is_in_range_for_any_picture(reader):
    texts = ["a 7", "a red 7 on blue", "35 in green", "a white 3 on red"] * 25
    for images in (
        noise(100),
        np.zeros((100, 16, 16, 3), np.uint8),
        np.full((100, 16, 16, 3), 255, np.uint8),
    ):
        scores = ask(reader, texts, images)
        for name in ("digit", "ink"):
            assert np.isfinite(scores[name]).all() and scores[name].min() >= 0 and scores[name].max() <= 1


def test_no_samples_give_no_scores(reader):
    assert DigitRewards(reader)([]) == []


def test_a_prompt_without_digit_and_a_picture_of_another_size_are_refused(reader):
    with pytest.raises(UserError, match="no digit"):
        ask(reader, ["a red"], noise(1))
    with pytest.raises(UserError, match="pictures, not uint8"):
        ask(reader, ["a 7"], np.zeros((1, 32, 32, 3), np.uint8))
