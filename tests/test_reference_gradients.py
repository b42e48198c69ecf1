"""Gradients of the references of flow and policy against finite differences, in float64.

Those of the model's ops are checked in test_model_ops, log-probabilities in test_policy_loss. nft with x0 weights is left
out: its weights are detached, so its gradient is not that of its value; test_policy_loss compares it with the published
formula.
"""

import pytest
import torch

from qirl.kernels import flow_step, policy_loss, velocity_match
from qirl.kernels.flow_step import CPS, DANCE, ODE, SDE, Step

LENGTHS, CHANNELS = (3, 1, 2), 4
ROW = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
T = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)  # the first is the node that `cap` replaces


def draws(count):
    generator = torch.Generator().manual_seed(0)
    shape = sum(LENGTHS), CHANNELS
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


def step(mode):
    s = torch.tensor([0.9, 0.45, 0.1], dtype=torch.float64)
    return Step(T, s, torch.full((3,), 0.9, dtype=torch.float64), torch.full((3,), mode), 0.7)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", [ODE, SDE, CPS, DANCE])
def test_flow_step(mode, rescale):
    def run(x, v_cond, v_uncond):
        nothing = (None, None, torch.float64)  # noise, lengths, storage
        return flow_step.reference(x, v_cond, v_uncond, ROW, step(mode), 3.0, rescale, *nothing)[0]

    assert torch.autograd.gradcheck(run, draws(3))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nft_and_the_distance_to_the_base(beta):
    _, v_old, x0, noise, v_ref = (x.detach() for x in draws(5))
    r = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def run(v):
        return policy_loss.nft_reference(v, v_old, x0, noise, v_ref, ROW, T, r, LENGTHS, beta, False, 1.0)

    assert torch.autograd.gradcheck(run, draws(1))


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("mode", [SDE, CPS, DANCE])
def test_ratio_losses_and_the_distance_to_the_base(mode, guard):
    if guard and mode == CPS:
        pytest.skip("guard needs a density")
    v, v_old, x, x_next, v_ref = (x.detach() for x in draws(5))
    v_old, advantage = v + 0.05 * v_old, torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)

    def run(v):
        clip = (0.9, 1e9, guard)  # none of the pairs is clipped
        return policy_loss.ratio_reference(v, v_old, x, x_next, v_ref, ROW, step(mode), advantage, LENGTHS, *clip)[:2]

    assert torch.autograd.gradcheck(run, draws(1))


@pytest.mark.parametrize("guidance, rescale", [(1.0, False), (3.0, False), (3.0, True)])
def test_velocity_match(guidance, rescale):
    _, cond, uncond = (x.detach() for x in draws(3))

    def run(v):
        return velocity_match.reference(v, cond, uncond, ROW, LENGTHS, guidance, rescale)

    assert torch.autograd.gradcheck(run, draws(1))
