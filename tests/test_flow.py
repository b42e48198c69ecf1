"""Grid, transitions, guidance, noise and rollout."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from qirl.config_sections import Flow
from qirl.errors import UserError
from qirl.flow.grid import sigmas
from qirl.flow.rollout import rollout
from qirl.kernels import philox
from qirl.kernels.flow_step import CPS, DANCE, MODES, ODE, SDE, Noise, Step, flow_step, guide, log_prob, mean_std
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.packing import Condition, Target


@pytest.mark.parametrize("tokens", [64, 256, 1000, 1024, 4096, 8192, 16384])
@pytest.mark.parametrize("steps", [2, 10, 40, 50])
def test_grid_equals_diffusers_in_every_bit(tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192
    )
    slope = (0.9 - 0.5) / (8192 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=slope * tokens + (0.5 - slope * 256))
    assert torch.equal(torch.from_numpy(sigmas(tokens, Flow(steps=steps))), scheduler.sigmas)


def test_grid_has_the_published_values():
    assert [round(float(s), 4) for s in sigmas(1024, Flow(steps=10))] == [
        1.0, 0.929, 0.8515, 0.7666, 0.6733, 0.5701, 0.4555, 0.3274, 0.1833, 0.02, 0.0
    ]  # fmt: skip


def test_philox_words_are_those_of_random123():
    assert [f"{w:08x}" for w in philox.words(torch.zeros(4, dtype=torch.int64), 0).tolist()] == [
        "6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"
    ]  # fmt: skip
    ones = torch.full((4,), 0xFFFFFFFF)
    assert [f"{w:08x}" for w in philox.words(ones, 2**64 - 1).tolist()] == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]


def draw(prompt, sample, tokens, seed=3, iteration=0, step=0, purpose=philox.INITIAL, channels=12):
    s = philox.stream(seed, prompt, sample, iteration)
    row = torch.arange(len(prompt)).repeat_interleave(torch.tensor(tokens))
    token = torch.cat([torch.arange(n) for n in tokens])
    return philox.normal(s, row, token, channels, step, purpose).split(tokens)


def test_noise_does_not_depend_on_the_batch_it_is_drawn_in():
    together = draw([5, 9, 9], [0, 3, 4], [16, 64, 16])
    for i, (p, s, n) in enumerate([(5, 0, 16), (9, 3, 64), (9, 4, 16)]):
        assert torch.equal(together[i], draw([p], [s], [n])[0])


def test_noise_is_new_when_a_prompt_returns_and_for_every_part_of_the_key():
    base = draw([5], [0], [64])[0]
    others = [
        draw([5], [0], [64], iteration=1), draw([5], [1], [64]), draw([6], [0], [64]), draw([5], [0], [64], step=1),
        draw([5], [0], [64], purpose=philox.LOSS), draw([5], [0], [64], seed=4), draw([5], [0], [64], seed=3 + 2**32),
    ]  # fmt: skip
    for (other,) in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.15


def test_noise_is_standard_normal():
    z = draw([1], [0], [20000], channels=16)[0].double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)


@pytest.mark.parametrize("seed", [None, -1, 2**64, 0.0, True])
def test_a_seed_that_is_no_integer_in_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        philox.stream(seed, [0], [0], 0)


def test_counters_out_of_range_are_refused_instead_of_wrapping():
    for kwargs in (dict(prompt=[2**32], sample=[0], iteration=0), dict(prompt=[0], sample=[4096], iteration=0),
                   dict(prompt=[0], sample=[0], iteration=2**20)):  # fmt: skip
        with pytest.raises(ValueError):
            philox.stream(0, **kwargs)
    philox.stream(0, [0], [0], 0)


def make_step(t, s, mode, level=0.7, cap=0.95, rows=1):
    full = lambda v: torch.full((rows,), v, dtype=torch.float64)  # noqa: E731
    return Step(full(t), full(s), full(cap), torch.full((rows,), mode), level)


@pytest.mark.parametrize("mode", [SDE, CPS, DANCE])
@pytest.mark.parametrize("t,s", [(1.0, 0.9), (0.9, 0.8), (0.5, 0.4)])
def test_transitions_equal_the_formulas_written_out(mode, t, s):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    mean, std = mean_std(x, v, torch.zeros(6, dtype=torch.int64), make_step(t, s, mode))
    dt, a, capped = s - t, 0.7, t if t < 1 else 0.95
    x0, x1 = x - t * v, x + (1 - t) * v
    if mode == SDE:
        q = a * math.sqrt(t / (1 - capped))
        expected = x * (1 + q * q / (2 * t) * dt) + v * (1 + q * q * (1 - t) / (2 * t)) * dt
        sigma = q * math.sqrt(-dt)
    elif mode == CPS:
        sigma = s * math.sin(a * math.pi / 2)
        expected = (1 - s) * x0 + math.sqrt(s * s - sigma * sigma) * x1
    else:
        sigma = a * math.sqrt(-dt)
        expected = x + v * dt + 0.5 * a * a * (x - (1 - t) * x0) / t**2 * dt
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert std.item() == pytest.approx(sigma, rel=1e-12)
    assert torch.isfinite(mean).all()


@pytest.mark.parametrize(
    "mode,steps,c,tolerance", [("ode", 200, 0.4, 0.01), ("sde", 400, 0.4, 0.02), ("cps", 100, 0.0, 1e-6)]
)
def test_marginals_of_a_gaussian_target_are_kept(mode, steps, c, tolerance):
    """For x0 ~ N(m, c^2) the exact velocity is linear; every transition must end at mean m and std c.

    cps keeps the coefficients of x0 and noise, hence the marginal of a point (c = 0) only.
    """
    m = 1.5
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    n = 40000
    x = torch.randn(n // 4, 4, dtype=torch.float64, generator=generator)
    row, token = torch.zeros(n // 4, dtype=torch.int64), torch.arange(n // 4)
    draws = philox.stream(1, [0], [0], 0)
    for i in range(steps):
        t, s = grid[i].item(), grid[i + 1].item()
        variance = (1 - t) ** 2 * c * c + t * t
        x0 = m + (1 - t) * c * c / variance * (x - (1 - t) * m)
        v = (
            (t / variance) * (x - (1 - t) * m) - m - (1 - t) * c * c / variance * (x - (1 - t) * m) + m
            if t == 0
            else (x - x0) / t
        )
        kind = MODES.index(mode) if s > 0 else ODE
        step = make_step(t, s, kind, level=0.7, cap=grid[1].item())
        x, _ = flow_step(x, v, row, step, noise=Noise(draws, token, i))
    assert x.mean().item() == pytest.approx(m, abs=0.01 + tolerance)
    assert x.std().item() == pytest.approx(c, abs=tolerance)


def test_log_probability_equals_torch_distributions_and_is_a_mean_over_elements():
    generator = torch.Generator().manual_seed(2)
    x, v, z = torch.randn(3, 10, 4, dtype=torch.float64, generator=generator)
    row, lengths = torch.tensor([0] * 4 + [1] * 6), (4, 6)
    step = make_step(0.8, 0.7, SDE, rows=2)
    mean, std = mean_std(x, v, row, step)
    x_next = mean + std[row, None] * z
    expected = [
        torch.distributions.Normal(m, std[0]).log_prob(n).mean()
        for m, n in zip(mean.split([4, 6]), x_next.split([4, 6]), strict=True)
    ]
    torch.testing.assert_close(log_prob(x_next, mean, std, step.mode, lengths), torch.stack(expected))


def test_log_probability_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(3)
    x, v, x_next = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    row = torch.zeros(4, dtype=torch.int64)
    for mode in (SDE, CPS, DANCE):
        step = make_step(0.8, 0.7, mode)

        def value(v, step=step):
            mean, std = mean_std(x, v, row, step)
            return log_prob(x_next, mean, std, step.mode, (4,)).sum()

        assert torch.autograd.gradcheck(value, v.clone().requires_grad_())


def test_guidance_combines_and_rescales_to_the_conditional_norm():
    generator = torch.Generator().manual_seed(4)
    cond, uncond = torch.randn(2, 5, 8, generator=generator)
    torch.testing.assert_close(guide(cond, uncond, 3.0, False), uncond + 3 * (cond - uncond))
    rescaled = guide(cond, uncond, 3.0, True)
    torch.testing.assert_close(rescaled.norm(dim=-1), cond.norm(dim=-1))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(rescaled, guide(cond, uncond, 3.0, False)), torch.ones(5)
    )


CONFIG = QwenImage21Config(
    in_channels=12, out_channels=12, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=8, axes_dims_rope=(4, 6, 6)
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return QwenImage21(CONFIG)


def conditions(n):
    generator = torch.Generator().manual_seed(7)
    return [Condition(torch.randn(2 + i % 3, 8, generator=generator)) for i in range(n)]


def test_an_image_does_not_depend_on_batch_order_or_company(model):
    cs, null = conditions(3), Condition(torch.zeros(1, 8))
    flow = Flow(steps=6, guidance=3.0, sampler="sde")
    targets = [Target(0, 4, 4), Target(0, 4, 4), Target(1, 2, 6), Target(2, 4, 4)]
    s = philox.stream(11, [0, 0, 1, 2], [0, 1, 0, 0], 2)
    nodes = [(1, 2), (3,), (0, 1), (2,)]
    together = rollout(model, cs, targets, s, flow, nodes, [null] * 3).latents()
    for i, (target, own) in enumerate(zip(targets, nodes, strict=True)):
        alone = rollout(
            model,
            [cs[target.prompt]],
            [Target(0, target.height, target.width)],
            s.rows(torch.tensor([i])),
            flow,
            [own],
            [null],
        )
        torch.testing.assert_close(alone.latents()[0], together[i], rtol=0, atol=1e-5)


def test_guided_rollout_equals_two_separate_passes(model):
    c, null, flow = conditions(1)[0], Condition(torch.zeros(1, 8)), Flow(steps=3, guidance=2.5, rescale=True)
    s = philox.stream(0, [0], [0], 0)
    got = rollout(model, [c], [Target(0, 4, 4)], s, flow, negatives=[null]).x0
    from qirl.packing import pack

    grid = sigmas(16, flow)
    x = philox.normal(s, torch.zeros(16, dtype=torch.int64), torch.arange(16), 12, 0, philox.INITIAL)
    with torch.no_grad():
        for t, n in zip(grid[:-1], grid[1:], strict=True):
            v = [model(pack([k], [Target(0, 4, 4)]), x, torch.tensor([t])) for k in (c, null)]
            x = x + guide(v[0], v[1], 2.5, True) * float(n - t)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


def test_kept_states_are_rounded_to_the_storage_dtype_and_chain(model):
    flow = Flow(steps=5, sampler="sde", storage="bfloat16")
    out = rollout(model, conditions(1), [Target(0, 4, 4)], philox.stream(0, [0], [0], 0), flow, [(1, 2)])
    assert out.kept.keys() == {(0, 1), (0, 2)}
    first, second = out.kept[0, 1], out.kept[0, 2]
    assert first.x.dtype == first.x_next.dtype == torch.bfloat16
    assert torch.equal(first.x_next, second.x)


def test_the_last_step_is_ode_whatever_is_asked(model):
    flow = Flow(steps=4, sampler="sde", stochastic="all")
    from qirl.flow.rollout import mode_table

    assert mode_table([(3,), ()], flow).tolist() == [[SDE, SDE]] * 3 + [[ODE, ODE]]


class NoSync(TorchDispatchMode):
    """Fails on ops that read a tensor's value back to the host."""

    BAD = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.is_nonzero",
        "aten.equal",
        "aten.masked_select",
        "aten.unique",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.BAD):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_step_loop_never_waits_for_the_device(model):
    def syncs(steps):
        flow, null = Flow(steps=steps, sampler="sde", guidance=2.0), Condition(torch.zeros(1, 8))
        with NoSync() as watch:
            rollout(model, conditions(2), [Target(0, 4, 4), Target(1, 2, 4)], philox.stream(0, [0, 1], [0, 0], 0), flow,
                    [(1,), (0,)], [null, null])  # fmt: skip
        return len(watch.seen)

    with NoSync() as watch:
        torch.ones(1).item()
    assert watch.seen, "the watch itself does not see a read-back"
    assert syncs(4) == syncs(12)


def test_guidance_without_an_unconditional_embedding_is_refused(model):
    with pytest.raises(UserError, match="unconditional"):
        rollout(model, conditions(1), [Target(0, 4, 4)], philox.stream(0, [0], [0], 0), Flow(steps=4, guidance=2.0))
