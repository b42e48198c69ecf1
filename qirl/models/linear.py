"""Linear layers that share their input, and the products that a frozen layer is made of.

Queries, keys and values, or gate and up, read one x. `together` runs such layers at once: adapters read x in one product,
and 8-bit layers quantise it once (qirl.models.lora, qirl.models.fp8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Products(Protocol):
    """What layers compute of a shared input x [N, in]; no gradient of their weights."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every layer's output [N, out], which may be changed in place."""

    def backward(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """The gradient of x, from those of the outputs; may be changed in place."""


class PlainProducts:
    """Products with the layers' weights as they are."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers

    def forward(self, x):
        return [F.linear(x, layer.weight, layer.bias) for layer in self.layers]

    def backward(self, grads):
        of_x = grads[0] @ self.layers[0].weight
        for grad, layer in zip(grads[1:], self.layers[1:], strict=True):
            of_x.addmm_(grad, layer.weight)
        return of_x


def products_of(layers: Sequence[nn.Linear]) -> Products:
    """The products of layers of one kind; a kind of its own says which by `products`."""
    return getattr(type(layers[0]), "products", PlainProducts)(layers)


def together(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """[layer(x) for layer in layers], at once where the layers are of one kind that can."""
    run = getattr(layers[0], "together", None)
    if run is None or any(type(layer) is not type(layers[0]) for layer in layers):
        return [layer(x) for layer in layers]
    return run(x, layers)
