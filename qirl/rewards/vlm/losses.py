"""What a judge is trained on (algorithm page, section 5).

    pointwise   (R - y)^2,  R = sum_s s p(s), p renormalised over the five score tokens
    soft        KL(q || p), q the raters' distribution over 1 to 5
    pairwise    -log sigmoid(R_w - R_l) over the pairs of one prompt whose scores differ (Bradley-Terry), the baseline

and beside each: the cross-entropy of the reasoning, and -log of the five tokens' probability, without which a judge would
forget to answer with a digit. Source: Qwen-Image-2.0-RL, section 2 (pointwise, pairwise); soft labels and the rest are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def expected(logits: torch.Tensor) -> torch.Tensor:
    """R float32 [B] in [1, 5] of the score tokens' logits [B, 5]."""
    return (logits.float().softmax(-1) * torch.arange(1, 6, device=logits.device)).sum(-1)


def pointwise(logits: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """[B]; score [B] in [1, 5]."""
    return (expected(logits) - score) ** 2


def soft(logits: torch.Tensor, raters: torch.Tensor) -> torch.Tensor:
    """[B]; raters [B, 5], each row a distribution."""
    return F.kl_div(logits.float().log_softmax(-1), raters, reduction="none").sum(-1)


def pairwise(logits: torch.Tensor, winner: torch.Tensor, loser: torch.Tensor) -> torch.Tensor:
    """[pairs]; winner, loser int64 [pairs], rows of logits."""
    score = expected(logits)
    return -F.logsigmoid(score[winner] - score[loser])


def rater_distribution(score: float, spread: float | None) -> list[float]:
    """Five probabilities with mean `score`, as nearly as five bins allow, from the raters' mean and standard deviation.

    A normal density at 1 to 5 where the raters differ; without a spread the two digits next to the score share it.
    """
    if spread:
        weights = torch.exp(-((torch.arange(1, 6, dtype=torch.float64) - score) ** 2) / (2 * spread**2))
        return (weights / weights.sum()).tolist()
    low = min(4, int(score))
    return [max(0.0, 1 - abs(digit - score)) if digit in (low, low + 1) else 0.0 for digit in range(1, 6)]
