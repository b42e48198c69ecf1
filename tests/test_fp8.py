"""Products in 8-bit floats: values and gradients against the rounded formula, what is quantised when, runs, refusals."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from cli_runs import qirl
from test_resume import ENVIRONMENT, assert_same, content, lines, stop_when
from torch import nn

from qirl.config import load
from qirl.errors import UserError
from qirl.evaluation.evaluate import evaluation_key
from qirl.kernels import quantise_rows as file
from qirl.kernels.quantise_rows import quantise_rows
from qirl.models import fp8
from qirl.models.fp8 import Fp8Linear
from qirl.models.linear import together
from qirl.models.lora import LoraLinear, add_lora
from qirl.models.quantised import FrozenLinear
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
BRIGHT = Path(__file__).with_name("bright.py")


def stood_for(x, dtype):
    """The values that the rows of x have in 8 bits."""
    values, scale = quantise_rows([x], dtype)
    return values.float() * scale


def layers(*outs, trained=True, bias=True):
    torch.manual_seed(0)
    return [Fp8Linear(nn.Linear(32, n, bias=bias).requires_grad_(trained)) for n in outs]


def test_rows_are_scaled_to_the_largest_number_and_zeros_stay():
    x = torch.tensor([[0.0, 0.0], [1e-20, -3e-20], [500.0, 1.0]])
    values, scale = quantise_rows([x], E4)
    assert values.dtype == E4 and scale.shape == (3, 1)
    assert values.float().abs().amax(1).tolist() == [0, 448, 448]
    torch.testing.assert_close(values.float() * scale, x, rtol=2**-4, atol=0)  # 3 bits after the first
    assert scale[0] == 1


def test_tensors_side_by_side_share_the_scale_of_their_row():
    a, b = torch.randn(2, 5, 8)
    values, scale = quantise_rows([a, b], E5)
    whole, own = quantise_rows([torch.cat([a, b], 1)], E5)
    assert torch.equal(values.float(), whole.float()) and torch.equal(scale, own)
    with pytest.raises(AssertionError):
        quantise_rows([a, b[:, :4]], E5)


def test_a_layer_multiplies_the_rounded_numbers_forward_and_backward():
    [layer] = layers(48)
    x = torch.randn(7, 32, requires_grad=True)
    y = layer(x)
    grad = torch.randn(7, 48)
    of_x, of_w, of_b = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    w = layer.weight.detach()
    exact = stood_for(x.detach(), E4) @ stood_for(w, E4).T + layer.bias.detach()
    torch.testing.assert_close(y.detach(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_x, stood_for(grad, E5) @ stood_for(w.T.contiguous(), E4).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_w, grad.T @ x.detach())
    torch.testing.assert_close(of_b, grad.sum(0))
    assert 0.01 < (y - nn.functional.linear(x, w, layer.bias)).norm() / y.norm() < 0.06  # it is rounded, and little


def test_layers_of_one_input_sum_their_gradients_inside_one_product(monkeypatch):
    three = layers(48, 48, 48)
    x, calls, real = torch.randn(7, 32, requires_grad=True), [], fp8._product
    monkeypatch.setattr(fp8, "_product", lambda *args: calls.append(args[0].shape) or real(*args))
    outs = together(x, *three)
    for layer, out in zip(three, outs, strict=True):
        assert torch.equal(out, layer(x))
    calls.clear()
    grads = torch.randn(3, 7, 48)
    [of_x] = torch.autograd.grad(outs, x, list(grads))
    assert calls == [(7, 144)]
    exact = sum(g @ layer.weight for g, layer in zip(grads, three, strict=True))
    assert (of_x - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("bits", [False, True], ids=["a float base", "a base of 8 bits"])
def test_adapters_over_8_bits_are_exact_beside_a_rounded_base(bits):
    torch.manual_seed(1)
    plain = nn.Linear(32, 48).requires_grad_(False)
    base = Fp8Linear(plain)
    if bits:
        frozen = FrozenLinear(plain, "fp8")
        frozen.fill(plain.weight)
        base = Fp8Linear(frozen)
        assert base.state_dict().keys() == frozen.state_dict().keys()
        torch.testing.assert_close(base(torch.eye(32)), frozen(torch.eye(32)), rtol=1e-5, atol=1e-5)
    lora = LoraLinear(base, 4, 2.0)
    a, b = lora.lora_A["default"].weight, nn.init.normal_(lora.lora_B["default"].weight)
    x = torch.randn(7, 32, requires_grad=True)
    y, grad = lora(x), torch.randn(7, 48)
    of_x, of_a, of_b = torch.autograd.grad(y, (x, a, b), grad)
    torch.testing.assert_close(y, base(x) + 2 * (x @ a.T) @ b.T)
    torch.testing.assert_close(of_a, 2 * (grad @ b).T @ x)
    torch.testing.assert_close(of_b, 2 * grad.T @ (x @ a.T))
    rounded = base.whole(torch.float32)
    assert (of_x - grad @ rounded - 2 * grad @ b @ a).norm() < 0.1 * of_x.norm()


def test_a_frozen_weight_is_quantised_once_and_a_trained_one_when_it_may_have_changed(monkeypatch):
    made = []
    monkeypatch.setattr(
        fp8, "quantise_rows", lambda parts, dtype: made.append(tuple(parts[0].shape)) or quantise_rows(parts, dtype)
    )
    x = torch.randn(7, 32, requires_grad=True)
    weights = lambda: [shape for shape in made if shape[0] != 7]  # noqa: E731
    [frozen] = layers(48, trained=False)
    for _ in range(3):
        frozen(x).sum().backward()
    assert sorted(weights()) == [(32, 48), (48, 32)]
    with torch.no_grad():
        frozen.weight.mul_(2)  # a teacher takes its place
    torch.testing.assert_close(frozen(x) - frozen.bias, 2 * (layers(48)[0](x) - frozen.bias))
    made.clear()
    model = nn.Sequential(*layers(32))
    for _ in range(2):
        model(x)
    assert weights() == [(32, 32)] * 2
    made.clear()
    with fp8.held(model), torch.no_grad():
        for _ in range(3):
            model(x)
    assert weights() == [(32, 32)] and not model[0].kept


def tiny(lora=False):
    torch.manual_seed(0)
    model = QwenImage21(tiny_runs.architecture())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    fp8.use_fp8(model, torch.device("cpu"), torch.float32)
    return add_lora(model, 4, 4.0) if lora else model


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_in_8_bits_is_near_the_exact_one_with_its_gradients(lora):
    model = tiny(lora)
    conditions = [Condition(torch.randn(n, tiny_runs.TEXT_DIM)) for n in (3, 5)]
    body = pack(conditions, [Target(0, 2, 3), Target(0, 2, 3), Target(1, 3, 3)])
    x, t = torch.randn(body.target_tokens, tiny_runs.CHANNELS), torch.rand(3)
    found = []
    for context in (fp8.held, fp8.exact):
        with context(model):
            model.zero_grad()
            v = model(body, x, t)
            v.square().sum().backward()
        found.append([v.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert torch.equal(found[0][0], model(body, x, t))  # held or not
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).norm() <= 0.25 * exact.norm() + 1e-6
    assert 1e-3 < (found[0][0] - found[1][0]).norm() / found[1][0].norm() < 0.1


def test_what_cannot_multiply_in_8_bits_is_refused_with_the_alternatives():
    model = QwenImage21(
        dataclasses.replace(
            tiny_runs.architecture(), num_attention_heads=3, attention_head_dim=6, axes_dims_rope=(2, 2, 2)
        )
    )
    with pytest.raises(UserError, match="multiples of 16.*18 x 18.*model.fp8=off"):
        fp8.use_fp8(model, torch.device("cpu"), torch.float32)
    model.transformer_blocks[0].attn.to_q = FrozenLinear(nn.Linear(32, 32), "int8")
    with pytest.raises(UserError, match="model.base=int8.*use model.base=fp8"):
        fp8.use_fp8(model, torch.device("cpu"), torch.float32)


def test_the_reference_is_what_torch_rounds():
    x = torch.randn(3, 16)
    values, scale = file.reference([x], E4)
    assert torch.equal(values.float(), (x / scale).to(E4).float())


def command(folder, model, *overrides):
    """The arguments of `qirl train` for the tiny digits setup in `folder`/out, by SDE and grpo, scored by tests/bright.py."""
    folder.mkdir(exist_ok=True)
    own = {
        "run": {"steps": 7, "checkpoint_every": 3, "samples_every": 4, "monitor_prompts": 2},
        "model": {"path": str(model)},
        "rewards": {"bright": {"kind": "python", "target": f"{BRIGHT}:bright"}},
    }
    values = tiny_runs.merge(tiny_runs.BASE, tiny_runs.SDE, own)
    (folder / "c.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return ["train", str(folder / "c.yaml"), "--out", str(folder / "out"), *overrides]


def finish(folder, model, *overrides):
    """What a run that ends well left behind."""
    code, _, err = qirl(*command(folder, model, *overrides))
    assert code == 0, err
    return content(folder)


@pytest.mark.parametrize("rank", [0, 4], ids=["all parameters", "adapters"])
def test_a_run_in_8_bits_that_is_killed_ends_as_an_uninterrupted_one(rank, tmp_path, tiny_model):
    options = "model.fp8=torch", f"model.lora.rank={rank}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = finish(whole, tiny_model, *options)
    process = subprocess.Popen([sys.executable, "-m", "qirl", *command(killed, tiny_model, *options)], env=ENVIRONMENT)
    assert stop_when(process, lambda: lines(killed / "out/metrics.jsonl") >= 5) == -signal.SIGKILL
    finish(killed, tiny_model, *options)
    assert_same(killed, reference)
    assert len(reference["metrics"]) == 7 and all(record["grad_norm"] > 0 for record in reference["metrics"])
    assert (whole / "out/adapter").exists() == bool(rank)


def test_the_ratio_is_one_before_the_first_update_of_a_run_in_8_bits(tmp_path, tiny_model):
    """The old velocities come from passes of their own without gradients, so equal bits are no matter of course."""
    ratios = lambda record: {record[f"ratio_{name}"] for name in ("min", "mean", "max")}  # noqa: E731
    options = "policy.old=recompute", "run.steps=3"
    records = finish(tmp_path / "one", tiny_model, "model.fp8=torch", *options)["metrics"]
    assert [ratios(record) for record in records] == [{1.0}] * 3
    first = finish(tmp_path / "two", tiny_model, "model.fp8=torch", *options, "policy.epochs=2")["metrics"][0]
    assert len(ratios(first)) == 3  # the second pass comes after an update
    plain = finish(tmp_path / "off", tiny_model, "model.fp8=off", *options)["metrics"][0]
    assert 0 < abs(plain["reward/bright"] - records[0]["reward/bright"]) < 0.01  # rounded, and little


def test_an_evaluation_in_8_bits_does_not_pass_for_one_without(tiny_model):
    keys = {evaluation_key(load("evaluate", {"model": {"path": str(tiny_model), "fp8": f}})) for f in ("off", "torch")}
    assert len(keys) == 2
