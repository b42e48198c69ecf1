"""One sampler step: guidance, transition and its log-probability (algorithm page, section 2).

With dt = s - t < 0, x0 = x - t v, x1 = x + (1 - t) v, z ~ N(0, 1) and t~ = t, but `cap` where t = 1:

    ode    x' = x + v dt
    sde    q = a sqrt(t / (1 - t~));  mean = x (1 + q^2 / (2t) dt) + v (1 + q^2 (1 - t) / (2t)) dt;  std = q sqrt(-dt)
    cps    q = s sin(a pi / 2);       mean = (1 - s) x0 + sqrt(s^2 - q^2) x1;                      std = q
    dance  mean = x + v dt + a^2 / 2 (x - (1 - t) x0) / t^2 dt;                                    std = a sqrt(-dt)

    guided = v- + g (v+ - v-), with norm rescale times |v+| / |guided| per token
    logp   = mean of -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2;  cps: mean of -(x' - mean)^2

Everything in float32 (float64 for float64 inputs). Bytes: x, v+, v- read and x' written; 4 * N * C * 4. Sources:
Flow-GRPO (arXiv 2505.05470), CPS (arXiv 2509.05952), DanceGRPO (arXiv 2505.07818), Qwen-Image for the rescale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.rows import row_mean

MODES = ("ode", "sde", "cps", "dance")
ODE, SDE, CPS, DANCE = range(4)


@dataclass(frozen=True)
class Step:
    """One transition of R samples: float32 [R] t, s < t and cap (the node that replaces t = 1), int64 [R] mode.

    level: the noise level a (sde, cps) or eta (dance).
    """

    t: torch.Tensor
    s: torch.Tensor
    cap: torch.Tensor
    mode: torch.Tensor
    level: float

    def rows(self, index: torch.Tensor) -> Step:
        return replace(self, t=self.t[index], s=self.s[index], cap=self.cap[index], mode=self.mode[index])


def guide(v_cond: torch.Tensor, v_uncond: torch.Tensor, guidance: float, rescale: bool) -> torch.Tensor:
    """Classifier-free guidance of [N, C] velocities, in float32."""
    dtype = compute_dtype(v_cond)
    v_cond, v_uncond = v_cond.to(dtype), v_uncond.to(dtype)
    guided = v_uncond + guidance * (v_cond - v_uncond)
    if rescale:
        guided = guided * (v_cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided


def mean_std(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [N, C] and std [R] (0 for ode) of the transition of tokens x, v [N, C]; row int64 [N] names the sample."""
    dtype = compute_dtype(x, v)
    x, v = x.to(dtype), v.to(dtype)
    t, s, cap = (p.to(dtype) for p in (step.t, step.s, step.cap))
    dt, a = s - t, step.level
    q2 = a * a * t / (1 - torch.where(t < 1, t, cap))
    kept = torch.sqrt(s * s - (s * math.sin(a * math.pi / 2)) ** 2)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    # mean = x * on_x + v * on_v, per mode; for cps and dance x0 and x1 are written out in x and v
    on_x = [one, 1 + q2 / (2 * t) * dt, (1 - s) + kept, 1 + a * a / (2 * t) * dt]
    on_v = [dt, (1 + q2 * (1 - t) / (2 * t)) * dt, kept * (1 - t) - (1 - s) * t, (1 + a * a * (1 - t) / (2 * t)) * dt]
    std = [zero, torch.sqrt(q2 * -dt), s * math.sin(a * math.pi / 2), a * torch.sqrt(-dt)]
    pick = lambda options: torch.stack(options).gather(0, step.mode[None])[0]  # noqa: E731
    on_x, on_v = pick(on_x)[row, None], pick(on_v)[row, None]
    return x * on_x + v * on_v, pick(std)


def reference(x, v_cond, v_uncond, z, row, step, guidance, rescale):
    v = v_cond.to(compute_dtype(v_cond)) if v_uncond is None else guide(v_cond, v_uncond, guidance, rescale)
    mean, std = mean_std(x, v, row, step)
    return (mean if z is None else mean + std[row, None] * z), v


def flow_step(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    row: torch.Tensor,
    step: Step,
    v_uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = False,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state and the guided velocity, both float32 [N, C].

    x, v_cond, v_uncond [N, C]; row int64 [N]; z float32 [N, C] standard normals, None for pure ode. Section 2.
    """
    run = choose("flow_step", reference=reference)
    return run(x, v_cond, v_uncond, z, row, step, guidance, rescale)


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mode: torch.Tensor, lengths: Sequence[int]):
    """Log-probability [R] of x_next [N, C] under a transition's mean [N, C] and std [R]; a mean over elements."""
    squared = row_mean((x_next.to(mean.dtype) - mean) ** 2, lengths)
    normal = -squared / (2 * std * std) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return torch.where(mode == CPS, -squared, normal)
