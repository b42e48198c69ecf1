"""Prompt curation by the range of rewards inside a group (algorithm page, section 5).

    range = max - min of the composite reward over G images;   keep iff range > tau d2(G),  tau >= 2 read noise

d2(G) is the expected range of G standard normals, so tau does not depend on G. d2 = int 1 - F^G - (1 - F)^G dx
(Tippett 1925).
"""

from __future__ import annotations

from functools import cache

import torch

from qirl.kernels.dispatch import choose


@cache
def expected_range(group: int) -> float:
    """d2(G): 2.847 for 8, 3.258 for 12, 3.532 for 16. G >= 2."""
    x = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    below = torch.special.ndtr(x)
    return torch.trapezoid(1 - below**group - (1 - below) ** group, x).item()


def reference(composite, threshold):
    spread = composite.max(1).values - composite.min(1).values
    return spread, spread > threshold


def reward_range(composite: torch.Tensor, tau: float, read_noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Range [P] and keep bool [P] of composite rewards [P, G] on the common [0, 1] scale (never z-scored).

    Raises ValueError for groups of one image or a tau below twice the read noise.
    """
    if composite.shape[1] < 2:
        raise ValueError("a group of 1 image has no range; draw at least 2 images a prompt")
    if tau < 2 * read_noise:
        raise ValueError(f"tau={tau} is below twice the read noise {read_noise}; set it to {2 * read_noise} or more")
    run = choose("reward_range", reference=reference)
    return run(composite, tau * expected_range(composite.shape[1]))
