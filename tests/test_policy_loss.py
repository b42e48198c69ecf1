"""The losses of section 3 and 6 against written-out formulas, closed forms and finite differences."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from qirl.kernels import policy_loss
from qirl.kernels.flow_step import CPS, DANCE, SDE, Noise, Step, flow_step, log_prob, mean_std
from qirl.kernels.philox import stream
from qirl.kernels.velocity_match import velocity_match

LENGTHS = (3, 5, 2)
CHANNELS = 4
ROW = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
EXACT = dict(atol=1e-12, rtol=1e-12)  # float64, another order of the same sums


def tensors(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(LENGTHS), CHANNELS, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def step(mode=SDE, level=0.7, first=0.9):
    t = torch.tensor([first, 0.6, 0.3], dtype=torch.float64)
    s = torch.tensor([0.7, 0.45, 0.1], dtype=torch.float64)
    return Step(t, s, torch.full((3,), 0.85, dtype=torch.float64), torch.full((3,), mode), level)


def per_row(function, *flat):
    """A formula applied to one sample at a time."""
    parts = zip(*(x.split(LENGTHS) for x in flat), strict=True)
    return torch.stack([function(i, *own) for i, own in enumerate(parts)])


# nft


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_nft_is_the_written_out_formula(beta):
    v, v_old, x0, noise = tensors(4)
    r = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def formula(i, v, v_old, x0, noise):
        target = noise - x0
        positive = beta * v + (1 - beta) * v_old
        negative = (1 + beta) * v_old - beta * v
        return r[i] * ((positive - target) ** 2).mean() + (1 - r[i]) * ((negative - target) ** 2).mean()

    got, _ = policy_loss.nft(v, v_old, x0, noise, ROW, step().t, r, LENGTHS, beta)
    torch.testing.assert_close(got, per_row(formula, v, v_old, x0, noise), **EXACT)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_nft_x0_weighted_is_the_published_formula_with_a_detached_weight(beta):
    v, v_old, x0, noise = tensors(4)
    v.requires_grad_()
    r, t, scale = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), step().t, 5.0

    def formula(i, v, v_old, x0, noise):
        x_t = (1 - t[i]) * x0 + t[i] * noise
        total = 0
        for share, velocity in ((r[i], beta * v + (1 - beta) * v_old), (1 - r[i], (1 + beta) * v_old - beta * v)):
            error = x_t - t[i] * velocity - x0
            total = total + share * (error**2).mean() / error.detach().abs().mean()
        return scale * total / beta

    got, _ = policy_loss.nft(v, v_old, x0, noise, ROW, t, r, LENGTHS, beta, True, scale)
    expected = per_row(formula, v, v_old, x0, noise)
    torch.testing.assert_close(got, expected, **EXACT)
    (gradient,) = torch.autograd.grad(got.sum(), v)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), v)[0], **EXACT)


def test_nft_x0_weight_has_a_floor_where_the_prediction_is_perfect():
    _, _, x0, noise = tensors(4)
    v = (noise - x0).requires_grad_()
    loss, _ = policy_loss.nft(v, v.detach(), x0, noise, ROW, step().t, torch.ones(3), LENGTHS, 1.0, True)
    loss.sum().backward()
    assert loss.detach().abs().max() < 1e-9 and v.grad.isfinite().all()


def test_nft_minimiser_moves_the_velocity_by_the_published_amount():
    """Many (target, r) draws at one x_t: the best v is v_old + E[(2r - 1)(target - v_old)] / beta."""
    generator = torch.Generator().manual_seed(1)
    draws, beta = 400, 0.7
    target = torch.randn(draws, CHANNELS, generator=generator, dtype=torch.float64)
    r = torch.rand(draws, generator=generator, dtype=torch.float64)
    v_old = torch.randn(1, CHANNELS, generator=generator, dtype=torch.float64)
    v = v_old.clone().requires_grad_()
    lengths, row = (1,) * draws, torch.arange(draws)

    def loss(v):
        spread = [x.expand(draws, -1) for x in (v, v_old)]
        return policy_loss.nft(*spread, torch.zeros_like(target), target, row, r, r, lengths, beta)[0].mean()

    (gradient,) = torch.autograd.grad(loss(v), v)  # quadratic with curvature 2 beta^2 / channels: one Newton step
    best = v.detach() - gradient / (2 * beta**2 / CHANNELS)
    expected = v_old + ((2 * r - 1)[:, None] * (target - v_old)).mean(0) / beta
    torch.testing.assert_close(best, expected, **EXACT)
    (at_best,) = torch.autograd.grad(loss(best.requires_grad_()), best)
    assert at_best.abs().max() < 1e-14


def test_nft_with_r_one_half_is_stationary_at_the_old_velocity():
    """Whatever sampler made x0. The two branches' gradients are of opposite sign, so the sum is rounding only."""
    v_old, x0, noise = tensors(3)
    for weighted in (False, True):
        v = v_old.clone().requires_grad_()
        policy_loss.nft(v, v_old, x0, noise, ROW, step().t, torch.full((3,), 0.5), LENGTHS, 0.7, weighted)[
            0
        ].sum().backward()
        assert v.grad.abs().max() < 1e-15


