"""Triton against the references, values and gradients: compiled where there is a GPU, interpreted elsewhere."""

import pytest
import tiny_runs
import torch

from qirl.kernels import gated_residual as gated_residual_file
from qirl.kernels import merge_attention as merge_file
from qirl.kernels import norm_modulate as norm_file
from qirl.kernels import qk_norm_rope as rope_file
from qirl.kernels import quantise_rows as quantise_file
from qirl.kernels import residual_norm as residual_norm_file
from qirl.kernels import swiglu as swiglu_file
from qirl.kernels import tritons
from qirl.kernels.gated_residual import gated_residual
from qirl.kernels.merge_attention import merge_attention_
from qirl.kernels.modulation import Chunks, Tile
from qirl.kernels.norm_modulate import norm_modulate
from qirl.kernels.qk_norm_rope import qk_norm_rope
from qirl.kernels.residual_norm import residual_norm
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
    torch.manual_seed(0)
    monkeypatch.setenv("QIRL_KERNELS", "triton")


@pytest.fixture(autouse=True)
def unset_memory_is_nan(monkeypatch):
    """An output that a kernel does not write is seen."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: _poisoned(real(*a, **k)))


def _poisoned(x):
    return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" and type(x) is torch.Tensor else x


def draws(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def agree(run, reference, inputs, roundings=1):
    """Outputs and gradients of run(*inputs), rounded so many times, against reference(*inputs) in float64."""
    tolerance = {name: roundings * value for name, value in TOLERANCE[inputs[0].dtype].items()}
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = run(*ours), reference(*theirs)
    assert found.dtype == inputs[0].dtype and found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, **tolerance)
    dout = torch.randn_like(expected).to(found.dtype)
    grads = torch.autograd.grad(found, ours, dout)
    wanted = torch.autograd.grad(expected, theirs, dout.double())
    for own, other, leaf in zip(grads, wanted, ours, strict=True):
        assert own.dtype == leaf.dtype and own.shape == leaf.shape
        scale = other.abs().max().clamp(min=1) if other.numel() else 1
        torch.testing.assert_close(own.double() / scale, other / scale, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (63, 40), (1000, 7), (4097, 12), (3, 2049)])
def test_swiglu(shape, dtype):
    agree(swiglu, swiglu_file.reference, draws(shape, shape, dtype=dtype))


ROWS = {"one": lambda n: torch.zeros(n, dtype=torch.int64), "turns": lambda n: torch.arange(n) % 3,
        "blocks": lambda n: torch.arange(n) * 3 // max(1, n)}  # fmt: skip
# tokens and width, and how tokens spread over the rows; the last of the four rows has no token
CASES = [((0, 8), "one"), ((1, 3), "one"), ((63, 40), "turns"), ((63, 40), "blocks"), ((1000, 7), "blocks"),
         ((4097, 12), "turns"), ((3, 1100), "turns"), ((40, 1100), "one"), ((5, 5000), "turns")]  # fmt: skip


def modulated(case, tensors, rows, dtype):
    """So many tensors [N, D], so many of modulation rows [4, D] as views of one tensor, and the tokens' rows."""
    (tokens, width), spread = case
    drawn = draws(*[(tokens, width)] * tensors, dtype=dtype)
    views = draws((4, rows * width), dtype=dtype, seed=1)[0].chunk(rows, dim=-1)
    return [*drawn, *views], ROWS[spread](tokens).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("case", [*CASES, ((3, 2100), "turns")], ids=str)
def test_gated_residual(case, bounded, dtype):
    inputs, row = modulated(case, 2, 1, dtype)
    run, reference = (
        lambda *x, f=f: f(*x, row, bounded) for f in (gated_residual, gated_residual_file.reference)
    )  # fmt: skip
    agree(run, reference, inputs)


