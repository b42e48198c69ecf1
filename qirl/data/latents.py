"""The digits world's autoencoder: a picture is strokes in one ink on one paper, and a token says all three of a patch.

It has what matters in a real one: fewer numbers than pixels, channels of like size, and content apart from colour, so
that what a small transformer learns of a digit in red it knows in blue. A token is a patch of 4x4 pixels in 16 channels:
how much ink covers them, in its 10 largest principal components (half whitened: the strongest first, the weakest not
drowned; 4 of 255 grey levels are lost on average), then the ink's RGB and the paper's. The colours stand in every token;
a picture whose tokens disagree shows it. A picture of more than two colours loses the others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from qirl.data import digits, edits
from qirl.data.digits import SIZE

PATCH, STROKES = 4, 10
CHANNELS = STROKES + 6
SIDE = SIZE // PATCH
TOKENS = SIDE * SIDE
SPREAD = 0.7  # standard deviation of a channel, of the strokes' on average; that of noise is 1


class _Basis(NamedTuple):
    """All float32: strokes [STROKES, 16] of a patch's coverage less `mean` [16], and back [16, STROKES]; colours less
    `middle` [6] times `size` [6]."""

    strokes: torch.Tensor
    mean: torch.Tensor
    back: torch.Tensor
    middle: torch.Tensor
    size: torch.Tensor


@lru_cache(maxsize=1)
def _basis() -> _Basis:
    """Of the generator's pictures of both tasks."""
    u = np.random.default_rng(0).random((2, 3000, digits.UNIFORMS))
    cover, colours = _separate(np.concatenate([digits.examples(u[0])[1], edits.examples(u[1])[1]]))
    patches, colours = _patches(cover).double().flatten(0, 1), colours.double()
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    variance, axes = variance[-STROKES:].flip(0), axes[:, -STROKES:].flip(1).T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    spread = SPREAD * variance**0.25 / variance.sqrt().mean().sqrt()
    strokes = axes * largest.sign() * (spread / variance.sqrt())[:, None]  # an axis has no sign of its own
    parts = strokes, patches.mean(0), torch.linalg.pinv(strokes), colours.mean(0), SPREAD / colours.std(0)
    return _Basis(*(part.float() for part in parts))


def encode(images: np.ndarray) -> torch.Tensor:
    """Pictures to latents: uint8 [B, 16, 16, 3] -> float32 [B, 16, 16], tokens row-major: strokes, ink, paper."""
    basis, (cover, colours) = _basis(), _separate(images)
    strokes = (_patches(cover) - basis.mean) @ basis.strokes.T
    return torch.cat([strokes, ((colours - basis.middle) * basis.size)[:, None].expand(-1, TOKENS, -1)], -1)


def decode(latents: torch.Tensor) -> np.ndarray:
    """Latents to pictures: [B, 16, 16] -> uint8 [B, 16, 16, 3], clamped and rounded.

    A NaN counts as 0, the middle, so that a diverged model gives a bad picture and not a crash.
    """
    assert latents.shape[1:] == (TOKENS, CHANNELS), f"latents of shape {tuple(latents.shape)}"
    basis, values = _basis(), latents.detach().float().cpu().nan_to_num(nan=0.0)
    cover = (values[..., :STROKES] @ basis.back.T + basis.mean).clamp(0, 1)[..., None]
    ink, paper = (values[..., STROKES:] / basis.size + basis.middle).clamp(0, 1)[:, :, None].split(3, -1)
    pixels = (paper + cover * (ink - paper)).mul(255).round().to(torch.uint8)
    grid = pixels.view(-1, SIDE, SIDE, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, SIZE, SIZE, 3).numpy()


def _separate(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage [B, 16, 16] and colours [B, 6] (ink, paper), float32 in [0, 1].

    Paper is the median of the border, ink the pixel farthest from it; every pixel is put on the line between the two.
    """
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3), f"{images.dtype} {images.shape}"
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)
    paper = border.median(1).values
    away = (pixels - paper[:, None, None]).flatten(1, 2)
    axis = away[torch.arange(len(away)), away.square().sum(-1).argmax(1)]
    along = (away * axis[:, None]).sum(-1) / axis.square().sum(-1).clamp(min=1e-6)[:, None]
    return along.clamp(0, 1).view(-1, SIZE, SIZE), torch.cat([paper + axis, paper], 1)


def _patches(cover: torch.Tensor) -> torch.Tensor:
    """[B, 16, 16] -> [B, tokens, 16], a patch's pixels row by row."""
    grid = cover.view(-1, SIDE, PATCH, SIDE, PATCH)
    return grid.permute(0, 1, 3, 2, 4).reshape(-1, TOKENS, PATCH * PATCH)