def test_nft_weight_maps_the_advantage_and_clips():
    got = policy_loss.nft_weight(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0)
    assert got.tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_nft_sends_no_gradient_to_the_old_velocity():
    v, v_old, x0, noise = (x.requires_grad_() for x in tensors(4))
    policy_loss.nft(v, v_old, x0, noise, ROW, step().t, torch.ones(3), LENGTHS, 0.5)[0].sum().backward()
    assert v_old.grad is None and v.grad.abs().max() > 0


# grpo and guard


def transition(mode=SDE, seed=0):
    x, v_old, z, change = tensors(4, seed)
    s = step(mode)
    mean, std = mean_std(x, v_old, ROW, s)
    return x, v_old, z, v_old + 0.05 * change, s, mean + std[ROW, None] * z


@pytest.mark.parametrize("mode", [SDE, DANCE])
@pytest.mark.parametrize("guard", [False, True])
def test_ratio_loss_is_the_written_out_formula(mode, guard):
    x, v_old, z, v, s, x_next = transition(mode)
    advantage = torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)
    low, high = 1e-3, 2e-3
    mean, std = mean_std(x, v, ROW, s)
    mean_old, _ = mean_std(x, v_old, ROW, s)

    def ratio_of(i, x_next, mean, mean_old):
        new = Normal(mean, std[i]).log_prob(x_next).mean()
        old = Normal(mean_old, std[i]).log_prob(x_next).mean()
        if guard:
            return torch.exp(std[i] * (new - old + ((mean - mean_old) ** 2).mean() / (2 * std[i] ** 2)))
        return torch.exp(new - old)

    ratio = per_row(ratio_of, x_next, mean, mean_old)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss, _, got_ratio, got_clipped = policy_loss.policy_ratio(
        v, v_old, x, x_next, ROW, s, advantage, LENGTHS, low, high, guard
    )
    torch.testing.assert_close(got_ratio, ratio, **EXACT)
    assert got_clipped.tolist() == (clipped != ratio).tolist()
    torch.testing.assert_close(loss, torch.maximum(-advantage * ratio, -advantage * clipped), **EXACT)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clipping_stops_the_gradient_only_where_the_update_went_too_far(sign):
    x, v_old, z, _, s, x_next = transition()
    mean, std = mean_std(x, v_old, ROW, s)
    _, slope = (mean_std(x, v_old + d, ROW, s)[0] for d in (0.0, 1.0))
    toward = (x_next - mean) * (slope - mean).sign()  # moving v along it raises the log-probability
    for direction in (1.0, -1.0):
        v = (v_old + direction * 0.2 * toward).requires_grad_()
        loss, _, ratio, clipped = policy_loss.policy_ratio(
            v, v_old, x, x_next, ROW, s, torch.full((3,), sign).double(), LENGTHS, 0.01, 0.01
        )
        assert clipped.all() and ((ratio > 1) == (direction > 0)).all()
        loss.sum().backward()
        assert (v.grad.abs().max() == 0) == (direction == sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [SDE, CPS, DANCE])