def shifted(f, row):
    """f(x, scale, shift) of a norm_modulate."""
    return lambda x, scale, shift=None: f(x, scale, row, 1e-6, shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["scale", "scale and shift"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_modulate(case, rows, dtype):
    (x, *views), row = modulated(case, 1, rows, dtype)
    agree(shifted(norm_modulate, row), shifted(norm_file.reference, row), [x * 3 + 1, *views])


def both(f, row, bounded):
    """f(x, y, gate, scale, shift) of a residual_norm, both outputs as one tensor."""
    return lambda x, y, gate, scale, shift=None: torch.stack(f(x, y, gate, scale, row, 1e-6, shift, bounded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, bounded", [(2, True), (3, False)], ids=["2.1", "1.x"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_norm(case, rows, bounded, dtype):
    inputs, row = modulated(case, 2, rows, dtype)
    pair = both(residual_norm, row, bounded), both(residual_norm_file.reference, row, bounded)
    agree(*pair, inputs, roundings=2)


def turned(f, angle):
    """f(x, weight) of a qk_norm_rope."""
    cos, sin = angle.cos(), angle.sin()
    return lambda x, weight: f(x, weight, cos, sin, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 2), (63, 3, 20), (1000, 5, 6), (4097, 2, 4), (9, 24, 128)])
def test_qk_norm_rope(shape, dtype):
    x, weight, angle = draws(shape, shape[2:], (shape[0], shape[2] // 2))
    run, reference = turned(qk_norm_rope, angle), turned(rope_file.reference, angle)
    agree(run, reference, [x.to(dtype), weight.to(dtype)])


@pytest.mark.parametrize("tokens, width", [(0, 8), (137, 40), (1500, 1100)])
def test_chunks_cover_every_token_once_whatever_the_order_of_rows(tokens, width):
    row = torch.tensor([3, 0, 3] * 500 + [5] * 17 + [0] * 4, device=DEVICE)[-tokens or None :][:tokens]
    tile = Tile.of(width)
    chunks = Chunks(row, 6, tile, width)
    assert chunks.size >= tile.tokens and len(chunks.spans) == tokens // chunks.size + 6
    seen = []
    for own, begin, end in chunks.spans.tolist():
        assert end - begin <= chunks.size
        seen += [(token, own) for token in chunks.order[begin:end].tolist()]
    assert sorted(seen) == list(enumerate(row.tolist()))
    owners = chunks.spans[:, 0].tolist()
    first = chunks.first.tolist()
    assert first[-1] == len(owners) and owners == [r for r in range(6) for _ in range(first[r], first[r + 1])]


@pytest.mark.parametrize(
    "tile, sizes",
    [({}, [1, 4, 16, 64]), ({"threads": 2}, [1, 8, 32, 64]), ({"widest": 1024}, [1, 4, 16, 64])],
    ids=["norm", "norm and residual", "residual"],
)
def test_more_tokens_make_larger_chunks_once_every_multiprocessor_has_warps(tile, sizes):
    """At the width of 2.1: 1,024 tokens and more give 2,048 warps, 16 for each of 132 multiprocessors or a few less."""
    tile = Tile.of(4096, **tile)
    for tokens, size in zip((64, 1024, 4096, 16384), sizes, strict=True):
        chunks = Chunks(torch.zeros(tokens, dtype=torch.int64, device=DEVICE), 1, tile, 4096)
        assert chunks.size == size
        assert tokens == 64 or tokens // chunks.size * chunks.grid[1] * tile.warps >= 2048


def strided(*shapes, dtype=torch.float32):
    """Tensors whose last dimension is not contiguous."""
    return [x.transpose(0, -1).contiguous().transpose(0, -1) for x in draws(*shapes, dtype=dtype)]


def test_tensors_of_any_strides_are_read_correctly():
    row = ROWS["turns"](63).to(DEVICE)
    every_other = torch.stack([row, row + 1], 1).reshape(-1)[::2]
    assert every_other.stride() == (2,)
    x, y, gate, scale, shift = strided((63, 40), (63, 40), (4, 40), (4, 40), (4, 40))
    agree(swiglu, swiglu_file.reference, [x, y])
    agree(
        lambda *t: gated_residual(*t, every_other), lambda *t: gated_residual_file.reference(*t, row), [x, y, gate]
    )  # fmt: skip
    agree(shifted(norm_modulate, every_other), shifted(norm_file.reference, row), [x, scale, shift])
    pair = both(residual_norm, every_other, True), both(residual_norm_file.reference, row, True)
    agree(*pair, [x, y, gate, scale.contiguous(), shift])  # rows of unequal strides
    x, angle = strided((9, 6, 20), (9, 10))
    assert x.stride(-1) != 1 and angle.stride(-1) != 1
    agree(turned(qk_norm_rope, angle), turned(rope_file.reference, angle), [x, draws((40,))[0][::2]])
    out_a, out_b, lse_a, lse_b = strided((9, 6, 20), (9, 6, 20), (9, 6), (9, 6))
    theirs = merge_file.reference(out_a, lse_a, out_b, lse_b)
    rows = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (lse_a[None], lse_b[None])
    ]  # heads first, as flash has it
    ours = out_a.contiguous(), rows[0][0]
    merge_attention_(*ours, out_b, rows[1][0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_shapes_that_do_not_fit_are_refused_before_a_kernel_reads_beyond_them():
    x, scale, angle = draws((5, 6), (3, 8), (4, 3))
    row = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for call in (
        lambda: norm_modulate(x, scale, row),
        lambda: norm_modulate(x, scale[:, :6], row[:4]),
        lambda: gated_residual(x, x[:4], scale[:, :6], row),
        lambda: residual_norm(x, x, scale[:, :6], scale[:2, :6], row),
        lambda: qk_norm_rope(x[:, None], x[0], angle.cos(), angle.sin()),
        lambda: swiglu(x, x[:4]),
        lambda: merge_attention_(x[:, None], x[:, :1], x[:4, None], x[:4, :1]),
    ):
        with pytest.raises(AssertionError, match="Size"):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (63, 3, 20), (1000, 1, 7), (4097, 1, 3), (5, 2, 128)])
def test_merge_attention(shape, dtype):
    out_a, out_b = draws(shape, shape, dtype=dtype)
    lse_a, lse_b = (5 * x for x in draws(shape[:-1], shape[:-1], seed=1))
    wanted, wanted_lse = merge_file.reference(*(x.double() for x in (out_a, lse_a, out_b, lse_b)))
    out, lse = out_a.clone(), lse_a.clone()
    torch.library.opcheck(torch.ops.qirl.merge_attention_.default, (out_a.clone(), lse_a.clone(), out_b, lse_b))
    merge_attention_(out, lse, out_b, lse_b)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantise_rows(dtype, parts):
    tensors = [x[:, :20] for x in draws(*[(7, 24)] * parts)]  # rows with a stride of their own
    tensors[0][3] = 0
    values, scale = quantise_file.quantise_rows(tensors, dtype)
    wanted, wanted_scale = quantise_file.reference(tensors, dtype)
    assert values.dtype == dtype and values.shape == (7, 20 * parts)
    torch.testing.assert_close(scale, wanted_scale)
    values, wanted = values.float(), wanted.float()
    if DEVICE == "cpu":  # the interpreter loses the carry where rounding reaches the next power of two
        carried = wanted.frexp().mantissa.abs() == 0.5
        values = torch.where(carried, wanted, values)
    apart = values != wanted  # a tie may fall to the other side: the quotients' last bits
    assert apart.float().mean() < 0.02 and ((values - wanted).abs() <= 2 * torch.finfo(dtype).eps * wanted.abs()).all()


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


def _rows(tokens, *shapes):
    return [*draws(*shapes), torch.arange(tokens, device=DEVICE) * 7 % 3]


# the op, its inputs at so many tokens, and which of them have gradients
OPS = {
    "swiglu": (torch.ops.qirl.swiglu, lambda n: draws((n, 40), (n, 40)), (0, 1)),
    "gated_residual": (torch.ops.qirl.gated_residual, lambda n: _rows(n, (n, 40), (n, 40), (3, 40)), (0, 1, 2)),
    "gated_residual, plain": (
        torch.ops.qirl.gated_residual, lambda n: [*_rows(n, (n, 40), (n, 40), (3, 40)), False], (0, 1, 2),
    ),
    "norm_modulate": (torch.ops.qirl.norm_modulate, lambda n: [*_rows(n, (n, 40), (3, 40)), 1e-6], (0, 1)),
    "norm_modulate, shifted": (
        torch.ops.qirl.norm_modulate, lambda n: [*_rows(n, (n, 40), (3, 40)), 1e-6, *draws((3, 40))], (0, 1, 4),
    ),
    "residual_norm": (
        torch.ops.qirl.residual_norm, lambda n: [*_rows(n, (n, 40), (n, 40), (3, 40), (3, 40)), 1e-6], (0, 1, 2, 3),
    ),
    "residual_norm, shifted and plain": (
        torch.ops.qirl.residual_norm,
        lambda n: [*_rows(n, (n, 40), (n, 40), (3, 40), (3, 40)), 1e-6, *draws((3, 40)), False],
        (0, 1, 2, 3, 6),
    ),
    "qk_norm_rope": (torch.ops.qirl.qk_norm_rope, lambda n: [*draws((n, 2, 8), (8,), (n, 4), (n, 4)), 1e-6], (0, 1)),
}  # fmt: skip


def op_with_leaves(name, tokens):
    """The op, its inputs, and those of them that require gradients."""
    op, inputs, places = OPS[name][0], OPS[name][1](tokens), OPS[name][2]
    return op, inputs, [inputs[place].requires_grad_() for place in places]


def run_with_gradients(run, inputs, leaves):
    outputs = torch.utils._pytree.tree_leaves(run(*inputs))
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*outputs, *(torch.autograd.grad(outputs, leaves, douts) if leaves else ())]


@pytest.mark.parametrize("op", OPS)
def test_the_op_is_well_registered(op):
    run, inputs, _ = op_with_leaves(op, 5)
    torch.library.opcheck(run.default, inputs)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits_and_gradients(op):
    run, inputs, leaves = op_with_leaves(op, 300)
    for one, two in zip(*(run_with_gradients(run, inputs, leaves) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("op", OPS)
def test_an_op_compiles_without_a_graph_break(op):
    torch.compiler.reset()  # each op anew: past recompilations count against a limit
    run, inputs, leaves = op_with_leaves(op, 5)
    compiled = torch.compile(lambda *x: run(*x), fullgraph=True, backend="aot_eager")
    ours, plain = (run_with_gradients(f, inputs, leaves) for f in (compiled, run))
    for one, two in zip(ours, plain, strict=True):
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
    ends = torch.tensor([0, -1], device=DEVICE)
    torch.testing.assert_close(  # tanh(9) is 6e-8 below 1
        gated_residual(x, y, gate, row)[ends],
        gated_residual_file.reference(x[ends], y[ends], gate, row[ends]),
        **TOLERANCE[x.dtype],
    )
    torch.testing.assert_close(
        norm_modulate(x, scale, row)[-1], norm_file.reference(x[-1:], scale[1:], row[:1], 1e-6)[0], **TOLERANCE[x.dtype]
    )
    assert torch.equal(swiglu(y, x)[-1], swiglu_file.reference(y[-1:], x[-1:])[0])


def test_float64_and_auto_without_a_gpu_stay_with_the_reference(monkeypatch):
    x = draws((3, 4))[0].double()
    assert tritons.on(swiglu_file._forward, x) == {}
    if DEVICE == "cpu":
        monkeypatch.setenv("QIRL_KERNELS", "auto")
        assert tritons.on(swiglu_file._forward, x.float()) == {}
