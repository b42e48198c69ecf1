"""A frozen base in 8 bits: the blocks' weights as int8 or float8 e4m3 with one scale for each output, products in the
model's dtype.

Under LoRA the base is only multiplied with; a rounded weight is at most 1/254 of its row's largest from the true one in int8
and 1/16 of itself in e4m3. Exports merge adapters into the weights of the file, not into these.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qirl.models.linear import WholeProducts, run_products

LARGEST = {"int8": 127.0, "fp8": 448.0}


class FrozenLinear(nn.Linear):
    """A linear layer whose weight has 8 bits. `fill` gives it the values of a float weight [out, in].

    weight: int8, or the bits of float8 e4m3 as uint8, which FSDP gathers as they are. scale: float32 [out, 1].
    """

    products = WholeProducts  # of qirl.models.linear

    def __init__(self, linear: nn.Linear, kind: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        dtype = torch.int8 if kind == "int8" else torch.uint8
        empty = torch.empty(linear.weight.shape, dtype=dtype, device=linear.weight.device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(len(empty), 1, device=empty.device), requires_grad=False)
        self.bias = linear.bias

    @torch.no_grad()
    def fill(self, value: torch.Tensor) -> None:
        rows = value.to(self.scale.device).float()
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST[self.kind]
        rows = rows / scale
        bits = rows.round().to(torch.int8) if self.kind == "int8" else rows.to(torch.float8_e4m3fn).view(torch.uint8)
        self.weight.copy_(bits)
        self.scale.copy_(scale)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that it stands for, [out, in]."""
        return dequantised(self.weight, self.scale, self.kind, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_products(x, self.products([self]), [self])[0]


def dequantised(bits: torch.Tensor, scale: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    values = bits if kind == "int8" else bits.view(torch.float8_e4m3fn)
    return values.to(dtype) * scale.to(dtype)


def quantise(model: nn.Module, kind: str) -> None:
    """Puts a FrozenLinear, yet to be filled, in place of every linear layer of the blocks."""
    for parent, name, linear in list(linears_of(model)):
        setattr(parent, name, FrozenLinear(linear, kind))


def linears_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for block in model.transformer_blocks:
        for parent in block.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child
