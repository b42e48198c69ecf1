"""The numbers of --dry-run against what really runs: torch's own FLOP counter, real models, real packs."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CHANNELS, SDE, TEXT_DIM, architecture, colours, merge, pretrain_config, train_config
from torch.utils.flop_counter import FlopCounterMode

from qirl.config import load
from qirl.costs import activation_bytes, forward_flops
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack
from qirl.plan import plan
from qirl.policy.packs import Layout
from qirl.policy.trainer import open_trainer, prepare, sample, update

MATMULS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
# torch's counter knows no product that is added in place
UNCOUNTED = {torch.ops.aten.addmm_: lambda _, a, b, **given: 2 * a[0] * a[1] * b[1]}


def conditions() -> list[Condition]:
    texts = [torch.randn(n, TEXT_DIM) for n in (3, 5)]
    layout = (("text", 2), ("image", 3, 4), ("text", 3))
    return [Condition(texts[0]), Condition(texts[1], (torch.randn(12, CHANNELS),), layout)]


TARGETS = [Target(0, 4, 4), Target(0, 4, 4), Target(1, 3, 5)]


def counted(run) -> tuple[int, int]:
    """(FLOPs of linear layers, FLOPs of everything that torch counts) of `run()`."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    own = counter.get_flop_counts()["Global"]
    return sum(n for op, n in own.items() if op in MATMULS), sum(own.values())


def inputs(body):
    return torch.randn(body.target_tokens, CHANNELS), torch.rand(len(body.lengths))


def test_forward_flops_of_a_pack_a_prefill_and_cached_targets():
    model = QwenImage21(architecture())
    body = pack(conditions(), TARGETS)
    prefill = pack(conditions(), [])
    with torch.no_grad():
        past = model(prefill)
        runs = [
            (body, lambda: model(body, *inputs(body))),
            (prefill, lambda: model(prefill)),
            (body.without_prefix(), lambda: model(body.without_prefix(), *inputs(body), past)),
        ]
        for packed, run in runs:
            assert counted(run)[0] == forward_flops(model.config, packed).matmul


def test_attention_flops_of_a_pack():
    """On the meta device attention runs as plain matrix products, which torch counts."""
    with torch.device("meta"):
        model = QwenImage21(architecture())
    body = pack(conditions(), TARGETS, device="meta")
    x, t = torch.empty(body.target_tokens, CHANNELS, device="meta"), torch.empty(3, device="meta")
    with torch.no_grad():
        linear, everything = counted(lambda: model(body, x, t))
    expected = forward_flops(model.config, body)
    assert (linear, everything - linear) == (expected.matmul, expected.attention)


def test_activations_are_what_autograd_keeps():
    model = QwenImage21(architecture())
    body = pack(conditions(), TARGETS)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(body, *inputs(body))
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    planned = activation_bytes(model.to("meta"), Layout(conditions(), (), [], 0, seam=False), body)
    # strides of the CPU's flash attention may add a copy of its output; nothing else differs
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("lora", [0, 4])
def test_parameters_are_those_of_the_real_model(tiny_model, tmp_path, lora):
    config = train_config(tmp_path, tiny_model, {"model": {"lora": {"rank": lora}}})
    trainer = open_trainer(config, [colours])
    parameters = list(trainer.engine.model.parameters())
    found = plan(config)["parameters"]
    assert found["total"] == sum(p.numel() for p in parameters)
    assert found["trainable"] == sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"flow": {"guidance": 4.0, "rollout_tokens": 600}},
        merge(SDE, {"policy": {"epochs": 2, "minibatches": 2, "kl": 0.1, "micro_tokens": 400}}),
        {"policy": {"micro_tokens": 200}},
        {"policy": {"nft": {"old_decay": 0.5}, "micro_tokens": 1000}},
    ],
    ids=["nft", "guided", "grpo", "seam", "old"],
)
def test_packs_and_flops_of_a_real_step(tiny_model, tmp_path, parts):
    config = train_config(tmp_path / "run", tiny_model, parts)
    found = plan(config)
    trainer = open_trainer(config, [colours])
    policy = config.policy
    chosen = trainer.prompts.step(0, policy.prompts)
    drawn = []
    rollout = counted(lambda: drawn.append(sample(trainer, chosen, 0)))[0]
    exp, slots = drawn[0]
    exp.advantage, exp.valid = torch.randn(len(exp.targets)), torch.ones(len(exp.targets), dtype=torch.bool)
    exp.valid_by_slot = torch.full((policy.prompts,), policy.group)
    layouts = [layout for part in prepare(trainer, exp, slots) for layout, _ in part]
    assert sum(len(layout.packs) for layout in layouts) == found["tokens"]["update"]["packs"]
    assert any(layout.seam for layout in layouts) == found["tokens"]["update"]["seam"]
    assert (
        max(max(b.target_tokens for b in (lay.body(m, "cpu") for m in lay.packs)) for lay in layouts)
        == (found["tokens"]["update"]["targets"])
    )
    assert rollout == found["flops"]["rollout"]["matmul"]
    # inputs need no gradient, so the first layers run their backward once instead of twice
    real = counted(lambda: update(trainer, exp, slots, 0))[0]
    assert found["flops"]["update"]["matmul"] == pytest.approx(real, rel=0.04)


