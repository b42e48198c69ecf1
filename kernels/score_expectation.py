"""Reading a pointwise judge: the expected score over the five score tokens (algorithm page, section 5).

    R = sum_s s p(s), s in 1..5, p renormalised over the five;   r = (R - 1) / 4 in [0, 1]

NaN where the five tokens hold less than `min_mass` of the probability: a failed reading is never a 0.
Source: Qwen-Image-2.0-RL, section 2 (expectation); the mass test is ours.
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose


def reference(log_probs, min_mass):
    p = log_probs.double().exp()
    mass = p.sum(-1)
    expected = (p * torch.arange(1, 6, device=p.device)).sum(-1) / mass.clamp_min(1e-300)
    return torch.where(mass >= min_mass, expected, torch.nan).float()


def score_expectation(log_probs: torch.Tensor, min_mass: float = 0.5) -> torch.Tensor:
    """Expected Likert score float32 [...] in [1, 5], or NaN; log_probs [..., 5] of the tokens 1 to 5."""
    return choose("score_expectation", reference=reference)(log_probs, min_mass)


def likert_to_unit(score: torch.Tensor | float) -> torch.Tensor | float:
    """r = (R - 1) / 4."""
    return (score - 1) / 4
