"""The sampler's step, the policy losses, the distillation loss and the advantages: every implementation against its reference.

C++ on the CPU, Triton (interpreted where there is no GPU) and CUDA where there is one; references run in float64.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch

from qirl.kernels import _native, philox, policy_loss, tritons
from qirl.kernels import flow_step as flow_file
from qirl.kernels import group_advantage as advantage_file
from qirl.kernels import velocity_match as match_file
from qirl.kernels.flow_step import MODES, Noise, Step, flow_step
from qirl.kernels.group_advantage import CONVENTIONS, group_advantage
from qirl.kernels.philox import stream
from qirl.kernels.tritons import jit, tl
from qirl.kernels.velocity_match import velocity_match

GPU = torch.cuda.is_available()
NAN = float("nan")
LENGTHS = {"one": (1,), "odd": (63, 1, 7), "thousand": (1000,), "many": (4097, 3), "none": ()}
# float32 inside: rounding of sums; a bfloat16 result has 8 bits, and the interpreter truncates where a GPU rounds
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(params=["native", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device on which the implementation runs that this test is about."""
    if request.param == "triton":
        if tritons.triton is None:
            pytest.skip("Triton is not installed")
        monkeypatch.setenv("QIRL_KERNELS", "triton")
        return "cuda" if GPU else "cpu"
    if request.param == "cuda":
        if not GPU:
            pytest.skip("no GPU")
        monkeypatch.setenv("QIRL_KERNELS", "cuda")
        return "cuda"
    request.getfixturevalue("csrc")
    monkeypatch.setenv("QIRL_KERNELS", "auto")
    return "cpu"


