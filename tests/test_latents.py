"""The digits world's autoencoder: what it keeps, its channels, and pictures that no model should draw."""

import numpy as np
import torch

from qirl.config_sections import World
from qirl.data import latents
from qirl.data.world import make_world
from qirl.rewards.protocol import Sample


def pictures(count: int, task: str = "mixed"):
    """Pictures that the basis was not made of, as the autoencoder gives them back, with their prompts."""
    prompts, own = make_world(World(task=task)).training_examples(np.random.default_rng(5).random((count, 5)))
    return prompts, own


def test_channels_have_one_spread_and_are_uncorrelated():
    _, own = pictures(3000)
    covariance = torch.cov(own.flatten(0, 1).T)
    assert own.shape == (3000, 16, 24) and own.dtype == torch.float32
    assert (covariance - 0.5 * torch.eye(24)).abs().max() < 0.05


def test_what_is_lost_is_small_and_nothing_is_lost_twice():
    from qirl.data import digits

    _, real = digits.examples(np.random.default_rng(5).random((500, 5)))
    back = latents.decode(latents.encode(real))
    assert back.dtype == np.uint8 and np.abs(back.astype(int) - real).mean() < 6
    assert (latents.encode(back) - latents.encode(real)).abs().mean() < 0.03  # clamping and rounding only


def test_the_judge_still_sees_the_very_glyph_in_a_picture_that_went_through():
    prompts, own = pictures(400, "edit")
    images = latents.decode(own)
    samples = [Sample(i, i, p.text, images[i], p.category, p.sources) for i, p in enumerate(prompts)]
    assert make_world(World()).judge().correct(samples).mean() > 0.93


def test_a_token_is_a_patch_and_tokens_run_row_by_row():
    picture = np.zeros((2, 16, 16, 3), np.uint8)
    picture[1, 5, 14] = (255, 0, 255)
    changed = (latents.encode(picture[:1]) != latents.encode(picture[1:])).any(-1)[0]
    assert changed.nonzero().tolist() == [[7]]


def test_decoding_clamps_what_lies_outside_and_survives_nan():
    far = torch.full((1, 16, 24), float("nan"))
    assert set(latents.decode(far).ravel().tolist()) == {128}
    assert set(latents.decode(1e6 * torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))).ravel()) <= {0, 255}
