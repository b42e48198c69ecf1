"""How different the images of one prompt are from each other."""

from __future__ import annotations

import numpy as np

from qirl.errors import UserError


def in_group_diversity(images: np.ndarray) -> float:
    """Mean RMS pixel distance over all pairs of a prompt's images: uint8 [G, H, W, 3] -> 0 (alike) to 1.

    Raises UserError for fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"diversity needs at least 2 images of a prompt, not {len(images)}; sample more per prompt")
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    first, second = np.triu_indices(len(flat), k=1)
    return float(np.mean([np.sqrt(np.mean((flat[i] - flat[j]) ** 2)) for i, j in zip(first, second, strict=True)]))
