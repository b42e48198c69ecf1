"""The blocks' matrix products in 8-bit floats, by torch._scaled_mm (`model.fp8=torch`).

Activations and weights are e4m3 with one scale a row, gradients of outputs e5m2: y = x8 W8^T and dx = g8 W8, both in 8 bits,
summed in float32. What a weight's gradient is made of stays in the model's dtype. Layers that share their input
quantise it once; their gradients are quantised side by side, so one product sums them. A frozen weight is quantised once,
for its forward and (transposed, with scales of its own) for its backward; a trained one at every pass, apart from rollouts
(`held`). Rollout and update run the same products, so the ratio before the first update is still exactly 1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from qirl.errors import UserError
from qirl.kernels.quantise_rows import quantise_rows
from qirl.models.linear import WholeProducts, run_products, switched
from qirl.models.quantised import FrozenLinear, linears_of

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of the sizes of a weight, as the products ask for


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits: of a float weight, or of a FrozenLinear that holds e4m3 already.

    Its parameters are those of the layer it is made from, under the same names.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bits = isinstance(linear, FrozenLinear)
        if self.bits:
            self.scale, self.kind = linear.scale, linear.kind
        self.exact = self.held = False
        self.kept: dict = {}

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`."""
        return FrozenLinear.whole(self, dtype) if self.bits else self.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out], in x's dtype."""
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: torch.Tensor, layers: Sequence[Fp8Linear]) -> Sequence[torch.Tensor]:
        return run_products(x, Fp8Products(layers), layers)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 [out, in] and its scale float32 [1, out]."""
        if self.bits:
            return self.weight.view(FORWARD), self.scale.T
        values, scale = quantise_rows([self.weight], FORWARD)
        return values, scale.T

    def keep(self, name, make: Callable):
        """What `make` makes of the weight, made once while the weight stays as it is."""
        if self.weight.requires_grad and not self.held:
            return make()
        state = self.weight.data_ptr(), self.weight._version
        if self.kept.get(name, (None,))[0] != state:
            self.kept[name] = state, make()
        return self.kept[name][1]


class Fp8Products(WholeProducts):
    """Products of layers that share x, in 8 bits; see qirl.models.linear."""

    layers: Sequence[Fp8Linear]

    def forward(self, x):
        if self.layers[0].exact or not len(x):
            return super().forward(x)
        values, scale = quantise_rows([x], FORWARD)
        outs = []
        for layer in self.layers:
            weight, unit = layer.keep("rows", layer.rows)
            out = _product(values, weight, scale, unit, x.dtype)
            outs.append(out if layer.bias is None else out.add_(layer.bias))
        return outs

    def backward(self, grads):
        if self.layers[0].exact or not len(grads[0]):
            return super().backward(grads)
        values, scale = quantise_rows(grads, BACKWARD)
        weight, unit = self.layers[0].keep(len(self.layers), self._columns)
        return _product(values, weight, scale, unit, grads[0].dtype)

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 [in, sum of out] of all weights transposed, side by side, and its scale float32 [1, in]."""
        dtype = torch.bfloat16 if self.layers[0].bits else self.layers[0].weight.dtype
        values, scale = quantise_rows([layer.whole(dtype).T.contiguous() for layer in self.layers], FORWARD)
        return values, scale.T


Fp8Linear.products = Fp8Products  # of qirl.models.linear


def _product(values, weight, scale, unit, dtype) -> torch.Tensor:
    """[N, K] times [M, K] transposed, scaled back: [N, M] in `dtype`."""
    if values.device.type == "cpu" and not _rows_on_cpu():
        return (values.float() @ weight.float().T * scale * unit).to(dtype)
    out = dtype if values.device.type == "cpu" else torch.bfloat16  # CUDA's has one type of result
    return torch._scaled_mm(values, weight.T, scale, unit, out_dtype=out, use_fast_accum=True).to(dtype)


@functools.cache
def _rows_on_cpu() -> bool:
    """Whether this torch's product on a CPU takes a scale a row: 2.11's takes one a tensor."""
    bits, one = torch.zeros(16, 16).to(FORWARD), torch.ones(16, 1)
    try:
        torch._scaled_mm(bits, bits.T, one, one.T, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def use_fp8(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Puts an Fp8Linear in place of the linear layers of the blocks (`products_in`).

    Raises UserError for a GPU without 8-bit products, another dtype than bfloat16 on a GPU, and sizes that do not fit.
    """
    check_device(device, dtype)
    for parent, name, linear in products_in(model):
        if isinstance(linear, FrozenLinear) and linear.kind != "fp8":
            raise UserError(
                f"model.base={linear.kind} cannot multiply in 8-bit floats; use model.base=fp8, or model.fp8=off"
            )
        rows, columns = linear.weight.shape  # of this rank's part
        if rows % MULTIPLE or columns % MULTIPLE:
            raise UserError(
                f"model.fp8=torch takes weights of multiples of {MULTIPLE}; {name} has {rows} x {columns} on a rank: use "
                "model.fp8=off"
            )
        setattr(parent, name, Fp8Linear(linear))


def products_in(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of the blocks over tokens, with their parents and names. Modulations (1.x) stay exact: they have a row a
    target, and every token depends on them."""
    return [found for found in linears_of(model) if not isinstance(found[0], nn.Sequential)]


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError for a GPU without 8-bit products, and for a dtype that they do not give there."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(
            f"model.fp8=torch needs a GPU with 8-bit products (compute capability 8.9 or higher, such as an H100); "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use model.fp8=off, or model.base=fp8 to save memory"
        )
    if dtype != torch.bfloat16:
        raise UserError(
            f"model.fp8=torch multiplies into bfloat16 on a GPU, and model.dtype is {str(dtype).removeprefix('torch.')}; "
            "set model.dtype=bfloat16, or model.fp8=off"
        )


@contextlib.contextmanager
def held(model: nn.Module):
    """Weights do not change inside the block: trained ones are quantised once too."""
    layers = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    try:
        with switched(layers, "held", True):
            yield
    finally:
        for layer in layers:
            if layer.weight.requires_grad:
                layer.kept.clear()


def exact(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside the block all products are in the model's dtype: what 8 bits are compared with."""
    return switched((m for m in model.modules() if hasattr(m, "exact")), "exact", True)
