"""The LoRA layer against peft's own, and adapters of layers with biases as a teacher."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import parts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qirl.config_sections import Lora
from qirl.distillation.teachers import Source, Teachers
from qirl.models.adapter_files import read_adapter
from qirl.models.adapters import save_adapter
from qirl.models.linear import together
from qirl.models.lora import LoraLinear, adapter_off, add_lora, merged_state, put_adapters
from qirl.models.quantised import FrozenLinear
from qirl.models.weights import load_model
from qirl.parallel.data import Ranks


def pair(bias: bool) -> tuple[nn.Module, nn.Module]:
    """The same two layers, adapted by qirl and by peft with the same random matrices, in float64."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).double()
    theirs = copy.deepcopy(ours)
    put_adapters(ours, ["0", "2"], 3, 7 / 3)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"]), theirs)
    state = {n: torch.randn_like(v) if "lora_" in n else v for n, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)  # the names are peft's
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return ours, theirs


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_peft(bias, needs_input):
    found = []
    for model in pair(bias):
        x = torch.linspace(-1, 1, 42, dtype=torch.float64).view(7, 6).requires_grad_(needs_input)
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for n, p in sorted(model.named_parameters()) if "lora_" in n)])
    for mine, peft in zip(*found, strict=True):
        assert (mine is None) == (peft is None)
        if mine is not None:
            torch.testing.assert_close(mine, peft, rtol=1e-13, atol=1e-13)


class Kernels(TorchDispatchMode):
    """Counts the operations that run a kernel."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function._schema.name:
            self.found[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def test_forward_and_backward_are_eight_products_and_nothing_else():
    """peft: the same products, 2 multiplications and 2 additions over whole activations beside them."""
    layer = LoraLinear(nn.Linear(6, 5, bias=False).requires_grad_(False), 2, 1.5)
    x, grad = torch.randn(7, 6, requires_grad=True), torch.randn(7, 5)
    with Kernels() as kernels:
        torch.autograd.backward(layer(x), grad)
    kernels.found.pop("detach", None)
    assert kernels.found == {"mm": 4, "addmm_": 2, "addmm": 2}


def test_layers_of_one_input_read_it_once_and_give_what_they_give_alone():
    torch.manual_seed(3)
    bases = [nn.Linear(6, n, bias=n == 5).double().requires_grad_(False) for n in (5, 4, 7)]
    layers = [LoraLinear(base, rank, 1.5) for base, rank in zip(bases, (2, 3, 2), strict=True)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    x, found = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), []
    for run in (lambda: together(x, *layers), lambda: [layer(x) for layer in layers]):
        with Kernels() as kernels:
            outs = run()
            grads = torch.autograd.grad(outs, [x, *parameters], [y.detach().cos() for y in outs])
        found.append((*outs, *grads))
        products = sum(kernels.found[name] for name in ("mm", "addmm", "addmm_"))
        assert (products, kernels.found["add"]) == ((18, 0) if len(found) == 1 else (24, 2)), kernels.found
    for one, alone in zip(*found, strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-13, atol=1e-13)


def test_switched_off_it_is_the_layer_below():
    ours, _ = pair(True)
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = lambda x: ours[2].base_layer(ours[1](ours[0].base_layer(x)))  # noqa: E731
    assert not torch.allclose(ours(x), plain(x))
    with pytest.raises(KeyError), adapter_off(ours):
        assert torch.equal(ours(x), plain(x))
        raise KeyError
    assert not torch.allclose(ours(x), plain(x))


def test_adapters_of_a_rounded_base_are_exact():
    """Matrices in 16 bits would lose the small steps of training: they are float32 whatever the base's type."""
    layer = nn.Linear(4, 4).bfloat16()
    assert LoraLinear(layer, 2, 1.0).lora_A["default"].weight.dtype == torch.float32
    y = LoraLinear(layer, 2, 1.0)(torch.randn(3, 4).bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_over_a_base_in_8_bits_the_gradients_are_those_of_what_it_stands_for(base):
    torch.manual_seed(1)
    true = nn.Linear(8, 5).double()
    rounded = FrozenLinear(true, base)
    rounded.fill(true.weight)
    true.weight.data = rounded.whole(torch.float64)
    x, found = torch.randn(7, 8, dtype=torch.float64, requires_grad=True), []
    for layer in (LoraLinear(true, 2, 1.5), LoraLinear(rounded, 2, 1.5)):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data, b.data = torch.linspace(-1, 1, 16).view(2, 8), torch.linspace(1, 2, 10).view(5, 2)
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, a, b))))
    for exact, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact)


def test_an_adapter_on_layers_with_biases_is_a_teacher(tmp_path):
    torch.manual_seed(2)
    folder, lora = tmp_path / "base", Lora(rank=2, alpha=4.0, targets=("to_q", "add_k_proj", "net.2"))
    parts(tmp_path, "QwenImagePipeline")["transformer"].save_pretrained(folder)
    student = add_lora(load_model(folder), lora.rank, lora.alpha, lora.targets)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    state = student.state_dict()
    save_adapter(state, lora, str(folder), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    bench = Teachers({"t": Source(tmp_path / "adapter", adapter)}, folder, torch.float32, Ranks())
    merged = merged_state(state, lora.alpha / lora.rank)
    mine = merged_state(bench.model.state_dict(), 1.0)
    assert mine.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-6)
