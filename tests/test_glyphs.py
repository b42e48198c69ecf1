"""The embedding of glyph instances: the same image in another rendering is near, another image of its digit is not."""

import numpy as np
import pytest
import torch

from qirl.data.digits import INKS, PAPERS, PARTS, bank, glyphs, paint
from qirl.errors import UserError
from qirl.rewards.glyphs import REWARD, GlyphEmbedding, places, plane, reward_embedding, train_embedding
from qirl.run.cache import folder


@pytest.fixture(scope="module")
def embedding() -> GlyphEmbedding:
    return reward_embedding(folder())


def images_of(part: str, each: int) -> np.ndarray:
    """Places of `each` images of every digit, digit by digit."""
    labels = glyphs(part)[1]
    return np.concatenate([np.flatnonzero(labels == digit)[:each] for digit in range(10)])


def blurred(covers: np.ndarray) -> np.ndarray:
    height, width = covers.shape[1:]
    padded = np.pad(covers, ((0, 0), (1, 1), (1, 1)))
    return sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9


@pytest.mark.parametrize("size", ["single", "half"])
def test_unseen_handwriting_is_known_again_in_other_renderings(embedding, size):
    covers = getattr(bank("generator"), size)[images_of("generator", 20)]
    draw = np.random.default_rng(0)
    renderings = {
        "same": covers,
        "noisy": np.clip(covers + 0.08 * draw.standard_normal(covers.shape), 0, 1),
        "softer": 0.5 * covers + 0.5 * blurred(covers),
        "bolder": covers**0.6,
        "thinner": covers**1.6,
        "fainter": 0.8 * covers,
    }
    for name, rendered in renderings.items():
        assert embedding.identity(rendered.astype(np.float32), covers).mean() > 0.9, name


@pytest.mark.parametrize("size", ["single", "half"])
def test_another_image_of_the_digit_is_another_glyph_and_another_digit_even_more_so(embedding, size):
    covers = getattr(bank("generator"), size)[images_of("generator", 20)]
    other = embedding.identity(covers.reshape(10, 20, *covers.shape[1:])[:, ::-1].reshape(covers.shape), covers)
    digit = embedding.identity(np.roll(covers, 20, axis=0), covers)
    assert digit.mean() < 0.1 < other.mean() + 0.05 < 0.3


def test_a_partly_lost_glyph_lies_between_and_the_more_is_lost_the_lower(embedding):
    covers = bank("generator").single[images_of("generator", 20)]
    means = []
    for rows in (0, 1, 2, 4, 8):
        erased = covers.copy()
        erased[:, 8 - rows // 2 : 8 + (rows + 1) // 2] = 0
        means.append(float(embedding.identity(erased, covers).mean()))
    assert all(np.diff(means) < 0) and means[0] > 0.9 and 0.3 < means[2] < 0.9 and means[-1] < 0.4


def test_a_blend_is_neither_sure_nor_hopeless_so_that_a_policy_has_somewhere_to_go(embedding):
    covers = bank("generator").single[images_of("generator", 20)]
    other = np.roll(covers.reshape(10, 20, 16, 16), 1, axis=1).reshape(covers.shape)
    shares = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    means = [float(embedding.identity((1 - s) * covers + s * other, covers).mean()) for s in shares]
    assert all(np.diff(means) < 0) and np.abs(np.diff(means)).max() < 0.5 and 0.2 < means[3] < 0.7


def test_the_plane_of_a_picture_is_its_coverage_in_any_colours():
    covers = bank("judge").single
    for ink, paper in (("white", "black"), ("red", "white"), ("cyan", "red"), ("white", "yellow")):
        pictures = paint(covers, np.array(INKS[ink]), np.array(PAPERS[paper]))
        assert np.abs(plane(pictures) - covers).mean() < 0.01


def test_an_ugly_picture_has_a_plane_too():
    noise = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3)).astype(np.uint8)
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None] * 16, (1, 16, 16, 3))
    for pictures in (noise, ramp, noise // 64, np.full((1, 16, 16, 3), 255, np.uint8)):
        found = plane(pictures)
        assert found.dtype == np.float32 and found.shape == (len(pictures), 16, 16)
        assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


def test_places_cut_a_picture_into_its_glyphs():
    two = np.concatenate(list(bank("judge").half[:2]), axis=-1)[None]
    assert np.array_equal(places(two, 2)[:, 0], bank("judge").half[:2]) and np.array_equal(places(two, 1)[0], two)


def test_training_is_the_same_for_the_same_seed_and_leaves_the_global_state_alone():
    covers, before, threads = bank("judge").single[:8], torch.get_rng_state(), torch.get_num_threads()
    first, again, other = (train_embedding("reward", seed, 3).embed(covers) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_the_embedding_sees_the_reward_part_only():
    assert REWARD["part"] == "reward" and REWARD["part"] in PARTS


def test_a_saved_embedding_embeds_the_same_and_a_damaged_file_is_refused(embedding, tmp_path):
    path = tmp_path / "embedding.safetensors"
    with pytest.raises(UserError, match="delete it"):
        GlyphEmbedding.load(path)
    embedding.save(path)
    covers = bank("judge").half[:8]
    assert np.array_equal(GlyphEmbedding.load(path).embed(covers), embedding.embed(covers))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded"):
            GlyphEmbedding.load(path)