@pytest.mark.parametrize("guard", [False, True])
def test_equal_velocities_give_a_ratio_of_exactly_one(dtype, mode, guard):
    if guard and mode == CPS:
        pytest.skip("guard needs a density")
    x, v_old, x_next = (p.to(dtype) for p in (*tensors(2), transition(mode)[-1]))
    _, _, ratio, clipped = policy_loss.policy_ratio(
        v_old.clone(), v_old, x, x_next, ROW, step(mode), torch.ones(3), LENGTHS, 1e-4, 1e-4, guard
    )
    assert (ratio == 1).all() and not clipped.any()


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_at_ratio_one_is_minus_advantage_noise_over_std_times_the_means_slope(residual):
    x, v_old, z, _, s, x_next = transition()
    if residual:  # the rollout was guided: x_next lies elsewhere, the target is rebuilt from the drawn noise
        drawn = Noise(stream(7, [1, 2, 3], [0, 0, 0], 0), torch.arange(len(ROW)), torch.tensor([4, 0, 2]))
        x_next, z = flow_step(x, v_old, ROW, s, noise=drawn)[0], drawn.draw(ROW, CHANNELS)
    advantage = torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)
    v = v_old.clone().requires_grad_()
    loss, *_ = policy_loss.policy_ratio(v, v_old, x, x_next, ROW, s, advantage, LENGTHS, 1e-4, 1e-4)
    loss.sum().backward()
    _, std = mean_std(x, v_old, ROW, s)
    slope = mean_std(x, v_old + 1, ROW, s)[0] - mean_std(x, v_old, ROW, s)[0]  # the mean is linear in v
    size = torch.tensor(LENGTHS)[ROW, None] * CHANNELS
    expected = -advantage[ROW, None] * z / std[ROW, None] * slope / size
    torch.testing.assert_close(v.grad, expected, atol=1e-11, rtol=1e-9)  # slope by a difference


def test_a_guided_old_log_probability_would_not_start_at_one():
    x, v_cond, z, _, s, _ = transition()
    v_guided = v_cond + 0.3 * tensors(1, 5)[0]
    mean, std = mean_std(x, v_guided, ROW, s)
    _, _, ratio, _ = policy_loss.policy_ratio(
        v_cond, v_guided, x, mean + std[ROW, None] * z, ROW, s, torch.ones(3), LENGTHS, 1e-4, 1e-4
    )
    assert (ratio != 1).all()


@pytest.mark.parametrize("mode", [SDE, CPS, DANCE])
@pytest.mark.parametrize("guard", [False, True])
def test_gradients_of_the_ratio_losses_match_finite_differences(mode, guard):
    if guard and mode == CPS:
        pytest.skip("guard needs a density")
    x, v_old, _, v, s, x_next = transition(mode)
    advantage = torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)

    def loss(v):
        return policy_loss.policy_ratio(v, v_old, x, x_next, ROW, s, advantage, LENGTHS, 0.9, 9.0, guard)[0]

    assert torch.autograd.gradcheck(loss, v.requires_grad_())


@pytest.mark.parametrize("mode", [SDE, CPS, DANCE])
def test_log_probability_gradient_matches_finite_differences(mode):
    x, _, _, v, s, x_next = transition(mode)

    def log_p(v):
        return log_prob(x_next, *mean_std(x, v, ROW, s), s.mode, LENGTHS)

    assert torch.autograd.gradcheck(log_p, v.requires_grad_())


