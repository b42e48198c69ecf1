"""Per-row means over ragged token axes: the one place where packed losses and log-probabilities are reduced."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def row_mean(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Mean over each row's tokens and channels: [sum(lengths), C] -> [R], without atomics.

    lengths are on the host. A row's mean does not depend on the other rows.
    """
    if len(set(lengths)) == 1:
        return values.reshape(len(lengths), -1).mean(1)
    return torch.stack([part.mean() for part in values.split(list(lengths))]) if lengths else values.new_zeros(0)
