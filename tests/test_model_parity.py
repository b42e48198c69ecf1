"""The packed transformer against diffusers' module, random weights, float32 (numbers: relative error of the norm)."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21KVCache,
    QwenImage21Transformer2DModel,
)
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift

from qirl.config_sections import Flow
from qirl.flow.grid import sigmas
from qirl.models.qwen_image_21 import QwenImage21, model_time
from qirl.models.weights import load_model, save_model
from qirl.packing import Condition, Target, pack

CONFIG = dict(
    in_channels=16, out_channels=16, num_layers=3, attention_head_dim=32, num_attention_heads=2, context_in_dim=48,
    axes_dims_rope=(8, 12, 12),
)  # fmt: skip
VELOCITY, GRADIENT = 1e-5, 1e-4  # float32 sums in another order


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**CONFIG)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms away from their trivial start
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def condition(generator, layout):
    """Random text states and reference latents for a layout."""
    text = sum(block[1] for block in layout if block[0] == "text")
    images = tuple(
        torch.randn(b[1] * b[2], CONFIG["in_channels"], generator=generator) for b in layout if b[0] == "image"
    )
    return Condition(torch.randn(text, CONFIG["context_in_dim"], generator=generator), images, tuple(layout))


def their_inputs(condition, target, latents, t):
    """The arguments of diffusers' forward for one sample; image slots of the text hold garbage on purpose."""
    mask, states, cursor, shapes = [], [], 0, []
    for kind, *size in condition.layout:
        if kind == "text":
            mask += [False] * size[0]
            states.append(condition.text[cursor : cursor + size[0]])
            cursor += size[0]
        else:
            slots = size[0] * size[1] // 4
            mask += [True] * slots
            states.append(torch.full((slots, CONFIG["context_in_dim"]), 7.0))
            shapes.append((1, *size))
    shapes.append((1, target.height, target.width))
    mask += [True] * (target.tokens // 4)
    return dict(
        hidden_states=torch.cat([*condition.references, latents])[None],
        encoder_hidden_states=torch.cat(states)[None],
        timestep=t.reshape(1),
        img_shapes=[shapes],
        img_mask=torch.tensor([mask]),
    )


def theirs_velocity(model, condition, target, latents, t, **kwargs):
    out = model(**their_inputs(condition, target, latents, t), return_dict=False, **kwargs)[0]
    return out[0, -target.tokens :]


CASES = {
    "t2i": ([[("text", 5)], [("text", 9)]], [(0, 4, 4), (0, 4, 4), (1, 4, 4), (1, 4, 4)]),
    "edit with one reference": ([[("text", 3), ("image", 4, 6), ("text", 4)]], [(0, 4, 6), (0, 4, 6)]),
    "edit with three references": (
        [[("text", 2), ("image", 4, 4), ("text", 1), ("image", 2, 6), ("image", 6, 4), ("text", 5)]],
        [(0, 6, 4), (0, 6, 4)],
    ),
    "mixed prompts and resolutions": (
        [[("text", 7)], [("text", 3), ("image", 4, 4), ("text", 4)], [("text", 1)], [("image", 2, 2), ("text", 2)]],
        [(0, 4, 4), (0, 6, 2), (1, 2, 8), (1, 4, 4), (2, 6, 6), (3, 2, 2), (3, 4, 4)],
    ),
}


def build(case, generator):
    layouts, targets = CASES[case]
    conditions = [condition(generator, layout) for layout in layouts]
    targets = [Target(*t) for t in targets]
    latents = [torch.randn(t.tokens, CONFIG["in_channels"], generator=generator) for t in targets]
    return conditions, targets, latents, torch.rand(len(targets), generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_velocity_and_every_gradient_equal_diffusers(models, case):
    theirs, ours = models
    generator = torch.Generator().manual_seed(1)
    conditions, targets, latents, t = build(case, generator)
    expected = torch.cat(
        [theirs_velocity(theirs, conditions[k.prompt], k, x, s) for k, x, s in zip(targets, latents, t, strict=True)]
    )
    got = ours(pack(conditions, targets), torch.cat(latents), t)
    assert relative(got, expected) <= VELOCITY
    weights = torch.randn(expected.shape, generator=generator)
    theirs.zero_grad()
    ours.zero_grad()
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    reference = dict(theirs.named_parameters())
    assert reference.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, reference[name].grad) <= GRADIENT, name


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_cached_targets_equal_the_full_forward(models, case):
    theirs, ours = models
    conditions, targets, latents, t = build(case, torch.Generator().manual_seed(2))
    past = ours(pack(conditions, []))
    got = ours(pack(conditions, targets, prefix=False), torch.cat(latents), t, past)
    full = ours(pack(conditions, targets), torch.cat(latents), t)
    assert relative(got, full) <= 1e-6
    cache = QwenImage21KVCache(CONFIG["num_layers"])
    theirs_velocity(theirs, conditions[0], targets[0], latents[0], t[0], kv_cache=cache, kv_cache_mode="extract")
    cached = theirs_velocity(
        theirs, conditions[0], targets[0], latents[0], t[0], kv_cache=cache, kv_cache_mode="cached"
    )
    assert relative(got[: targets[0].tokens], cached) <= VELOCITY


def test_gradients_through_a_kept_prefix_equal_the_full_backward(models):
    """The seam: one prefix pass, several target packs on detached leaves, one prefix backward."""
    ours = models[1]
    conditions, targets, latents, t = build("mixed prompts and resolutions", torch.Generator().manual_seed(3))
    ours.zero_grad()
    ours(pack(conditions, targets), torch.cat(latents), t).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    past = ours(pack(conditions, []))
    leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in past]
    for part in (slice(0, 3), slice(3, 7)):
        v = ours(pack(conditions, targets[part], prefix=False), torch.cat(latents[part]), t[part], leaves)
        v.square().sum().backward()
    kept = [
        (x, leaf.grad)
        for pair, pair_leaf in zip(past, leaves, strict=True)
        for x, leaf in zip(pair, pair_leaf, strict=False)
    ]
    torch.autograd.backward([x for x, _ in kept], [g for _, g in kept])
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[name]) <= 1e-5, name


