"""Triton against the references, values and gradients: interpreted where there is no GPU, compiled where there is one."""

import pytest
import tiny_runs
import torch

from qirl.kernels import gated_residual as gated_residual_file
from qirl.kernels import merge_attention as merge_file
from qirl.kernels import norm_modulate as norm_file
from qirl.kernels import qk_norm_rope as rope_file
from qirl.kernels import residual_norm as residual_norm_file
from qirl.kernels import swiglu as swiglu_file
from qirl.kernels import tritons
from qirl.kernels.gated_residual import gated_residual
from qirl.kernels.merge_attention import merge_attention
from qirl.kernels.norm_modulate import norm_modulate
from qirl.kernels.qk_norm_rope import qk_norm_rope
from qirl.kernels.residual_norm import residual_norm
from qirl.kernels.modulation import Chunks
from qirl.kernels.swiglu import swiglu
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack

pytestmark = pytest.mark.skipif(tritons.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
# a bfloat16 has 8 bits; the interpreter truncates where a GPU rounds
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-6), torch.bfloat16: dict(rtol=2**-7, atol=2**-7)}


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    monkeypatch.setenv("QIRL_KERNELS", "triton")


@pytest.fixture(autouse=True)
def unset_memory_is_nan(monkeypatch):
    """An output that a kernel does not write is seen."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poisoned(real(*a, **k)))


def _poisoned(x):
    return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" and type(x) is torch.Tensor else x


def draws(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def agree(run, reference, inputs, roundings=1):
    """Outputs and all gradients of run(*inputs), rounded so many times on their way, against reference(*inputs) in float32."""
    tolerance = {name: roundings * value for name, value in TOLERANCE[inputs[0].dtype].items()}
    ours = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    theirs = [x.detach().float().requires_grad_() if x.is_floating_point() else x for x in inputs]
    found, expected = run(*ours), reference(*theirs)
    assert found.dtype == inputs[0].dtype and found.isfinite().all()
    torch.testing.assert_close(found.float(), expected.float(), **tolerance)
    dout = torch.randn_like(expected).to(found.dtype)
    leaves = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    grads = torch.autograd.grad(found, [a for a, _ in leaves], dout)
    wanted = torch.autograd.grad(expected, [b for _, b in leaves], dout.float())
    for own, other in zip(grads, wanted, strict=True):
        scale = other.abs().max().clamp(min=1) if other.numel() else 1
        torch.testing.assert_close(own.float() / scale, other / scale, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (63, 40), (1000, 7), (3, 2049)])
def test_swiglu(shape, dtype):
    agree(swiglu, swiglu_file.reference, draws(shape, shape, dtype=dtype))


ROWS = {"one": lambda n: torch.zeros(n, dtype=torch.int64), "turns": lambda n: torch.arange(n) % 5,
        "blocks": lambda n: torch.arange(n) * 4 // max(1, n)}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (63, 40), (100, 7), (3, 2100)])
def test_gated_residual(shape, rows, dtype):
    x, y, gate = draws(shape, shape, (6, shape[1]), dtype=dtype)  # the last row has no token
    agree(gated_residual, gated_residual_file.reference, [x, y, gate, ROWS[rows](shape[0]).to(DEVICE)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (63, 40), (100, 7), (3, 2100)])
def test_norm_modulate(shape, rows, dtype):
    x, scale = draws(shape, (6, shape[1]), dtype=dtype)
    row = ROWS[rows](shape[0]).to(DEVICE)
    run, reference = (lambda x, scale, f=f: f(x, scale, row, 1e-6) for f in (norm_modulate, norm_file.reference))
    agree(run, reference, [x * 3 + 1, scale])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (63, 40), (3, 2100)])
def test_residual_norm(shape, rows, dtype):
    x, y, gate, scale = draws(shape, shape, (6, shape[1]), (6, shape[1]), dtype=dtype)
    row = ROWS[rows](shape[0]).to(DEVICE)
    both = lambda f: lambda *tensors: torch.stack(f(*tensors, row, 1e-6))  # noqa: E731
    agree(both(residual_norm), both(residual_norm_file.reference), [x, y, gate, scale], roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 2), (63, 3, 20), (9, 24, 128)])
def test_qk_norm_rope(shape, dtype):
    x, weight, angle = draws(shape, shape[2:], (shape[0], shape[2] // 2))
    turn = angle.cos(), angle.sin()
    run, reference = (lambda x, w, f=f: f(x, w, *turn, 1e-6) for f in (qk_norm_rope, rope_file.reference))
    agree(run, reference, [x.to(dtype), weight.to(dtype)])


def test_chunks_cover_every_token_once_whatever_the_order_of_rows():
    row = torch.tensor([3, 0, 3] * 30 + [5] * 17 + [0] * 4)
    order, own, begin, end = Chunks(row, 6).tensors
    assert len(own) == len(row) // Chunks.SIZE + 6 and (end - begin).max() <= Chunks.SIZE
    seen = [(place, int(r)) for r, a, b in zip(own, begin, end, strict=True) for place in order[a:b].tolist()]
    assert sorted(seen) == list(enumerate(row.tolist()))


def test_swiglu_of_views():
    gate, up = draws((40, 63), (63, 80))
    agree(swiglu, swiglu_file.reference, [gate.T, up[:, ::2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (63, 3, 20), (5, 2, 128)])
def test_merge_attention(shape, dtype):
    out_a, out_b = draws(shape, shape, dtype=dtype)
    lse_a, lse_b = (5 * x for x in draws(shape[:-1], shape[:-1], seed=1))
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    wanted, wanted_lse = merge_file.reference(out_a.float(), lse_a, out_b.float(), lse_b)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), wanted, **TOLERANCE[dtype])
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)


ROW = torch.tensor([2, 0, 0, 2, 2], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_of_triton_kernels_equals_the_reference_with_all_gradients(dtype, monkeypatch):
    torch.manual_seed(0)
    model = QwenImage21(tiny_runs.architecture()).to(DEVICE, dtype)
    conditions = [Condition(torch.randn(3, tiny_runs.TEXT_DIM)), Condition(torch.randn(5, tiny_runs.TEXT_DIM))]
    body = pack(conditions, [Target(0, 2, 3), Target(0, 2, 3), Target(1, 3, 3)], device=DEVICE)
    x, t = torch.randn(body.target_tokens, tiny_runs.CHANNELS), torch.rand(3)
    results = {}
    for mode in ("triton", "reference"):
        monkeypatch.setenv("QIRL_KERNELS", mode)
        model.zero_grad()
        v = model(body, x.to(DEVICE, dtype), t.to(DEVICE))
        v.float().square().sum().backward()
        results[mode] = [v.detach(), *(p.grad for p in model.parameters())]
    limit = 1e-5 if dtype == torch.float32 else 0.05  # two layers of bfloat16, truncated where interpreted
    for ours, theirs in zip(*results.values(), strict=True):
        assert (ours - theirs).float().norm() <= limit * theirs.float().norm()


OPS = {
    "swiglu": lambda: (torch.ops.qirl.swiglu, draws((5, 6), (5, 6))),
    "gated_residual": lambda: (torch.ops.qirl.gated_residual, [*draws((5, 6), (5, 6), (3, 6)), ROW]),
    "norm_modulate": lambda: (torch.ops.qirl.norm_modulate, [*draws((5, 6), (3, 6)), ROW, 1e-6]),
    "residual_norm": lambda: (torch.ops.qirl.residual_norm, [*draws((5, 6), (5, 6), (3, 6), (3, 6)), ROW, 1e-6]),
    "qk_norm_rope": lambda: (torch.ops.qirl.qk_norm_rope, [*draws((5, 2, 8), (8,), (5, 4), (5, 4)), 1e-6]),
    "merge_attention": lambda: (torch.ops.qirl.merge_attention, draws((4, 2, 8), (4, 2), (4, 2, 8), (4, 2))),
}


@pytest.mark.parametrize("op", OPS)
def test_the_op_is_well_registered(op):
    run, inputs = OPS[op]()
    floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if op != "merge_attention":  # forward only
        for x in floats:
            x.requires_grad_(not (op == "qk_norm_rope" and x.shape == (5, 4)))  # no gradient of the angles
    torch.library.opcheck(run.default, inputs)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op):
    run, inputs = OPS[op]()
    for one, two in zip(*(torch.utils._pytree.tree_leaves(run(*inputs)) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_offsets_beyond_two_to_the_31_do_not_wrap():
    tokens, width = 2**19 + 3, 4096
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    y, gate, scale = (
        torch.ones_like(x),
        torch.full((2, width), 9.0, device=DEVICE),
        torch.zeros(2, width, device=DEVICE),
    )
    x[-1] = torch.arange(width, device=DEVICE).remainder(7)
    row = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    row[-1] = 1
    gate[1] = -9.0
    assert torch.equal(gated_residual(x, y, gate, row)[[0, -1]].float(), torch.stack([x[0] + 1, x[-1] - 1]).float())
    torch.testing.assert_close(
        norm_modulate(x, scale, row)[-1], norm_file.reference(x[-1:], scale[1:], row[:1], 1e-6)[0], **TOLERANCE[x.dtype]
    )
    assert torch.equal(swiglu(y, x)[-1], swiglu_file.reference(y[-1:], x[-1:])[0])


def test_an_op_compiles_without_a_graph_break():
    inputs = draws((5, 6), (5, 6))
    compiled = torch.compile(lambda gate, up: swiglu(gate, up) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), 2 * swiglu(*inputs))


def test_float64_and_auto_without_a_gpu_stay_with_the_reference(monkeypatch):
    x = draws((3, 4))[0].double()
    assert tritons.on(swiglu_file._forward, x) == {}
    if DEVICE == "cpu":
        monkeypatch.setenv("QIRL_KERNELS", "auto")
        assert tritons.on(swiglu_file._forward, x.float()) == {}
