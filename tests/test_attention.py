"""packed_attention against dense-mask SDPA over all tokens, the mask built from the pack's token labels."""

import dataclasses

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from dense_varlen import DenseByBlock, DenseVarlen

from qirl.errors import UserError
from qirl.models.attention import Calls, packed_attention
from qirl.models.attention_backends import BACKENDS as BACKENDS_BY_NAME
from qirl.models.attention_backends import CpuFlash, Dense, automatic, use_attention
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack

HEADS, DIM = 2, 6
EXACT = 1e-10  # float64: sums in another order

# layouts of the prompts, targets as (prompt, height, width)
CASES = {
    "one text token, one target token": ([[("text", 1)]], [(0, 1, 1)]),
    "odd lengths": ([[("text", 3)], [("text", 7)], [("text", 1)]], [(0, 1, 7), (0, 1, 7), (1, 3, 11), (2, 1, 3), (2, 1, 1)]),
    "equal prompts in one batched call": ([[("text", 3)], [("text", 3)]], [(0, 3, 1), (0, 3, 1), (1, 3, 1), (1, 3, 1)]),
    "reference images": (
        [[("text", 2), ("image", 3, 1), ("image", 1, 7), ("text", 1)], [("image", 3, 11), ("text", 3)]],
        [(0, 3, 1), (0, 1, 7), (1, 3, 11)],
    ),
    "an empty prefix beside a full one": ([[], [("text", 3)]], [(0, 1, 3), (1, 1, 3), (1, 1, 3)]),
    "no prefix at all": ([[]], [(0, 1, 33), (0, 3, 1)]),
    "a prompt without targets": ([[("text", 3)], [("text", 7)]], [(1, 1, 3)]),
    "prefix only": ([[("text", 3), ("image", 3, 3)], [("text", 33)], [("text", 7), ("image", 1, 1), ("text", 1)]], []),
}  # fmt: skip


BACKENDS = [CpuFlash(), Dense(), DenseByBlock(), DenseVarlen()]


def build(case):
    layouts, targets = CASES[case]
    conditions = []
    for layout in layouts:
        text = torch.zeros(sum(b[1] for b in layout if b[0] == "text"), 4)
        images = tuple(torch.zeros(b[1] * b[2], 4) for b in layout if b[0] == "image")
        conditions.append(Condition(text, images, tuple(layout)))
    return conditions, [Target(*t) for t in targets]


def mask_of(packed):
    """bool [N, N], query by key: what a token may see, from its labels alone."""
    n = packed.tokens
    place = torch.arange(n)
    prompt = packed.prompt[:, None] == packed.prompt[None]
    block = (packed.block[:, None] == packed.block[None]) & (packed.target[:, None] == packed.target[None])
    same_image = block & (packed.block[:, None] >= 0)
    key_in_prefix = (packed.target < 0)[None]
    earlier = (place[None] <= place[:, None]) & key_in_prefix
    return prompt & (same_image | earlier)


def dense(q, k, v, mask):
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)[0].transpose(0, 1)


