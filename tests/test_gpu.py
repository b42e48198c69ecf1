"""What only a GPU can show: `python -m pytest -m gpu`."""

import warnings

import pytest
import torch

from qirl.config_sections import Flow
from qirl.flow.rollout import rollout
from qirl.kernels import philox
from qirl.models.attention import packed_attention
from qirl.models.attention_backends import BACKENDS
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.packing import Condition, Target, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = QwenImage21Config(
    in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2, context_in_dim=32,
    axes_dims_rope=(16, 24, 24),
)  # fmt: skip


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    conditions = [Condition(torch.randn(n, 32, generator=generator)) for n in (5, 9)]
    targets = [Target(0, 8, 8), Target(0, 8, 8), Target(1, 4, 6)]
    return (
        conditions,
        targets,
        torch.randn(152, 16, generator=generator).to(device),
        torch.rand(3, generator=generator).to(device),
    )


def test_velocity_and_gradients_equal_those_of_the_cpu():
    torch.manual_seed(0)
    model, results = QwenImage21(CONFIG), {}
    for device in ("cpu", "cuda"):
        conditions, targets, x, t = inputs(device)
        model.to(device).zero_grad()
        v = model(pack(conditions, targets, device=device), x, t)
        v.square().sum().backward()
        kept = [v, *(p.grad for p in model.parameters())]
        results[device] = [x.detach().to("cpu", copy=True) for x in kept]  # gradients move on with their model
    for got, expected in zip(results["cuda"], results["cpu"], strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm()  # float32 in another order, TF32 off by default


# attention of sequences long enough for every backend: text, a reference image, targets of two sizes
LAYOUTS = {
    "text": ([[("text", 300)], [("text", 70)]], [(0, 24, 24), (0, 24, 24), (1, 16, 20)]),
    "a reference": ([[("text", 7), ("image", 40, 32), ("text", 90)], [("text", 33)]], [(0, 40, 32), (0, 40, 32), (1, 8, 8)]),
    "two references": ([[("image", 8, 8), ("text", 5), ("image", 16, 12)]] * 2, [(0, 8, 8), (1, 8, 8), (1, 8, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_backends_equal_the_formula_with_gradients(name, dtype, layout):
    device = torch.device("cuda")
    why = BACKENDS[name].refusal(device, dtype, 64)
    if why:
        pytest.skip(why)
    layouts, targets = LAYOUTS[layout]
    images = lambda own: tuple(torch.zeros(b[1] * b[2], 4) for b in own if b[0] == "image")  # noqa: E731
    texts = [torch.zeros(sum(b[1] for b in own if b[0] == "text"), 4) for own in layouts]
    conditions = [Condition(text, images(own), tuple(own)) for text, own in zip(texts, layouts, strict=True)]
    whole, alone = (pack(conditions, [Target(*t) for t in targets], prefix, device) for prefix in (True, False))
    generator = torch.Generator("cuda").manual_seed(1)
    tensors = torch.randn(3, whole.tokens, 2, 64, device=device, generator=generator).to(dtype)
    weights = torch.randn(whole.tokens, 2, 64, device=device, generator=generator)

    def run(backend, inputs, packed, past=(None, None), weights=weights):
        leaves = [x.detach().requires_grad_() for x in (*inputs, *past) if x is not None]
        given = (*leaves[:3], *(leaves[3:] or past))
        out = packed_attention(*given, packed, backend)
        return [out, *torch.autograd.grad((out.float() * weights).sum(), leaves)]

    p = whole.prefix_tokens
    targets_alone = ([x[p:] for x in tensors], alone, [x[:p] for x in tensors[1:]], weights[p:])
    exact = [x.double() for x in tensors]
    exact_alone = ([x[p:] for x in exact], alone, [x[:p] for x in exact[1:]], weights[p:])
    backend, dense = BACKENDS[name], BACKENDS["dense"]
    got = run(backend, tensors, whole) + run(backend, *targets_alone)
    expected = run(dense, exact, whole) + run(dense, *exact_alone)
    limit = 0.01 if dtype == torch.bfloat16 else 1e-5  # bfloat16 keeps 8 bits
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.double() - theirs).norm() <= limit * theirs.norm()


def test_the_step_loop_never_waits_for_the_gpu():
    torch.manual_seed(0)
    model = QwenImage21(CONFIG).cuda()
    conditions, targets, *_ = inputs("cuda")
    null = Condition(torch.zeros(1, 32))

    def waits(steps: int) -> int:
        draws = philox.stream(0, [0, 0, 1], [0, 1, 0], 0, "cuda")
        flow = Flow(steps=steps, sampler="sde", guidance=2.0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                rollout(model, conditions, targets, draws, flow, [(1,), (0,), (2,)], [null, null])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)

    waits(4)
    assert waits(4) == waits(12)


def test_noise_on_the_gpu_has_the_words_of_the_cpu():
    row, token = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    cpu = philox.normal(philox.stream(3, [5], [1], 2), row, token, 16, 1, philox.INITIAL)
    gpu = philox.normal(philox.stream(3, [5], [1], 2, "cuda"), row.cuda(), token.cuda(), 16, 1, philox.INITIAL)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=2e-6)
