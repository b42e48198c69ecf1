"""The digits world's autoencoder: patches of 4x4 pixels in their 24 largest principal components, whitened.

It is linear, so it has the two properties that matter in a real one: fewer numbers than pixels (a picture keeps 16 tokens
of 24 channels; what is lost is 7 of 255 grey levels on average), and channels of equal size. In raw pixels the colours
have ten times the spread of the strokes' outlines, and flow matching learns those last.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from qirl.data import digits, edits
from qirl.data.digits import SIZE

PATCH, CHANNELS = 4, 24
SIDE = SIZE // PATCH
TOKENS = SIDE * SIDE
SPREAD = 0.5**0.5  # standard deviation of every channel; that of noise is 1


@lru_cache(maxsize=1)
def _basis() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [CHANNELS, 48] that whitens a patch of the generator's pictures of both tasks, and its mean [48]."""
    u = np.random.default_rng(0).random((2, 3000, digits.UNIFORMS))
    pictures = np.concatenate([digits.examples(u[0])[1], edits.examples(u[1])[1]])
    patches = _patches(pictures).double().flatten(0, 1)
    mean = patches.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    variance, axes = variance[-CHANNELS:].flip(0), axes[:, -CHANNELS:].flip(1).T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    whiten = axes * largest.sign() * (SPREAD / variance.sqrt())[:, None]  # an axis has no sign of its own
    return whiten.float(), mean.float()


@lru_cache(maxsize=1)
def _inverse() -> torch.Tensor:
    """float32 [48, CHANNELS]: back from channels to a patch."""
    return torch.linalg.pinv(_basis()[0].double()).float()


def encode(images: np.ndarray) -> torch.Tensor:
    """Pictures to latents: uint8 [B, 16, 16, 3] -> float32 [B, 16, 24], tokens row-major, the strongest channel first."""
    whiten, mean = _basis()
    return (_patches(images) - mean) @ whiten.T


def decode(latents: torch.Tensor) -> np.ndarray:
    """Latents to pictures: [B, 16, 24] -> uint8 [B, 16, 16, 3], clamped and rounded.

    A NaN becomes mid-grey, so that a diverged model gives a bad picture and not a crash.
    """
    assert latents.shape[1:] == (TOKENS, CHANNELS), f"latents of shape {tuple(latents.shape)}"
    patches = latents.detach().float().cpu() @ _inverse().T + _basis()[1]
    values = patches.nan_to_num(nan=0.0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    grid = values.view(-1, SIDE, SIDE, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, SIZE, SIZE, 3).numpy()


def _patches(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 16, 16, 3] -> float32 [B, 16, 48] in [-1, 1], a patch's pixels ordered (row, column, RGB)."""
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3), f"{images.dtype} {images.shape}"
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float().div(127.5).sub(1)
    patches = pixels.view(-1, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, TOKENS, PATCH * PATCH * 3)
