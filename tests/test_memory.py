"""What a run keeps in memory: activations that run again, frozen weights in their own dtype, and what --dry-run says of it."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import colours, train_config
from torch.distributed._tools.mem_tracker import MemTracker

from qirl.costs import activation_bytes
from qirl.models.architecture import recompute
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.packing import Condition, Target, pack
from qirl.policy.packs import Layout
from qirl.policy.trainer import open_trainer, train

SIZE = dict(num_layers=6, attention_head_dim=32, num_attention_heads=8, axes_dims_rope=(8, 12, 12))
MODELS = {
    "2.1": (QwenImage21, QwenImage21Config(in_channels=16, out_channels=16, context_in_dim=64, **SIZE), True),
    "1.x": (QwenImage, QwenImageConfig(in_channels=16, out_channels=4, joint_attention_dim=64, **SIZE), False),
}
MODES = ("none", "attention", "block")


def inputs(shared, tokens=16):
    generator = torch.Generator().manual_seed(0)
    conditions = [Condition(torch.randn(40, 64, generator=generator), shared=shared) for _ in range(2)]
    targets = [Target(i, tokens, tokens) for i in range(2) for _ in range(3)]
    body = pack(conditions, targets)
    x = torch.randn(body.target_tokens, 16, generator=generator)
    return conditions, targets, body, x, torch.rand(len(targets), generator=generator)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_the_plan_is_what_torch_counts_within_ten_percent(name, mode):
    """Weights, gradients and activations at the peak of the second pack of a step, when gradients are all there."""
    kind, config, shared = MODELS[name]
    model = kind(config)
    recompute(model, mode)
    conditions, _, body, x, t = inputs(shared)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            model(body, x, t).square().sum().backward()
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    planned = activation_bytes(model.to("meta"), Layout(conditions, (), [], 0, seam=False), body)
    assert 2 * weights + planned == pytest.approx(real, rel=0.1)
    assert model.transformer_blocks[0].recompute == (mode == "block")  # as it was


@pytest.mark.parametrize("name", MODELS)
def test_what_runs_again_gives_the_same_gradients_bit_for_bit(name):
    kind, config, shared = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    conditions, targets, body, x, t = inputs(shared, tokens=4)
    found = {}
    for mode in MODES:
        recompute(model, mode)
        model(body, x, t).square().sum().backward()
        if shared:  # and through the keys and values of a prefix that ran before
            past = model(pack(conditions, []))
            model(pack(conditions, targets, prefix=False), x, t, past).square().sum().backward()
        found[mode] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert found["none"]
    for mode in MODES[1:]:
        assert found[mode].keys() == found["none"].keys()
        assert all(torch.equal(found[mode][n], g) for n, g in found["none"].items()), mode


LORA = {"model": {"dtype": "bfloat16", "lora": {"rank": 2}}, "run": {"steps": 2}}


@pytest.mark.parametrize("base, kind", [("dtype", torch.bfloat16), ("float32", torch.float32)])
def test_a_frozen_base_stays_in_its_own_dtype_and_adapters_are_float32(tmp_path, tiny_model, base, kind):
    config = train_config(tmp_path / "run", tiny_model, LORA, {"model": {"base": base}})
    model = open_trainer(config, [colours]).engine.model
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {kind}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(config, [colours], quiet=True)
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for value in adapter.values())


@pytest.mark.parametrize(
    "parts", [{}, LORA, {"policy": {"micro_tokens": 60}}], ids=["full", "LoRA in bfloat16", "seam"]
)
def test_a_run_with_activation_checkpointing_trains_to_the_same_weights(tmp_path, tiny_model, parts):
    found = []
    for mode in ("none", "block"):
        config = train_config(
            tmp_path / mode, tiny_model, {"run": {"steps": 2}}, parts, {"model": {"checkpointing": mode}}
        )
        train(config, [colours], quiet=True)
        found.append((tmp_path / mode / "model/diffusion_pytorch_model.safetensors").read_bytes())
    assert found[0] == found[1]