def test_adapters_train_for_two_thirds_and_their_own_share(tiny_model, tmp_path):
    config = train_config(tmp_path / "run", tiny_model, {"model": {"lora": {"rank": 2}}})
    trainer = open_trainer(config, [colours])
    chosen = trainer.prompts.step(0, config.policy.prompts)
    exp, slots = sample(trainer, chosen, 0)
    exp.advantage, exp.valid = torch.randn(len(exp.targets)), torch.ones(len(exp.targets), dtype=torch.bool)
    exp.valid_by_slot = torch.full((config.policy.prompts,), config.policy.group)
    real = counted(lambda: update(trainer, exp, slots, 0))[0]
    assert plan(config)["flops"]["update"]["matmul"] == pytest.approx(real, rel=0.1)


def test_memory_of_weights_states_and_copies(tiny_model, tmp_path):
    config = train_config(tmp_path / "run", tiny_model, SDE, {"policy": {"kl": 0.1}, "optimizer": {"ema": 0.9}})
    memory = plan(config)["memory"]
    trainer = open_trainer(config, [colours])
    exp, _ = sample(trainer, trainer.prompts.step(0, config.policy.prompts), 0)
    weights = sum(p.nbytes for p in trainer.engine.model.parameters())
    assert memory["weights"] == memory["gradients"] == memory["copy: ema"] == memory["copy: reference"] == weights
    assert memory["optimizer"] == 2 * weights
    transitions = sum(x.nbytes for kept in exp.kept.values() for x in (kept.x, kept.x_next, kept.v))
    assert memory["kept states"] == sum(x.nbytes for x in exp.x0) + transitions
    phases = memory["activations"], memory["keys and values in the rollout"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total") - min(phases)
    own = sorted({t.prompt for t in exp.targets})  # one batch holds them all
    past = trainer.engine.model(pack([exp.conditions[i] for i in own], []))
    assert memory["keys and values in the rollout"] == sum(x.nbytes for pair in past for x in pair)


def test_ranks_share_weights_and_prompts(tiny_model, tmp_path):
    config = train_config(tmp_path / "run", tiny_model)
    one, two = plan(config), plan(config, 2)
    assert two["memory"]["weights"] * 2 == one["memory"]["weights"]
    assert two["memory"]["gathered weights"] == one["memory"]["weights"]
    assert two["tokens"]["update"]["targets"] * 2 == one["tokens"]["update"]["targets"]
    assert two["flops"]["update"]["total"] == pytest.approx(one["flops"]["update"]["total"], rel=0.02)


def test_bfloat16_keeps_float32_weights_beside(tiny_model, tmp_path):
    memory = plan(train_config(tmp_path / "run", tiny_model, {"model": {"dtype": "bfloat16"}}))["memory"]
    full = plan(train_config(tmp_path / "run", tiny_model))["memory"]
    assert memory["weights"] == full["weights"] == 2 * memory["gathered weights"]
    assert memory["activations"] < full["activations"]


def test_a_plan_writes_nothing_and_reads_no_weights(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "diffusion_pytorch_model.safetensors"
    real = load_file(weights)
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[:header] + b"\xff" * (weights.stat().st_size - header))
    evaluation = {"model": {"path": str(model)}, "world": {"text_dim": TEXT_DIM}, "evaluation": {"prompts": 8}}
    for config in (
        pretrain_config(tmp_path / "run"),
        train_config(tmp_path / "run", model),
        load("evaluate", evaluation),
    ):
        assert plan(config)["parameters"]["total"] == sum(x.numel() for x in real.values())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_large_model_is_planned_without_its_memory():
    """The size of the released model: 7 billion parameters, which this test could not hold."""
    values = {"layers": 32, "heads": 32, "head_dim": 128, "rope_axes": [16, 56, 56]}
    config = load("pretrain", {"model": {"architecture": values, "dtype": "bfloat16"}, "pretrain": {"batch": 4}})
    found = plan(config, 8)
    assert 6e9 < found["parameters"]["total"] < 8e9
    assert found["memory"]["optimizer"] == pytest.approx(found["parameters"]["total"] * 8 / 8, rel=0.01)
