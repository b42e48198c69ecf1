"""The dual-stream transformer on joint packs against diffusers' module, random weights, float32 (relative norms)."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from qirl.errors import UserError
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.packing import Condition, Target, pack_joint

CONFIG = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=32, num_attention_heads=2,
    joint_attention_dim=48, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
VELOCITY, GRADIENT = 1e-5, 1e-4  # float32 sums in another order

# per prompt: text tokens, sizes of its references; then targets (prompt, height, width): odd sizes, mixed in one pack
CASES = {
    "text to image": (((5, ()),), ((0, 4, 4), (0, 4, 4), (0, 3, 5))),
    "two prompts": (((7, ()), (3, ())), ((0, 2, 7), (1, 4, 3), (1, 4, 3))),
    "one reference": (((6, ((4, 5),)),), ((0, 4, 4), (0, 3, 3))),
    "references of several sizes": (((6, ((4, 5), (2, 2), (3, 1))), (4, ())), ((0, 3, 4), (1, 5, 2))),
}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def make_models(**changes):
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**CONFIG, **changes)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms away from their trivial start
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = QwenImage(QwenImageConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "zero_cond_t"])
def models(request):
    return make_models(zero_cond_t=request.param)


def draw(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gauss = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    prompts, targets = CASES[case]
    conditions = [
        Condition(gauss(n, 48), tuple(gauss(h * w, 16) for h, w in sizes), (("text", n), *(("image", *s) for s in sizes)))
        for n, sizes in prompts
    ]  # fmt: skip
    targets = [Target(*t) for t in targets]
    latents = [gauss(t.tokens, 16) for t in targets]
    return conditions, targets, latents, torch.rand(len(targets), generator=generator)


def theirs_alone(model, condition, target, latents, t):
    """diffusers' forward for one target."""
    sizes = [(1, target.height, target.width), *((1, *size) for kind, *size in condition.layout if kind == "image")]
    out = model(
        hidden_states=torch.cat([latents, *condition.references])[None].to(model.dtype),
        encoder_hidden_states=condition.text[None].to(model.dtype),
        timestep=t[None],
        img_shapes=[sizes],
        return_dict=False,
    )[0][0]
    return out[: target.tokens]


@pytest.mark.parametrize("case", CASES)
def test_velocities_and_every_gradient_equal_those_of_diffusers(models, case):
    theirs, ours = models
    conditions, targets, latents, t = draw(case)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in latents]
    expected = [
        theirs_alone(theirs, conditions[target.prompt], target, x, s)
        for target, x, s in zip(targets, latents, t, strict=True)
    ]
    got = ours(pack_joint(conditions, targets), torch.cat(latents), t)
    assert relative(got, torch.cat(expected)) <= VELOCITY
    for model, v in ((theirs, torch.cat(expected)), (ours, got)):
        model.zero_grad()
        (v * torch.cat(weights)).sum().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = reference[name].grad
        if expected is None or expected.norm() == 0:  # the last block's text is never read
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert relative(parameter.grad, expected) <= GRADIENT, name


@pytest.mark.parametrize("case", CASES)
def test_a_target_does_not_depend_on_what_shares_its_pack(models, case):
    _, ours = models
    conditions, targets, latents, t = draw(case)
    with torch.no_grad():
        together = ours(pack_joint(conditions, targets), torch.cat(latents), t).split([x.tokens for x in targets])
        for i, target in enumerate(targets):
            alone = pack_joint([conditions[target.prompt]], [Target(0, target.height, target.width)])
            assert relative(together[i], ours(alone, latents[i], t[i : i + 1])) <= 1e-6


def test_the_reference_is_modulated_at_zero_where_the_config_says_so():
    """Otherwise both would be the same model."""
    plain, zero = make_models()[1], make_models(zero_cond_t=True)[1]
    conditions, targets, latents, t = draw("one reference")
    with torch.no_grad():
        a, b = (model(pack_joint(conditions, targets), torch.cat(latents), t) for model in (plain, zero))
    assert relative(a, b) > 1e-3


def test_bfloat16_feeds_the_time_embedding_of_diffusers():
    theirs, ours = (model.to(torch.bfloat16) for model in make_models())
    t = (torch.tensor([812.5, 20.3]).to(torch.bfloat16)) / 1000  # as the pipeline hands it on
    expected = theirs.time_text_embed(t, torch.zeros(1, dtype=torch.bfloat16))
    assert torch.equal(ours.time_text_embed(t), expected)


def test_names_are_those_of_diffusers():
    theirs, ours = make_models()
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("guidance_embeds", True, "guidance_embeds=true is not supported"),
        ("use_layer3d_rope", True, "use_layer3d_rope=true is not supported"),
        ("axes_dims_rope", (8, 8, 8), "sum to attention_head_dim=32"),
        ("num_layers", 0, "num_layers=0 must be a whole number"),
        ("num_layer", 3, "'num_layer'=3 is not supported; did you mean 'num_layers'"),
    ],
)
def test_configs_of_other_models_are_refused_by_field(field, value, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        QwenImageConfig.from_dict(CONFIG | {field: value})


def test_targets_that_do_not_fit_are_refused():
    conditions, targets, latents, t = draw("two prompts")
    with pytest.raises(UserError, match="names condition 2 of 2"):
        pack_joint(conditions, [Target(2, 2, 2)])
    with pytest.raises(UserError, match="empty"):
        pack_joint(conditions, [Target(0, 0, 2)])
    with pytest.raises(UserError, match="one t per target"):
        make_models()[1](pack_joint(conditions, targets), torch.cat(latents), t[:1])