def test_a_sample_does_not_depend_on_what_shares_its_pack(models):
    ours = models[1]
    conditions, targets, latents, t = build("mixed prompts and resolutions", torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = ours(pack(conditions, targets), torch.cat(latents), t).split([k.tokens for k in targets])
        for i, target in enumerate(targets):
            alone = ours(
                pack([conditions[target.prompt]], [Target(0, target.height, target.width)]), latents[i], t[i : i + 1]
            )
            assert relative(together[i], alone) <= 1e-6


@pytest.mark.parametrize("tokens, steps, differ", [(1024, 10, 2), (1024, 28, 6), (4096, 40, 12)])
def test_bfloat16_rounds_time_as_the_pipeline_of_diffusers_does(models, tmp_path, tokens, steps, differ):
    """Exported weights are sampled there; sigma rounded at once would be another noise level at `differ` of the steps."""
    theirs, _ = models
    theirs.save_pretrained(tmp_path)
    half = QwenImage21Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_model(tmp_path, torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )  # fmt: skip
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    fed = scheduler.timesteps.to(torch.bfloat16) / 1000  # as QwenImage21Pipeline.__call__ computes it
    t = torch.from_numpy(sigmas(tokens, Flow(steps=steps)))[:-1]
    assert torch.equal(model_time(t, torch.bfloat16), fed)
    assert int((t.to(torch.bfloat16) != fed).sum()) == differ
    _, got = ours._modulation(t, steps, "cpu")
    assert torch.equal(got[1:], half.time_text_embed(fed, torch.zeros(1, dtype=torch.bfloat16)))


def test_time_stays_exact_in_float32():
    t = torch.rand(1000)
    assert torch.equal(model_time(t, torch.float32), t)


def test_sharded_folders_load_and_save_both_ways(models, tmp_path):
    theirs, ours = models
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    save_model(ours.config, ours.state_dict(), tmp_path / "ours", max_shard="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    read = load_model(tmp_path / "theirs").state_dict()
    back = QwenImage21Transformer2DModel.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(read[name], value) and torch.equal(back[name], value), name


def test_rotary_tables_are_those_of_the_cpu_wherever_the_model_is_made(models):
    """Made on another device, or cast with the model, they would differ in the last bits."""
    expected = models[1].rope.tables[torch.device("cpu")]
    with torch.device("meta"):
        made = QwenImage21(models[1].config).to(torch.bfloat16)
    for (cos, sin), (c, s) in zip(made.rope.tables[torch.device("cpu")], expected, strict=True):
        assert cos.dtype == torch.float32 and torch.equal(cos, c) and torch.equal(sin, s)
    positions = torch.tensor([[0, -3, 5], [70, 2, -9]])
    cos, sin = models[1].rope(positions)
    theirs = models[0].pos_embed.freqs
    expected = torch.cat([f[p] for f, p in zip(theirs, positions.unbind(-1), strict=True)], -1)
    torch.testing.assert_close(torch.complex(cos, sin), expected, rtol=0, atol=2e-7)
