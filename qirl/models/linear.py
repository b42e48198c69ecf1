"""Linear layers that share their input, and the products that a frozen layer is made of.

Queries, keys and values, or gate and up, read one x. `together` runs such layers at once: adapters read x in one product,
and 8-bit layers quantise it once (qirl.models.lora, qirl.models.fp8).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
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


class WholeProducts:
    """Products with the weights that layers stand for, `whole(dtype)`, made anew for the forward and the backward."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers

    def forward(self, x):
        return [F.linear(x, layer.whole(x.dtype), layer.bias) for layer in self.layers]

    def backward(self, grads):
        return sum(grad @ layer.whole(grad.dtype) for grad, layer in zip(grads, self.layers, strict=True))


def run_products(x: torch.Tensor, products: Products, layers: Sequence[nn.Linear]) -> Sequence[torch.Tensor]:
    """The outputs of layers without adapters. Differentiable in x, and in weights and biases that are trained."""
    trained = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    return _Layers.apply(x, products, layers, *trained)


class _Layers(torch.autograd.Function):
    """The gradient of x by `products`, those of trained weights and biases in x's dtype."""

    @staticmethod
    def forward(ctx, x, products, layers, *trained):
        ctx.products, ctx.layers = products, layers
        ctx.save_for_backward(*([x] if trained else []))
        return tuple(products.forward(x))

    @staticmethod
    def backward(ctx, *grads):
        of_x = ctx.products.backward(grads) if ctx.needs_input_grad[0] else None
        own = []
        for grad, layer in zip(grads, ctx.layers, strict=True):
            if layer.weight.requires_grad:
                own.append(grad.T @ ctx.saved_tensors[0])
            if layer.bias is not None and layer.bias.requires_grad:
                own.append(grad.sum(0))
        return of_x, None, None, *own


@contextlib.contextmanager
def switched(modules: Iterable[nn.Module], name: str, value: bool):
    """Sets the flag `name` of modules inside the block, and back to the other value at its end."""
    modules = list(modules)
    for module in modules:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, not value)


def products_of(layers: Sequence[nn.Linear]) -> Products:
    """The products of layers of one kind; a kind of its own says which by `products`."""
    return getattr(type(layers[0]), "products", PlainProducts)(layers)


def together(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """[layer(x) for layer in layers], at once where the layers are of one kind that can."""
    run = getattr(layers[0], "together", None)
    if run is None or any(type(layer) is not type(layers[0]) for layer in layers):
        return [layer(x) for layer in layers]
    return run(x, layers)
