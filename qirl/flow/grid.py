"""The time grid of the Qwen-Image scheduler (algorithm page, section 1)."""

from __future__ import annotations

import math

import numpy as np

from qirl.config_sections import Flow


def sigmas(tokens: int, flow: Flow) -> np.ndarray:
    """flow.steps + 1 noise levels, float32, from 1 down to 0, for a target of `tokens` latent tokens.

    linspace(1, 1/N, N), shifted by mu = m * tokens + b, stretched to end at flow.terminal, 0 appended. Computed in
    float32 in this order it equals diffusers' FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=linspace(...), mu)
    in every bit; do not shift the result again.
    """
    slope = (flow.max_shift - flow.base_shift) / (flow.max_tokens - flow.base_tokens)
    mu = slope * tokens + (flow.base_shift - slope * flow.base_tokens)
    s = np.linspace(1.0, 1.0 / flow.steps, flow.steps).astype(np.float32)
    s = math.exp(mu) / (math.exp(mu) + (1 / s - 1) ** 1.0)
    if flow.terminal:
        rest = 1 - s
        s = 1 - rest / (rest[-1] / (1 - flow.terminal))
    return np.append(s, np.float32(0)).astype(np.float32)