@pytest.fixture(autouse=True)
def unset_memory_is_nan():
    """An output that an op does not write is seen, by torch's own filling of new memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def reference_only() -> contextlib.AbstractContextManager:
    """Inside, nothing but references runs."""
    return mock.patch.dict(os.environ, QIRL_KERNELS="reference")


def draws(count, tokens, channels, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, channels, generator=generator).to(device, dtype) for _ in range(count)]


def rows_of(lengths, device):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)).to(device)


def steps(count, device, mode=None, level=0.7):
    """Steps of every mode in turn, or of one; the first begins at t = 1."""
    t = torch.linspace(1, 0.3, max(1, count))[:count]
    modes = torch.arange(count) % 4 if mode is None else torch.full((count,), MODES.index(mode))
    tensors = (t, t - 0.1, torch.full_like(t, 0.9), modes)
    return Step(*(x.to(device) for x in tensors), level)


def noise_for(lengths, device):
    token = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
    count = range(len(lengths))
    draws = stream(2**63 + 5, [7 + i for i in count], [i % 3 for i in count], 4, device)
    return Noise(draws, token.to(device), torch.tensor([i % 2 * 5 for i in count], dtype=torch.int64, device=device))


def double(*tensors):
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def close(found, expected, dtype=torch.float32, what=""):
    """Relative to the largest expected value."""
    assert found.isfinite().all(), what
    scale = expected.abs().max().clamp(min=1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double() / scale, expected.double() / scale, rtol=0, atol=TOLERANCE[dtype], msg=what
    )


# noise


@jit
def _words_kernel(counters, words, seed, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT) * 4
    c0, c1 = tl.load(counters + at).to(tl.uint32), tl.load(counters + at + 1).to(tl.uint32)
    c2, c3 = tl.load(counters + at + 2).to(tl.uint32), tl.load(counters + at + 3).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words + at, w0.to(tl.int64))
    tl.store(words + at + 1, w1.to(tl.int64))
    tl.store(words + at + 2, w2.to(tl.int64))
    tl.store(words + at + 3, w3.to(tl.int64))


@pytest.mark.skipif(tritons.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63, 2**64 - 1])
def test_words_of_triton_are_those_of_the_reference_bit_for_bit(seed):
    place = "cuda" if GPU else "cpu"
    counters = torch.randint(0, 2**32, (64, 4), generator=torch.Generator().manual_seed(1)).to(place)
    counters[0] = 0
    found = torch.empty_like(counters)
    _words_kernel[(1,)](counters, found, _native.signed(seed), COUNT=64)
    assert torch.equal(found, philox.words(counters, seed))


def test_normals_are_within_two_millionths_of_the_reference(device):
    noise = noise_for(LENGTHS["many"], device)
    row = rows_of(LENGTHS["many"], device)
    found = noise.draw(row, 12)
    with reference_only():
        assert (found - noise.draw(row, 12)).abs().max() <= 2e-6


# one sampler step


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("channels", [16, 12])
@pytest.mark.parametrize("guided", ["plain", "guided", "rescaled"])
def test_flow_step(device, lengths, channels, guided, dtype):
    lengths = LENGTHS[lengths]
    row, step = rows_of(lengths, device), steps(len(lengths), device)
    x, (v, uncond) = draws(1, len(row), channels, device)[0], draws(2, len(row), channels, device, dtype, 1)
    uncond = None if guided == "plain" else uncond
    given = dict(v_uncond=uncond, guidance=3.0, rescale=guided == "rescaled", noise=noise_for(lengths, device))
    found, nothing = flow_step(x, v, row, step, **given)
    assert nothing is None and found.dtype == torch.float32
    given["v_uncond"] = None if uncond is None else uncond.double()
    with reference_only():
        expected, _ = flow_file.reference(
            *double(x, v, given["v_uncond"]), row, step, 3.0, given["rescale"], given["noise"], None, torch.float64
        )
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES[1:])
def test_flow_step_gives_the_log_probability_of_the_stored_states(device, mode, storage):
    lengths = LENGTHS["odd"]
    row, step, noise = rows_of(lengths, device), steps(3, device, mode), noise_for(lengths, device)
    x, v = draws(2, len(row), 16, device)
    x_next, found = flow_step(x, v, row, step, noise=noise, lengths=lengths, storage=storage)
    mean, std = flow_file.mean_std(x.to(storage).double(), v.double(), row, step)
    expected = flow_file.log_prob(x_next.to(storage).double(), mean, std, step.mode, lengths)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_flow_step_of_ode_needs_no_noise_and_any_channels(device):
    row, step = rows_of((9,), device), steps(1, device, "ode")
    x, v = draws(2, 9, 7, device)
    assert torch.equal(flow_step(x, v, row, step)[0], x + v * (step.s - step.t))


def test_views_are_served_as_their_copies(device):
    """Other strides, and a beginning that no 16-byte access could take."""
    row, step, noise = rows_of((20,), device), steps(1, device, "sde"), noise_for((20,), device)
    wide, shifted = torch.randn(16, 20, device=device), torch.randn(20 * 16 + 1, device=device)
    for x in (wide.t(), shifted[1:].view(20, 16)):
        assert torch.equal(
            flow_step(x, 2 * x, row, step, noise=noise)[0],
            flow_step(x.contiguous().clone(), (2 * x).contiguous().clone(), row, step, noise=noise)[0],
        )


# policy losses


def policy_inputs(lengths, channels, device, dtype, states=torch.float32):
    row = rows_of(lengths, device)
    v, step_away, ref = draws(3, len(row), channels, device, torch.float32, 3)
    v_old = v + 0.05 * step_away
    first, second = draws(2, len(row), channels, device, states, 4)
    share = torch.linspace(0, 1, max(1, len(lengths)))[: len(lengths)].to(device)
    return row, (v.to(dtype), v_old.to(dtype), ref.to(dtype)), (first, second), share


def with_gradient(run, v, douts):
    """Outputs of run(v), and the gradient of (douts . first two outputs) in v."""
    v = v.detach().clone().requires_grad_()
    out = run(v)
    (gradient,) = torch.autograd.grad(out[:2], v, [d.to(o.dtype) for d, o in zip(douts, out, strict=False)])
    return out, gradient


def douts_of(lengths, device):
    return [torch.linspace(a, b, max(1, len(lengths)))[: len(lengths)].to(device) for a, b in ((0.5, 1.5), (2, -1))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("channels", [16, 7])
@pytest.mark.parametrize("x0_weighted", [False, True])
def test_nft(device, lengths, channels, x0_weighted, dtype):
    lengths = LENGTHS[lengths]
    row, (v, v_old, ref), (x0, noise), r = policy_inputs(lengths, channels, device, dtype)
    t, options = steps(len(lengths), device).t, (0.7, x0_weighted, 5.0)
    found, gradient = with_gradient(
        lambda v: policy_loss.nft(v, v_old, x0, noise, row, t, r, lengths, *options, v_ref=ref),
        v, douts_of(lengths, device),
    )  # fmt: skip
    x = double(v_old, x0, noise, ref)
    expected, wanted = with_gradient(
        lambda v: policy_loss.nft_reference(v, *x, row, t.double(), r.double(), lengths, *options),
        v.double(), douts_of(lengths, device),
    )  # fmt: skip
    for own, other in zip(found, expected, strict=True):
        close(own, other)
    assert gradient.dtype == dtype
    close(gradient, wanted, dtype)


@pytest.mark.parametrize("states", TOLERANCE, ids=lambda d: f"states_{d}")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", ["odd", "many", "none"])
@pytest.mark.parametrize("mode,guard", [("sde", False), ("sde", True), ("dance", True), ("cps", False)])
def test_policy_ratio(device, lengths, mode, guard, dtype, states):
    lengths = LENGTHS[lengths]
    row, (v, v_old, ref), (x, x_next), share = policy_inputs(lengths, 16, device, dtype, states)
    step, advantage = steps(len(lengths), device, mode), 4 * share - 2
    options = (lengths, 0.02, 0.05, guard)
    found, gradient = with_gradient(
        lambda v: policy_loss.policy_ratio(v, v_old, x, x_next, row, step, advantage, *options, v_ref=ref),
        v, douts_of(lengths, device),
    )  # fmt: skip
    others = double(v_old, x, x_next, ref)
    expected, wanted = with_gradient(
        lambda v: policy_loss.ratio_reference(v, *others, row, step, advantage.double(), *options),
        v.double(), douts_of(lengths, device),
    )  # fmt: skip
    for own, other in zip(found[:3], expected[:3], strict=True):
        close(own, other)
    assert torch.equal(found[3], expected[3])
    close(gradient, wanted, dtype)


def test_policy_ratio_of_an_unmoved_policy_is_exactly_one_and_not_clipped(device):
    row, (v, _, _), (x, x_next), share = policy_inputs((63, 40), 16, device, torch.bfloat16)
    _, kl, ratio, clipped = policy_loss.policy_ratio(
        v, v, x, x_next, row, steps(2, device, "sde"), share, (63, 40), 1e-9, 1e-9
    )
    assert (ratio == 1).all() and not clipped.any() and (kl == 0).all()


def test_policy_ratio_next_to_one_keeps_its_digits(device):
    """A step of 1e-4 in v: the difference of two float32 log-probabilities would have lost most of it."""
    row, (v, _, ref), (x, x_next), _ = policy_inputs((4097,), 16, device, torch.float32)
    v_old, step, one = v + 1e-4 * ref, steps(1, device, "sde"), torch.ones(1, device=device)
    given = (row, step, one, (4097,), 1.0, 1.0, False)
    _, _, found, _ = policy_loss.policy_ratio(v, v_old, x, x_next, *given)
    _, _, expected, _ = policy_loss.ratio_reference(*double(v, v_old, x, x_next), None, *given)
    moved = (expected - 1).abs().item()
    assert 1e-8 < moved and abs(found.item() - expected.item()) < 2**-24 + 1e-3 * moved


# distillation


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("channels", [16, 7])
@pytest.mark.parametrize("guided", ["plain", "guided", "rescaled"])
def test_velocity_match(device, lengths, channels, guided, dtype):
    lengths = LENGTHS[lengths]
    v, cond, uncond = draws(3, sum(lengths), channels, device, dtype)
    uncond = None if guided == "plain" else uncond
    options = (3.0, guided == "rescaled")
    dout = douts_of(lengths, device)[0]
    leaf = v.clone().requires_grad_()
    found = velocity_match(leaf, cond, lengths, uncond, *options)
    (gradient,) = torch.autograd.grad(found, leaf, dout)
    exact = v.double().requires_grad_()
    expected = match_file.reference(exact, *double(cond, uncond), None, lengths, *options)
    (wanted,) = torch.autograd.grad(expected, exact, dout.double())
    close(found, expected)
    assert gradient.dtype == dtype
    close(gradient, wanted, dtype)


def test_velocity_match_of_a_student_that_is_its_teacher_is_zero_bit_for_bit(device):
    v, other = draws(2, 70, 16, device, torch.bfloat16)
    assert (velocity_match(v, v, (60, 10), other, 1.0) == 0).all()


def test_velocity_match_takes_a_target_of_another_dtype(device):
    (v,), (target,) = draws(1, 9, 16, device, torch.bfloat16), draws(1, 9, 16, device, seed=5)
    close(velocity_match(v, target, (9,)), ((v.double() - target.double()) ** 2).mean()[None])


# advantages


def scores_of(samples, components, groups, device, seed=0, failing=0.1):
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    scores, applies = uniform(samples, components), uniform(samples, components) < 0.9
    scores[uniform(samples, components) < failing] = NAN
    group = (uniform(samples) * groups).long() * 2**40 + 7  # ids lie anywhere
    constant = group == 7
    scores[constant] = 0.5  # a group without signal
    tensors = scores, applies, group, uniform(samples, components), 0.2 * uniform(components)
    return [x.to(device) for x in tensors], 2 * uniform(samples).to(device)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("samples,groups", [(1, 1), (63, 9), (96, 8), (1000, 47), (4097, 300)])
def test_group_advantage(device, samples, groups, convention, request):
    if "triton" in request.node.name and samples > 1000 and not GPU:
        pytest.skip("a program per sample is slow in the interpreter")
    (scores, applies, group, weights, noise), scale = scores_of(samples, 3, groups, device)
    found, valid = group_advantage(scores, applies, group, weights, noise, 0.01, 2.0, convention, scale)
    floors = torch.maximum(noise, torch.full_like(noise, 0.01))
    expected, alive = advantage_file.reference(scores, applies, group, weights, floors, 0.01, 2.0, convention, scale)
    assert torch.equal(valid, alive) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_group_advantage_of_no_samples(device):
    (scores, applies, group, weights, noise), _ = scores_of(0, 3, 1, device)
    advantage, valid = group_advantage(scores, applies, group, weights, noise)
    assert advantage.shape == valid.shape == (0,)


# what holds for all


def calls(device):
    """Every op once, as public calls without arguments."""
    lengths = LENGTHS["odd"]
    row, (v, v_old, ref), (first, second), share = policy_inputs(lengths, 16, device, torch.float32)
    step, noise = steps(3, device, "sde"), noise_for(lengths, device)
    (scores, applies, group, weights, spread), _ = scores_of(63, 3, 9, device)
    return {
        "flow_step": lambda: flow_step(first, v, row, step, ref, 3.0, True, noise, lengths, torch.bfloat16),
        "nft": lambda: policy_loss.nft(v, v_old, first, second, row, step.t, share, lengths, 0.7, True, 5.0, ref),
        "policy_ratio": lambda: policy_loss.policy_ratio(
            v, v_old, first, second, row, step, share, lengths, 0.1, 0.1, True, ref
        ),
        "velocity_match": lambda: velocity_match(v, first, lengths, second, 3.0, True, row),
        "group_advantage": lambda: group_advantage(scores, applies, group, weights, spread),
    }


OPS = ["flow_step", "nft", "policy_ratio", "velocity_match", "group_advantage"]


@pytest.mark.parametrize("others", [(5, 1), (1,) * 40, (20000, 9)], ids=["few", "many", "long"])
def test_the_losses_of_a_sample_have_the_same_bits_whatever_shares_its_pack(device, others, request):
    """Long rows, short ones and a row alone are summed by different numbers of blocks on CUDA."""
    if "triton" in request.node.name and not GPU:
        others = others[-2:] if max(others) < 1000 else (90, 9)  # the interpreter is slow
    own, lengths = 700, (*others[:1], 700, *others[1:])
    pack = slice(others[0], others[0] + own)
    row, (v, v_old, ref), (first, second), _ = policy_inputs(lengths, 64, device, torch.bfloat16)
    step, share = steps(3, device, "sde"), torch.tensor([0.2, 0.8, -1.5], device=device)
    step, share = step.rows(torch.arange(len(lengths), device=device) % 3), share.repeat(len(lengths))[: len(lengths)]

    def losses(at, row, step, share, lengths):
        tensors = v[at], v_old[at], first[at], second[at], row
        nft = policy_loss.nft(*tensors, step.t, share.clamp(0, 1), lengths, 0.7, True, 5.0, ref[at])
        ratio = policy_loss.policy_ratio(*tensors, step, share, lengths, 0.1, 0.1, True, ref[at])
        return *nft, *ratio, velocity_match(v[at], first[at], lengths, second[at], 3.0, True, row)

    together = losses(slice(None), row, step, share, lengths)
    one = torch.ones(1, dtype=torch.int64, device=device)
    alone = losses(pack, torch.zeros_like(row[pack]), step.rows(one), share[one], (own,))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("place", [0, 1], ids=["loss", "kl"])
@pytest.mark.parametrize("op", ["nft", "policy_ratio"])
def test_an_output_that_nobody_differentiates_counts_as_zero(device, op, place):
    lengths = LENGTHS["odd"]
    row, (v, v_old, ref), (first, second), share = policy_inputs(lengths, 16, device, torch.float32)
    step, leaf = steps(3, device, "sde"), v.requires_grad_()
    tensors = leaf, v_old, first, second, row
    if op == "nft":
        outputs = policy_loss.nft(*tensors, step.t, share, lengths, 0.7, False, 1.0, ref)
    else:
        outputs = policy_loss.policy_ratio(*tensors, step, share, lengths, 0.1, 0.1, False, ref)[:2]
    ones = torch.ones_like(outputs[0])
    weights = [ones * (k == place) for k in range(2)]
    (one,) = torch.autograd.grad(outputs[place], leaf, ones, retain_graph=True)
    (both,) = torch.autograd.grad(outputs, leaf, weights)
    assert torch.equal(one, both) and one.any()


@pytest.mark.parametrize("op", OPS)
def test_results_repeat_bit_for_bit_whatever_the_threads(device, op):
    call, threads = calls(device)[op], torch.get_num_threads()
    first = torch.utils._pytree.tree_leaves(call())
    try:
        torch.set_num_threads(2)
        again = torch.utils._pytree.tree_leaves(call())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def recorded(call, monkeypatch):
    """The registered op that a public call reaches, with the arguments it gets."""
    seen = []
    real = policy_loss.choose

    def record(op, **implementations):
        run = real(op, **implementations)
        fused = getattr(run, "args", ())
        if not fused:
            return run

        def keep(*arguments):
            seen.append((fused[0], arguments))
            return fused[0](*arguments)

        return lambda *given: run.func(keep, *given)

    for file in (policy_loss, flow_file, match_file, advantage_file):
        monkeypatch.setattr(file, "choose", record)
    call()
    (found,) = seen
    return found


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_registered_as_torch_wants_it(device, op, monkeypatch):
    fused, arguments = recorded(calls(device)[op], monkeypatch)
    fused = fused.op if isinstance(fused, _native.Checked) else fused
    learns = op not in ("flow_step", "group_advantage")  # in its first argument
    first = arguments[0].detach().requires_grad_(learns)
    torch.library.opcheck(fused, (first, *arguments[1:]))


@pytest.mark.parametrize("op", OPS)
def test_an_op_compiles_without_a_graph_break(device, op):
    if device == "cpu" and "triton" in str(tritons.on(lambda: 0, torch.zeros(1))):
        pytest.skip("inductor does not call interpreted kernels")
    call = calls(device)[op]
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(torch.compile(call, fullgraph=True, backend="aot_eager")()), leaves(call()), strict=True):
        assert torch.equal(a, b)


def test_nft_and_velocity_match_compile_with_their_gradients(device):
    if device == "cpu" and "triton" in str(tritons.on(lambda: 0, torch.zeros(1))):
        pytest.skip("inductor does not call interpreted kernels")
    lengths = LENGTHS["odd"]
    row, (v, v_old, ref), (x0, noise), share = policy_inputs(lengths, 16, device, torch.float32)
    t, leaf = steps(3, device).t, v.detach().requires_grad_()

    def loss(v):
        own, kl = policy_loss.nft(v, v_old, x0, noise, row, t, share, lengths, 0.7, True, 5.0, ref)
        return own.sum() + kl.sum() + velocity_match(v, ref, lengths, row=row).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"row": torch.tensor([0, 1, 2, 9])}, "every row must be in"),
        ({"row": torch.tensor([0, 1, -1, 2])}, "every row must be in"),
        ({"row": torch.tensor([0, 1])}, "row must name the sample of each of the 4 tokens"),
    ],
)
def test_what_would_read_beside_the_tensors_is_refused(change, message, monkeypatch, csrc):
    monkeypatch.setenv("QIRL_KERNELS", "auto")
    x, v = draws(2, 4, 16, "cpu")
    given = dict(row=torch.tensor([0, 1, 2, 2]), step=steps(3, "cpu", "ode")) | change
    with pytest.raises(RuntimeError, match=message):
        flow_step(x, v, **given)


def test_what_a_compiled_graph_refuses_is_raised_by_the_next_call_outside(monkeypatch, csrc):
    monkeypatch.setenv("QIRL_KERNELS", "auto")
    x, v = draws(2, 4, 16, "cpu")
    call = lambda row: flow_step(x, v, row, steps(3, "cpu", "ode"))[0]  # noqa: E731
    good = torch.tensor([0, 1, 2, 2])
    torch.compile(call, backend="eager")(torch.tensor([0, 1, 2, 9]))
    with pytest.raises(RuntimeError, match="every row must be in"):
        call(good)
    assert call(good).shape == x.shape


def test_noise_in_channels_that_are_not_fours_is_refused():
    x, v = draws(2, 4, 6, "cpu")
    with pytest.raises(ValueError, match="channels=6 is not a multiple of 4"):
        flow_step(x, v, rows_of((4,), "cpu"), steps(1, "cpu", "sde"), noise=noise_for((4,), "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("mode", ["triton", "cuda"])
def test_elements_beyond_two_to_the_31(mode, monkeypatch):
    """The last token's values and gradients, in a pack whose offsets need 64 bits."""
    monkeypatch.setenv("QIRL_KERNELS", mode)
    tokens, channels = 2**25 + 1, 64
    row, lengths = torch.zeros(tokens, dtype=torch.int64, device="cuda"), (tokens,)
    v = torch.zeros(tokens, channels, dtype=torch.bfloat16, device="cuda")
    v[-1] = 2.0
    x_next, _ = flow_step(v, v, row, steps(1, "cuda", "ode"))
    assert (x_next[-1] - 1.8).abs().max() < 1e-6 and (x_next[-2] == 0).all()
    leaf, target = v.clone().requires_grad_(), torch.zeros_like(v)
    velocity_match(leaf, target, lengths, row=row).backward(torch.full((1,), float(tokens), device="cuda"))
    assert (leaf.grad[-1] - 4 / channels).abs().max() < 1e-3 and (leaf.grad[-2] == 0).all()
