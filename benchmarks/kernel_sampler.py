"""The sampler's and the losses' ops in the kernel benchmark: latents of 64 channels, groups of 16 samples.

No other project has them as one op: the baselines are the references, eager and compiled. Their noise comes from our own
fused op, which favours them.
"""

from __future__ import annotations

import torch
from kernel_ops import ROWS, SAMPLER_TESTS, Goal, Model, Op, Work, draw, rows_of

from qirl.kernels import flow_step, group_advantage, policy_loss, velocity_match
from qirl.kernels.philox import stream

LATENTS = (Model("latents", 64, 1),)
GROUP = 16
F32 = torch.float32


def _steps(device: str) -> flow_step.Step:
    t = torch.linspace(1, 0.3, ROWS, device=device)
    mode = torch.full((ROWS,), flow_step.SDE, device=device)
    return flow_step.Step(t, t - 0.08, torch.full_like(t, 0.93), mode, 0.7)


def _lengths(tokens: int) -> tuple[int, ...]:
    return (tokens // ROWS,) * ROWS


def _flow_step(tokens: int, model: Model, device: str) -> Work:
    shape, row, step = (tokens, model.width), rows_of(tokens, device), _steps(device)
    x, v, twin = *draw(shape, device=device, dtype=F32), *_velocities(shape, shape, device=device)
    draws = stream(1, list(range(ROWS)), [0] * ROWS, 0, device)
    noise = flow_step.Noise(draws, torch.arange(tokens, device=device) % (tokens // ROWS), 3)

    def run(x, v, twin):
        return flow_step.flow_step(x, v, row, step, twin, 4.0, False, noise)[0]

    def reference(x, v, twin):
        return flow_step.reference(x, v, twin, row, step, 4.0, False, noise, None, F32)[0]

    return Work(run, reference, [x, v, twin], 2 * x.nbytes + 2 * v.nbytes)


def _velocities(*shapes, device: str) -> list[torch.Tensor]:
    """In bfloat16, as a model gives them on a GPU; on a CPU in float32."""
    return draw(*shapes, device=device, dtype=F32 if device == "cpu" else torch.bfloat16)


def _pairs(tokens: int, model: Model, device: str):
    """row, velocities (v, v_old, v_ref), two states in float32, a number a pair, lengths."""
    shape = (tokens, model.width)
    v, away, ref = _velocities(shape, shape, shape, device=device)
    states = draw(shape, shape, device=device, dtype=F32)
    share = torch.linspace(0, 1, ROWS, device=device)
    return rows_of(tokens, device), (v, v + 0.05 * away, ref), states, share, _lengths(tokens)


def _nft(tokens: int, model: Model, device: str) -> Work:
    row, (v, old, _), (x0, noise), r, lengths = _pairs(tokens, model, device)
    t = _steps(device).t
    run = lambda v: policy_loss.nft(v, old, x0, noise, row, t, r, lengths, 1.0, True, 5.0)[0]  # noqa: E731
    reference = lambda v: policy_loss.nft_reference(  # noqa: E731
        v, old, x0, noise, None, row, t, r, lengths, 1.0, True, 5.0
    )[0]
    moved = 2 * v.nbytes + 2 * x0.nbytes
    return Work(run, reference, [v], moved, moved + v.nbytes, constants=[old, x0, noise])


def _policy_ratio(tokens: int, model: Model, device: str) -> Work:
    row, (v, old, ref), (x, x_next), share, lengths = _pairs(tokens, model, device)
    step, advantage = _steps(device), 4 * share - 2
    rest = step, advantage, lengths, 1e-2, 1e-2, True
    run = lambda v: policy_loss.policy_ratio(v, old, x, x_next, row, *rest, v_ref=ref)[:2]  # noqa: E731
    reference = lambda v: policy_loss.ratio_reference(v, old, x, x_next, ref, row, *rest)[:2]  # noqa: E731
    moved = 3 * v.nbytes + 2 * x.nbytes
    return Work(run, reference, [v], moved, moved + v.nbytes, constants=[old, ref, x, x_next])


def _velocity_match(tokens: int, model: Model, device: str) -> Work:
    row, (v, cond, twin), _, _, lengths = _pairs(tokens, model, device)
    run = lambda v: velocity_match.velocity_match(v, cond, lengths, twin, 4.0, False, row)  # noqa: E731
    reference = lambda v: velocity_match.reference(v, cond, twin, row, lengths, 4.0, False)  # noqa: E731
    return Work(run, reference, [v], 3 * v.nbytes, 4 * v.nbytes, constants=[cond, twin])


def _group_advantage(tokens: int, model: Model, device: str) -> Work:
    """`tokens` samples of three rewards."""
    scores, weights = (torch.rand(tokens, 3, device=device, dtype=torch.float64) for _ in range(2))
    applies, group = torch.ones_like(scores, dtype=torch.bool), torch.arange(tokens, device=device) // GROUP
    floors, scale = scores.new_full((3,), 0.005), scores.new_ones(tokens)
    run = lambda s: group_advantage.group_advantage(s, applies, group, weights)[0]  # noqa: E731
    reference = lambda s: group_advantage.reference(  # noqa: E731
        s, applies, group, weights, floors, 0.005, 5.0, "per_reward", scale
    )[0]
    moved = 2 * scores.nbytes + applies.nbytes + group.nbytes + 5 * tokens
    return Work(run, reference, [scores], moved, constants=[weights, applies, group])


OPS: dict[str, Op] = {
    "flow_step": Op(_flow_step, Goal(0.85), SAMPLER_TESTS, LATENTS),
    "nft": Op(_nft, Goal(0.85), SAMPLER_TESTS, LATENTS),
    "policy_ratio": Op(_policy_ratio, Goal(0.85), SAMPLER_TESTS, LATENTS),
    "velocity_match": Op(_velocity_match, Goal(0.85), SAMPLER_TESTS, LATENTS),
    "group_advantage": Op(_group_advantage, Goal(0.85), SAMPLER_TESTS, LATENTS),
}
