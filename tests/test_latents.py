"""The digits world's autoencoder: what it keeps, its channels, and pictures that no model should draw."""

import numpy as np
import pytest
import torch

from qirl.config_sections import World
from qirl.data import digits, edits, latents
from qirl.data.latents import CHANNELS, STROKES, TOKENS
from qirl.rewards.judge import held_out_judge
from qirl.rewards.protocol import Sample
from qirl.world import make_world


def uniforms(count: int) -> np.ndarray:
    """Of examples that the basis was not made of."""
    return np.random.default_rng(5).random((count, digits.UNIFORMS))


def test_channels_have_like_spread_and_strokes_are_uncorrelated():
    own = latents.encode(make_world(World(task="mixed")).data.examples(uniforms(3000))[1])
    assert own.shape == (3000, TOKENS, CHANNELS) and own.dtype == torch.float32
    spread = own.flatten(0, 1).std(0)
    assert 0.35 < spread.min() and spread.max() < 1.4
    assert spread[:STROKES].square().mean().sqrt() == pytest.approx(latents.SPREAD, rel=0.05)
    correlation = torch.corrcoef(own[..., :STROKES].flatten(0, 1).T) - torch.eye(STROKES)
    assert correlation.abs().max() < 0.1


def test_what_is_lost_is_small_and_nothing_is_lost_twice():
    _, real = digits.examples(uniforms(500))
    back = latents.decode(latents.encode(real))
    assert back.dtype == np.uint8 and np.abs(back.astype(int) - real).mean() < 5
    again = latents.decode(latents.encode(back))
    assert np.abs(again.astype(int) - back).mean() < 2  # clamping, rounding, and an ink that was nowhere whole


def test_the_judge_still_sees_the_very_glyph_in_a_picture_that_went_through():
    prompts, true = edits.examples(uniforms(400))
    images = latents.decode(latents.encode(true))
    samples = [Sample(i, i, p.text, images[i], p.category, p.sources) for i, p in enumerate(prompts)]
    assert held_out_judge().correct(samples).mean() > 0.93


def test_strokes_do_not_depend_on_colours_and_colours_stand_in_every_token():
    cover = digits.coverage(digits.glyphs("source")[0][:20], 1)
    inks, papers = np.array([[255, 255, 255], [0, 200, 40]]), np.array([[0, 0, 0], [250, 10, 200]])
    one, other = (latents.encode(digits.paint(cover, i[None].repeat(20, 0), p[None].repeat(20, 0))) for i, p in
                  zip(inks, papers, strict=True))  # fmt: skip
    assert (one - other)[..., :STROKES].abs().max() < 0.1  # colours are rounded to 8 bits
    assert (one[..., STROKES:] == one[:, :1, STROKES:]).all()
    assert not torch.allclose(one[..., STROKES:], other[..., STROKES:], atol=0.3)


def test_a_token_is_a_patch_and_tokens_run_row_by_row():
    picture = np.zeros((2, 16, 16, 3), np.uint8)
    picture[:, 5, 9] = picture[1, 5, 14] = (255, 0, 255)
    changed = (latents.encode(picture[:1]) != latents.encode(picture[1:])).any(-1)[0]
    assert changed.nonzero().tolist() == [[7]]


def test_an_empty_picture_goes_through():
    empty = np.full((1, 16, 16, 3), 90, np.uint8)
    assert np.abs(latents.decode(latents.encode(empty)).astype(int) - empty).max() <= 1


def test_decoding_clamps_what_lies_outside_and_survives_nan():
    far = torch.full((1, TOKENS, CHANNELS), float("nan"))
    grey = latents.decode(far)
    assert np.array_equal(grey, latents.decode(torch.zeros_like(far)))
    wild = 1e6 * torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    assert latents.decode(wild).shape == (1, 16, 16, 3)