def test_log_probability_is_that_of_the_rounded_state():
    x, v, _, _, s, x_next = transition()
    rounded = x_next.bfloat16()
    mean, std = mean_std(x.bfloat16(), v, ROW, s)
    expected = per_row(lambda i, a, m: Normal(m, std[i]).log_prob(a.double()).mean(), rounded, mean)
    torch.testing.assert_close(log_prob(rounded, mean, std, s.mode, LENGTHS), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_of_half_precision_velocities_are_computed_in_float32(dtype):
    v, v_old, x0, noise = tensors(4, dtype=dtype)
    given = ROW, step().t.float(), torch.ones(3), LENGTHS, 1.0
    assert {out.dtype for out in policy_loss.nft(v, v_old, x0, noise, *given, v_ref=v_old)} == {torch.float32}
    assert velocity_match(v, v_old, LENGTHS).dtype == torch.float32


def test_losses_of_a_pair_do_not_depend_on_the_other_pairs():
    v, v_old, x0, noise = tensors(4)
    whole, _ = policy_loss.nft(v, v_old, x0, noise, ROW, step().t, torch.ones(3), LENGTHS, 1.0)
    start = 0
    for i, n in enumerate(LENGTHS):
        own = [p[start : start + n] for p in (v, v_old, x0, noise)]
        alone, _ = policy_loss.nft(
            *own, torch.zeros(n, dtype=torch.int64), step().t[i : i + 1], torch.ones(1), (n,), 1.0
        )
        torch.testing.assert_close(alone[0], whole[i], **EXACT)
        start += n


# distance to the base


def test_velocity_kl_is_the_mean_square_and_has_a_gradient_in_the_policy_only():
    v, v_ref = (x.requires_grad_() for x in tensors(2))
    others = tensors(3, 1)
    _, kl = policy_loss.nft(v, *others, ROW, step().t, torch.ones(3), LENGTHS, 1.0, v_ref=v_ref)
    torch.testing.assert_close(kl, per_row(lambda i, a, b: ((a - b) ** 2).mean(), v, v_ref), **EXACT)
    kl.sum().backward()
    assert v.grad.abs().max() > 0 and v_ref.grad is None


@pytest.mark.parametrize("mode", [SDE, DANCE])
def test_transition_kl_is_the_divergence_of_the_two_gaussians(mode):
    x, v_ref, _, v, s, _ = transition(mode)
    v.requires_grad_()
    mean, std = mean_std(x, v, ROW, s)
    mean_ref, _ = mean_std(x, v_ref, ROW, s)
    expected = per_row(lambda i, a, b: kl_divergence(Normal(a, std[i]), Normal(b, std[i])).mean(), mean, mean_ref)
    _, kl, *_ = policy_loss.policy_ratio(v, v_ref, x, x, ROW, s, torch.ones(3), LENGTHS, 1e-4, 1e-4, v_ref=v_ref)
    got = kl * policy_loss.transition_factor(s)
    torch.testing.assert_close(got, expected, **EXACT)
    got.sum().backward()
    assert v.grad.abs().max() > 0


def test_first_node_has_a_finite_std_and_log_probability():
    """At t = 1 the sde's std is infinite; the second node of the grid takes its place."""
    x, v, _, _, _, _ = transition()
    s = step(first=1.0)
    mean, std = mean_std(x, v, ROW, s)
    t, s0, cap, a = 1.0, 0.7, 0.85, 0.7
    assert std[0].item() == pytest.approx(a * math.sqrt(t / (1 - cap)) * math.sqrt(t - s0), rel=1e-12)
    assert log_prob(mean, mean, std, s.mode, LENGTHS).isfinite().all()


# distillation


def test_student_equal_to_its_teacher_has_a_loss_of_exactly_zero():
    for dtype in (torch.float32, torch.bfloat16):
        v, uncond = tensors(2, dtype=dtype)
        assert (velocity_match(v, v.clone(), LENGTHS) == 0).all()
        assert (velocity_match(v, v.clone(), LENGTHS, uncond, guidance=1.0) == 0).all()
        assert (velocity_match(v, v.clone(), LENGTHS, uncond, guidance=1.0, rescale=True) == 0).all()


def test_student_equal_to_a_guided_teacher_has_the_loss_of_the_guidance():
    v, uncond = tensors(2)
    got = velocity_match(v, v.clone(), LENGTHS, uncond, guidance=3.0)
    torch.testing.assert_close(got, per_row(lambda i, a, b: 4 * ((a - b) ** 2).mean(), v, uncond), **EXACT)


def test_rescaled_teacher_keeps_the_conditional_norm_of_every_token():
    v, cond, uncond = tensors(3)
    comb = uncond + 3 * (cond - uncond)
    u = comb * cond.norm(dim=-1, keepdim=True) / comb.norm(dim=-1, keepdim=True)
    got = velocity_match(v, cond, LENGTHS, uncond, guidance=3.0, rescale=True)
    torch.testing.assert_close(got, per_row(lambda i, a, b: ((a - b) ** 2).mean(), v, u), **EXACT)


def test_teacher_gets_no_gradient():
    v, cond, uncond = (x.requires_grad_() for x in tensors(3))
    velocity_match(v, cond, LENGTHS, uncond, guidance=2.0).sum().backward()
    assert v.grad is not None and cond.grad is None and uncond.grad is None
