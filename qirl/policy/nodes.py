"""Which nodes of a sample's grid are trained (algorithm page, section 3)."""

from __future__ import annotations

import torch

from qirl.config_sections import Timesteps
from qirl.kernels.philox import NODES, Stream, uniform


def draw_nodes(stream: Stream, grid: torch.Tensor, options: Timesteps, last_step: bool) -> list[tuple[int, ...]]:
    """`count` nodes per sample without replacement, probability proportional to t^power, sorted.

    grid float32 [R, steps + 1]. Never the last fraction `skip_last`; the final step only if `last_step` (it is ode,
    which grpo and guard cannot train). A pure function of the stream: prompt, sample and iteration.
    """
    steps = grid.shape[1] - 1
    allowed = min(options.trainable(steps), steps if last_step else steps - 1)
    # the `count` largest of u^(1/w) are a draw without replacement with weights w (Efraimidis and Spirakis 2006)
    u = uniform(stream, allowed, 0, NODES).cpu()
    keys = torch.log(u) / grid[:, :allowed].double().cpu() ** options.power
    return [tuple(sorted(row)) for row in keys.topk(options.count, dim=1).indices.tolist()]
