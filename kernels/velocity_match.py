"""On-policy distillation loss of one node (algorithm page, section 6).

    u = guided teacher velocity;   L = |v - u|^2, a mean over a sample's elements

Bytes: v and the teacher's two velocities read; 3 * N * C * itemsize. Source: Qwen-Image-2.0-RL, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.flow_step import guide
from qirl.kernels.rows import row_mean


def reference(v, teacher_cond, teacher_uncond, guidance, rescale, lengths):
    dtype = compute_dtype(v)
    # at guidance 1 the teacher is its conditional velocity; v- + (v+ - v-) would differ from v+ by rounding
    plain = teacher_uncond is None or guidance == 1.0
    u = teacher_cond if plain else guide(teacher_cond, teacher_uncond, guidance, rescale)
    return row_mean((v.to(dtype) - u.detach().to(dtype)) ** 2, lengths)


def velocity_match(
    v: torch.Tensor,
    teacher_cond: torch.Tensor,
    lengths: Sequence[int],
    teacher_uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = False,
) -> torch.Tensor:
    """Loss per sample [R] in float32; v, teacher_* [N, C]. Gradient in v only."""
    run = choose("velocity_match", reference=reference)
    return run(v, teacher_cond, teacher_uncond, guidance, rescale, lengths)
