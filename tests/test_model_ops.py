"""The model's ops against plain formulas, their gradients against finite differences, bf16 against float32."""

import math

import pytest
import torch

from qirl.kernels import qk_norm_rope as qk_norm_rope_file
from qirl.kernels.gated_residual import gated_residual
from qirl.kernels.merge_attention import merge_attention_
from qirl.kernels.norm_modulate import norm_modulate
from qirl.kernels.qk_norm_rope import qk_norm_rope
from qirl.kernels.residual_norm import residual_norm
from qirl.kernels.rows import row_mean
from qirl.kernels.swiglu import swiglu

N, HEADS, DIM, ROWS = 7, 3, 6, 4
ROW = torch.tensor([0, 0, 1, 1, 1, 3, 3])  # row 2 has no token


def draws(dtype=torch.float64, seed=0):
    """name -> (op, its floating inputs)."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    angle = torch.rand(N, DIM // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    turn = [angle.cos(), angle.sin()] if dtype == torch.float64 else [angle.cos().float(), angle.sin().float()]
    return {
        "norm_modulate": (lambda x, scale: norm_modulate(x, scale, ROW), [normal(N, DIM), normal(ROWS, DIM)]),
        "norm_modulate with a shift": (
            lambda x, scale, shift: norm_modulate(x, scale, ROW, shift=shift),
            [normal(N, DIM), normal(ROWS, DIM), normal(ROWS, DIM)],
        ),
        "gated_residual": (
            lambda x, y, gate: gated_residual(x, y, gate, ROW),
            [normal(N, DIM), normal(N, DIM), normal(ROWS, DIM)],
        ),
        "gated_residual with a plain gate": (
            lambda x, y, gate: gated_residual(x, y, gate, ROW, bounded=False),
            [normal(N, DIM), normal(N, DIM), normal(ROWS, DIM)],
        ),
        "qk_norm_rope": (lambda x, weight: qk_norm_rope(x, weight, *turn), [normal(N, HEADS, DIM), normal(DIM)]),
        "swiglu": (swiglu, [normal(N, DIM), normal(N, DIM)]),
    }  # fmt: skip


def merge_attention(out, lse, part, part_lse):
    """Merged copies."""
    out, lse = out.clone(), lse.clone()
    merge_attention_(out, lse, part, part_lse)
    return out, lse


@pytest.mark.parametrize("op", draws())
def test_gradients_equal_finite_differences(op):
    run, inputs = draws()[op]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("shifted, bounded", [(False, True), (True, False)])
def test_gradients_of_residual_norm_equal_finite_differences(shifted, bounded):
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, DIM), (N, DIM), *[(ROWS, DIM)] * (2 + shifted)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def run(x, y, gate, scale, shift=None):
        return residual_norm(x, y, gate, scale, ROW, shift=shift, bounded=bounded)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("op", draws())
def test_bfloat16_is_computed_in_float32_and_rounded_once(op):
    run, inputs = draws(torch.bfloat16)[op]
    out = run(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, run(*(x.float() for x in inputs)).to(torch.bfloat16))


@pytest.mark.parametrize("op", draws())
def test_inputs_are_left_as_they_were_and_views_are_read_correctly(op):
    """The references work in place on their own temporaries only, whatever the strides of the inputs."""
    run, inputs = draws()[op]
    before = [x.clone() for x in inputs]
    expected = run(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    views = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert torch.allclose(run(*views), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(run, views)


def test_norm_modulate_is_layer_norm_times_one_plus_scale_of_the_row():
    x, scale = draws()["norm_modulate"][1]
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-3) * (1 + scale[ROW])
    torch.testing.assert_close(norm_modulate(x, scale, ROW, 1e-3), expected, rtol=0, atol=1e-13)


def test_norm_modulate_adds_the_shift_of_the_row():
    x, scale, shift = draws()["norm_modulate with a shift"][1]
    expected = norm_modulate(x, scale, ROW) + shift[ROW]
    torch.testing.assert_close(norm_modulate(x, scale, ROW, shift=shift), expected)


def test_gated_residual_takes_a_plain_gate_as_it_is():
    x, y, gate = draws()["gated_residual"][1]
    torch.testing.assert_close(gated_residual(x, y, gate, ROW, bounded=False), x + gate[ROW] * y)


def test_gated_residual_bounds_the_gate_of_the_row_by_tanh():
    x, y, gate = draws()["gated_residual"][1]
    expected = torch.stack([x[i] + torch.tanh(gate[ROW[i]]) * y[i] for i in range(N)])
    torch.testing.assert_close(gated_residual(x, y, gate, ROW), expected, rtol=0, atol=1e-14)


def test_swiglu_gates_the_first_argument():
    gate, up = draws()["swiglu"][1]
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, rtol=0, atol=1e-14)


def test_qk_norm_rope_turns_neighbouring_channels_by_the_angle_of_the_token():
    x, weight = draws()["qk_norm_rope"][1]
    angle = torch.linspace(0, 5, N * DIM // 2, dtype=torch.float64).view(N, DIM // 2)
    got = qk_norm_rope(x, weight, angle.cos(), angle.sin(), eps=1e-3)
    for token in range(N):
        for head in range(HEADS):
            row = x[token, head]
            n = row / math.sqrt(float(row @ row) / DIM + 1e-3) * weight
            for i in range(DIM // 2):
                c, s = math.cos(angle[token, i]), math.sin(angle[token, i])
                a, b = float(n[2 * i]), float(n[2 * i + 1])
                assert got[token, head, 2 * i] == pytest.approx(a * c - b * s, abs=1e-13)
                assert got[token, head, 2 * i + 1] == pytest.approx(a * s + b * c, abs=1e-13)


def test_merged_attention_equals_the_softmax_over_both_key_sets():
    generator = torch.Generator().manual_seed(1)
    scores, values = (torch.randn(5, 9, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    parts = []
    for keys in (slice(0, 2), slice(2, 9)):
        own = scores[:, keys]
        parts += [own.softmax(-1) @ values.T[keys], own.logsumexp(-1)]
    out, lse = merge_attention(*parts)
    torch.testing.assert_close(out, scores.softmax(-1) @ values.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_merging_with_a_part_of_no_weight_returns_the_other(gap):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    out, lse = merge_attention(a, torch.zeros(3), b, torch.full((3,), gap))
    assert torch.equal(out, b if gap > 0 else a)
    assert torch.equal(lse, torch.full((3,), max(gap, 0.0)))


def test_merging_bfloat16_rounds_once():
    a, b = torch.randn(2, 3, 4).bfloat16()
    lse = torch.randn(2, 3)
    out, merged = merge_attention(a, lse[0], b, lse[1])
    expected, _ = merge_attention(a.float(), lse[0], b.float(), lse[1])
    assert merged.dtype == torch.float32
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize("lengths", [(), (3,), (2, 2, 2), (1, 4, 2)])
def test_row_mean_is_the_mean_over_each_rows_own_tokens(lengths):
    values = torch.randn(sum(lengths), 5, dtype=torch.float64)
    expected = [float(part.mean()) for part in values.split(list(lengths))] if lengths else []
    assert row_mean(values, lengths).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("tokens,heads,dim", [(1, 1, 2), (63, 3, 6), (130, 2, 32)])
def test_the_fused_qk_norm_rope_equals_the_reference_with_gradients(tokens, heads, dim):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, heads, dim, dtype=torch.float64, generator=generator)
    weight = torch.randn(dim, dtype=torch.float64, generator=generator)
    angle = torch.randn(tokens, dim // 2, dtype=torch.float64, generator=generator)
    results = []
    for run in (qk_norm_rope_file.fused, qk_norm_rope_file.reference):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = run(*leaves, angle.cos(), angle.sin(), 1e-6)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
