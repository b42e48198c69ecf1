"""Gradients of the references of flow and policy against finite differences, in float64.

Those of the model's ops are checked in test_model_ops, ratio losses and log-probabilities in test_policy_loss. nft with
x0 weights is left out: its weights are detached, so its gradient is not that of its value; test_policy_loss compares it
with the published formula.
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
    def run(x, v_cond, v_uncond, z):
        return flow_step.reference(x, v_cond, v_uncond, z, ROW, step(mode), 3.0, rescale)

    assert torch.autograd.gradcheck(run, draws(4))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nft(beta):
    _, v_old, x0, noise = (x.detach() for x in draws(4))
    r = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def run(v):
        return policy_loss.nft_reference(v, v_old, x0, noise, ROW, T, r, LENGTHS, beta, False, 1.0)

    assert torch.autograd.gradcheck(run, draws(1))


@pytest.mark.parametrize("guidance, rescale", [(1.0, False), (3.0, False), (3.0, True)])
def test_velocity_match(guidance, rescale):
    _, cond, uncond = (x.detach() for x in draws(3))

    def run(v):
        return velocity_match.reference(v, cond, uncond, guidance, rescale, LENGTHS)

    assert torch.autograd.gradcheck(run, draws(1))


def test_velocity_kl():
    reference = draws(2)[1].detach()
    assert torch.autograd.gradcheck(lambda v: policy_loss.velocity_kl(v, reference, LENGTHS), draws(1))


@pytest.mark.parametrize("mode", [SDE, DANCE])
def test_transition_kl(mode):
    _, reference, x = (x.detach() for x in draws(3))
    run = lambda v: policy_loss.transition_kl(v, reference, x, ROW, step(mode), LENGTHS)  # noqa: E731
    assert torch.autograd.gradcheck(run, draws(1))
