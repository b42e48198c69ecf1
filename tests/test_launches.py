"""How many kernels a GPU is asked for: by block, forward and backward, and by denoising step. A fused op counts as one."""

import dataclasses
import importlib
from collections import Counter

import pytest
import tiny_runs
import torch
from dense_varlen import DenseVarlen
from torch.utils._python_dispatch import TorchDispatchMode

from qirl.config_sections import Flow
from qirl.flow.rollout import rollout
from qirl.kernels import philox
from qirl.models.lora import add_lora
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack

FUSED = (
    "norm_modulate",
    "residual_norm",
    "gated_residual",
    "qk_norm_rope",
    "swiglu",
    "merge_attention",
    "flow_step",
    "philox",
)


class Launches(TorchDispatchMode):
    """Counts what runs a kernel; inside `fused` everything is one."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = Counter(), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if not (self.inside or function.is_view or "empty" in name or name in ("detach", "_unsafe_view")):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def fused(self, name, run, *args):
        outer, self.inside = self.inside, True
        try:
            return run(*args)
        finally:
            self.inside = outer
            self.found[name] += not outer


@pytest.fixture
def launches(monkeypatch):
    """Counts from here on, with every op of kernels/ as the one kernel that a GPU has for it, forward and backward."""
    mode = Launches()

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, name, reference, *args):
            ctx.name, ctx.reference = name, reference
            ctx.args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
            return mode.fused(name, reference, *args)

        @staticmethod
        def backward(ctx, *slopes):
            def gradients():
                with torch.enable_grad():
                    outs = ctx.reference(*ctx.args)
                wanted = [a for a in ctx.args if isinstance(a, torch.Tensor) and a.requires_grad]
                return torch.autograd.grad(outs, wanted, slopes if isinstance(outs, tuple) else slopes[0])

            found = iter(mode.fused(f"{ctx.name} backward", gradients))
            own = [next(found) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in ctx.args]
            return None, None, *own

    def choose(op, reference, **others):
        if op == "merge_attention":
            return lambda *args: mode.fused(op, reference, *args)
        return lambda *args: Fused.apply(op, reference, *args)

    for name in FUSED:
        monkeypatch.setattr(importlib.import_module(f"qirl.kernels.{name}"), "choose", choose)
    return mode


class Attention(DenseVarlen):
    """One kernel a call."""

    def __init__(self, mode):
        self.mode = mode

    def run(self, *args):
        return self.mode.fused("attention", super().run, *args)

    def run_backward(self, *args):
        return self.mode.fused("attention backward", super().run_backward, *args)


def prepared(mode, layers, lora=False):
    """A model, and a call on two targets and a prefix's keys and values; nothing of it is counted."""
    mode.inside = True
    torch.manual_seed(0)
    model = QwenImage21(dataclasses.replace(tiny_runs.architecture(), num_layers=layers))
    if lora:
        add_lora(model, 2, 2.0)
    for block in model.transformer_blocks:
        block.attn.backend = Attention(mode)
    conditions, targets = [Condition(torch.randn(5, tiny_runs.TEXT_DIM))], [Target(0, 2, 3)] * 2
    with torch.no_grad():
        past = model(pack(conditions, []))
    leaves = [tuple(x.requires_grad_(lora) for x in pair) for pair in past]
    mode.inside = False
    return model, (pack(conditions, targets, prefix=False), torch.randn(12, tiny_runs.CHANNELS), torch.rand(2), leaves)


def difference(mode, run, less, more):
    """The launches of run(more) beyond those of run(less)."""
    found = []
    for size in (less, more):
        mode.found.clear()
        with mode:
            run(size)
        found.append(Counter(mode.found))
    return found[1] - found[0]


def test_a_block_of_a_rollout_is_sixteen_launches(launches):
    """Seven products, two calls of attention, one merge, six fused ops; no copies."""

    def forward(layers):
        model, call = prepared(launches, layers)
        with torch.no_grad():
            model(*call)

    assert difference(launches, forward, 2, 3) == {
        "mm": 7, "attention": 2, "merge_attention": 1, "qk_norm_rope": 2, "norm_modulate": 1, "residual_norm": 1, "swiglu": 1,
        "gated_residual": 1,
    }  # fmt: skip


def test_a_block_trained_by_adapters_is_its_products_and_little_else(launches):
    """Of 47 products, 14 are of the frozen layers; forward and backward."""

    def update(layers):
        model, call = prepared(launches, layers, lora=True)
        model(*call).sum().backward()

    found = difference(launches, update, 2, 3)
    products = sum(found.pop(name) for name in ("mm", "addmm", "addmm_"))
    assert products == 47
    fused = sum(
        found.pop(name) for name in list(found) if "attention" in name or name.removesuffix(" backward") in FUSED
    )
    assert fused == 5 + 12
    assert found == {
        "cat": 2,
        "add": 1,
        "add_": 1,
    }  # adapters of one input; gradients that meet; of queries, twice attended


def test_a_denoising_step_adds_little_to_the_model(launches):
    def draw(steps):
        launches.inside = True
        model, _ = prepared(launches, 2)
        draws = philox.stream(0, [0, 0], [0, 1], 0)
        launches.inside = False
        own = [Condition(torch.ones(5, tiny_runs.TEXT_DIM))], [Target(0, 2, 3)] * 2
        rollout(
            model,
            *own,
            draws,
            Flow(steps=steps, guidance=2.0),
            negatives=[Condition(torch.ones(1, tiny_runs.TEXT_DIM))],
        )

    found = difference(launches, draw, 4, 5)
    assert found["flow_step"] == 1 and sum(found.values()) <= 2 * 16 + 30, found
