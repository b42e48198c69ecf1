"""What a run keeps in memory: activations that run again, frozen weights in their own dtype, and what --dry-run says of it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import colours, train_config
from torch.distributed._tools.mem_tracker import MemTracker

import qirl
from qirl import plan as planning
from qirl.costs import activation_bytes
from qirl.data import images, prompts
from qirl.errors import UserError
from qirl.models.adapter_files import read_adapter
from qirl.models.architecture import recompute
from qirl.models.quantised import FrozenLinear
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.models.weights import load_model, save_model
from qirl.packing import Condition, Target, pack
from qirl.plan import plan
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("fp8", 0.04)])
def test_a_base_in_8_bits_is_near_the_true_one_and_its_gradients_are_those_of_what_it_stands_for(
    tmp_path, name, kind, error
):
    config = MODELS[name][1]
    whole, folder = MODELS[name][0](config).double(), tmp_path / "model"
    save_model(config, whole.state_dict(), folder)
    rounded = load_model(folder, torch.float64, base=kind)
    _, _, body, x, t = inputs(MODELS[name][2], tokens=4)
    x = x.double().requires_grad_()
    true, v = whole(body, x, t), rounded(body, x, t)
    assert 0 < float((v - true).norm() / true.norm()) < error
    layers = [m for m in rounded.modules() if isinstance(m, FrozenLinear)]
    assert len(layers) > 30 and {m.weight.element_size() for m in layers} == {1}
    state = dict(whole.state_dict())
    state |= {f"{n}.weight": m.whole(torch.float64) for n, m in rounded.named_modules() if isinstance(m, FrozenLinear)}
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(body, x, t), v, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(m(body, x, t).square().sum(), x) for m in (whole, rounded))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_run_on_a_base_in_8_bits_exports_its_adapters_over_the_weights_of_the_file(tmp_path, tiny_model, kind):
    config = train_config(tmp_path / "run", tiny_model, LORA, {"model": {"base": kind}})
    train(config, [colours], quiet=True)
    before, after = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (tiny_model, tmp_path / "run/model"))
    adapter = read_adapter(tmp_path / "run/adapter")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if low := adapter.matrices.get(name.removesuffix(".weight")):
            value = (value.double() + low.scale * low.b.double() @ low.a.double()).to(value.dtype)
        assert torch.equal(after[name], value), name
    planned = plan(config)["memory"]["weights"]
    assert (
        planned
        < plan(config.model_copy(update={"model": config.model.model_copy(update={"base": "dtype"})}))["memory"][
            "weights"
        ]
    )


def test_8_bits_are_for_frozen_weights(tmp_path, tiny_model):
    with pytest.raises(UserError, match="model.base=int8 is for a base that LoRA leaves frozen; set model.lora.rank"):
        train_config(tmp_path, tiny_model, {"model": {"base": "int8"}})


@pytest.mark.parametrize(
    "parts, room, advice",
    [
        ({}, 10**9, None),
        ({}, 0.7, "set model.checkpointing=block$"),
        ({}, 0.45, "set model.checkpointing=block policy.micro_tokens="),
        (LORA, 1e-6, "use more ranks, or a recipe for a smaller GPU"),
    ],
)
def test_a_gpu_that_is_too_small_is_told_before_loading_with_what_would_fit(
    tmp_path, tiny_model, monkeypatch, capsys, parts, room, advice
):
    config = train_config(
        tmp_path / "run", tiny_model, {"policy": {"micro_tokens": 3000, "prompts": 8, "group": 6}}, parts
    )
    need = plan(config)["memory"]["total"]
    monkeypatch.setattr(planning, "gpu_memory", lambda config: int(need * room))
    if advice is None:
        planning.refuse_too_large(config, 1)
    else:
        with pytest.raises(UserError, match=f"this run needs about .*iB on each GPU .*, which has .*; {advice}"):
            qirl.train(config.model_dump(mode="json", exclude_unset=True), [colours], quiet=True)
        assert not (tmp_path / "run").exists()
    planning.print_plan(config)
    assert ("too little" in capsys.readouterr().out) == bool(advice)


def reads_of(values, room, monkeypatch) -> list[str]:
    """The files that a run opens for its prompts, on a GPU of `room` bytes (None: without one)."""
    reads, read_lines, opened = [], prompts.read_lines, images._opened
    with monkeypatch.context() as patch:
        patch.setattr(planning, "gpu_memory", lambda config=None: room)
        patch.setattr(prompts, "LAST", {})
        patch.setattr(images, "_remembered", lambda file, _: images.read_image(file))  # nothing stays in memory
        patch.setattr(images, "_opened", lambda *given: reads.append(given[1]) or opened(*given))
        patch.setattr(prompts, "read_lines", lambda path, what: reads.append(str(path)) or read_lines(path, what))
        qirl.train(values, [colours], quiet=True)
    return sorted(reads)


def test_a_run_on_a_gpu_reads_its_prompts_and_their_sources_once(folders, tmp_path, monkeypatch):
    """The plan that refuses a run too large comes before the run reads them."""
    rows = [{"text": f"make it {c}", "sources": [f"{c}.png"]} for c in ("red", "blue")]
    for row in rows:
        Image.new("RGB", (64, 48), row["text"][8:]).save(tmp_path / row["sources"][0])
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, room in (("cpu", None), ("gpu", 10**12)):
        monkeypatch.setenv("QIRL_CACHE", str(tmp_path / f"cache {name}"))
        values = {
            "run": {"out": str(tmp_path / name), "steps": 1, "samples_every": 0, "report": False},
            "world": {"name": "prompts", "task": "edit", "prompts": str(path), "resolution": 64},
            "model": {"path": str(folders("QwenImage21Pipeline"))}, "flow": {"steps": 2},
            "policy": {"prompts": 2, "group": 2, "timesteps": {"count": 1}},
        }  # fmt: skip
        found.append(reads_of(values, room, monkeypatch))
    assert found[0] == found[1] and found[0].count(str(path)) == 1


EIGHT = {"optimizer": {"kind": "adamw_8bit"}, "run": {"steps": 4, "checkpoint_every": 2}}


def test_moments_in_8_bits_train_and_continue_bit_for_bit(tmp_path, tiny_model):
    """Layers of 4,096 weights on have moments of one byte each; a run that stopped in step 3 ends as one that did not."""
    whole = train_config(tmp_path / "whole", tiny_model, EIGHT)
    engine = train(whole, [colours], quiet=True)
    state = engine.optimizer.adam.state
    small = [s for p, s in state.items() if p.numel() >= 4096]
    assert small and all(s["exp_avg"].codes.dtype == torch.uint8 for s in small)

    class Stopped(Exception):
        pass

    def stopping(samples):
        if samples[0].id >= 3 * 4 * 3:
            raise Stopped
        return colours(samples)

    again = train_config(tmp_path / "again", tiny_model, EIGHT, {"scoring": {"retries": 0}})
    with pytest.raises(UserError):
        train(again, [stopping], quiet=True)
    assert len(list((tmp_path / "again/checkpoints").glob("step_*"))) == 1
    train(again, [colours], quiet=True)
    bits = [(tmp_path / run / "model/diffusion_pytorch_model.safetensors").read_bytes() for run in ("whole", "again")]
    assert bits[0] == bits[1]
    plans = [
        plan(train_config(tmp_path, tiny_model, {"optimizer": {"kind": kind}}))["memory"]["optimizer"]
        for kind in ("adamw", "adamw_8bit")
    ]
    assert plans[1] < 0.26 * plans[0]