def draw(n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def gradients(run, tensors, weights):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(*leaves)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def worst(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_a_masked_softmax(case, backend):
    packed = pack(*build(case))
    q, k, v, weights = draw(packed.tokens, seed=1)
    mask = mask_of(packed)
    expected = gradients(lambda *qkv: dense(*qkv, mask), (q, k, v), weights)
    got = gradients(lambda *qkv: packed_attention(*qkv, None, None, packed, backend), (q, k, v), weights)
    assert worst(got[0], expected[0]) <= EXACT
    for name, mine, theirs in zip("qkv", got[1], expected[1], strict=True):
        assert worst(mine, theirs) <= EXACT, name


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][1]])
def test_targets_on_kept_keys_and_values_equal_a_masked_softmax(case, backend):
    """Values, and the gradients of q, k, v, past_k and past_v, as rollout and the seam of the update use them."""
    conditions, targets = build(case)
    whole, packed = pack(conditions, targets), pack(conditions, targets, prefix=False)
    p = whole.prefix_tokens
    q, k, v, weights = draw(whole.tokens, seed=2)
    mask = mask_of(whole)[p:]
    tensors = (q[p:], k[p:], v[p:], k[:p], v[:p])
    expected = gradients(
        lambda q, k, v, past_k, past_v: dense(q, torch.cat([past_k, k]), torch.cat([past_v, v]), mask),
        tensors,
        weights[p:],
    )
    got = gradients(lambda *five: packed_attention(*five, packed, backend), tensors, weights[p:])
    assert worst(got[0], expected[0]) <= EXACT
    for name, mine, theirs in zip(("q", "k", "v", "past_k", "past_v"), got[1], expected[1], strict=True):
        if theirs.numel():
            assert worst(mine, theirs) <= EXACT, name


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_a_last_dimension_that_is_not_contiguous_is_read_correctly(backend):
    """The raw flash op takes stride 1 for granted: it would read other numbers, in silence, forward and backward."""
    conditions, targets = build("reference images")
    whole, packed = pack(conditions, targets), pack(conditions, targets, prefix=False)
    p = whole.prefix_tokens
    q, k, v, weights = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in draw(whole.tokens, seed=3))
    assert q.stride(-1) != 1
    mask = mask_of(whole)
    expected = gradients(lambda *qkv: dense(*qkv, mask), (q, k, v), weights)
    got = gradients(lambda *qkv: packed_attention(*qkv, None, None, whole, backend), (q, k, v), weights)
    assert max(worst(a, b) for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True)) <= EXACT
    out = packed_attention(q[p:], k[p:], v[p:], k[:p], v[:p], packed, backend)
    assert worst(out, expected[0][p:]) <= EXACT


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_bfloat16_stays_within_its_rounding_of_float32(backend):
    """Inputs equal in both; outputs round to 8 bits (2^-9 relative), after at most two roundings of parts: 2^-6."""
    packed = pack(*build("reference images"))
    q, k, v, weights = draw(packed.tokens, seed=4, dtype=torch.bfloat16)
    run = lambda *qkv: packed_attention(*qkv, None, None, packed, backend)  # noqa: E731
    half = gradients(run, (q, k, v), weights)
    full = gradients(run, [x.float() for x in (q, k, v)], weights.float())
    assert half[0].dtype == torch.bfloat16
    for mine, theirs in zip((half[0], *half[1]), (full[0], *full[1]), strict=True):
        assert ((mine.float() - theirs).norm() / theirs.norm()).item() <= 2**-6


def test_spans_that_leave_tokens_out_are_caught():
    packed = pack(*build("odd lengths"))
    q, k, v, _ = draw(packed.tokens, seed=5)
    with pytest.raises(AssertionError, match="cover"):
        packed_attention(q, k, v, None, None, dataclasses.replace(packed, own=packed.own[:-1], memo={}))


def test_a_backend_that_cannot_serve_is_refused_with_those_that_can():
    model, device = QwenImage21(tiny_runs.architecture()), torch.device("cpu")
    for name, why in (("cudnn", "needs a CUDA device"), ("flash_attn", "needs the package flash-attn")):
        if BACKENDS_BY_NAME[name].refusal(device, torch.float32, 16) is None:
            continue
        with pytest.raises(
            UserError, match=f"model.attention={name} {why}.*float32 with heads of 16 on cpu: use auto, cpu, dense"
        ):
            use_attention(model, name, device, torch.float32)
    use_attention(model, "dense", device, torch.float32)
    assert model.transformer_blocks[0].attn.backend is BACKENDS_BY_NAME["dense"]
    assert automatic(device, torch.bfloat16, 128) == "cpu"


def test_long_images_go_to_cudnn_and_text_does_not():
    conditions = [
        Condition(torch.zeros(40, 4), (torch.zeros(400, 4),), (("text", 30), ("image", 20, 20), ("text", 10)))
    ]
    fastest = BACKENDS_BY_NAME["fastest"]
    for pad in (1, 128):
        calls = Calls.of(pack(conditions, [Target(0, 20, 20)] * 2, pad=pad), "cpu", fastest.by_block)
        chosen = [type(fastest._choice(call)).__name__ for call in (*calls.own, *calls.past)]
        # own: text, images; the past of image and targets: text before and behind the image, the image
        assert chosen[:2] == ["TorchFlash", "Cudnn"]
        assert sorted(chosen[2:]) == ["Cudnn"] + ["TorchFlash"] * (len(chosen) - 3) and len(chosen) >= 5
