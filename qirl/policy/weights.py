"""Copies of the trainable weights that can take their place: the sampling policy, the average, the KL reference."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.optim.sgd import sgd

from qirl.models.lora import adapter_off
from qirl.parallel.data import local


class Weights:
    """Named copies, sharded like the weights themselves. One engine: the copies run in the same modules."""

    def __init__(self, model: nn.Module, lora: bool):
        self.model, self.lora = model, lora
        self.current = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def keep(self, name: str) -> None:
        """Copies the weights as they are now."""
        self.copies[name] = {key: p.detach().clone() for key, p in self.current.items()}

    @torch.no_grad()
    def blend(self, name: str, decay: float, stay: torch.Tensor | None = None) -> None:
        """copy = decay * copy + (1 - decay) * weights; `stay`, a truth [] on their device, leaves the copy as it is."""
        copies = [local(self.copies[name][key]) for key in self.current]
        weights = [local(p) for p in self.current.values()]
        if stay is None or stay.device.type == "cpu" and not stay:
            torch._foreach_lerp_(copies, weights, 1 - decay)
        elif stay.device.type != "cpu":
            blend_unless(stay, copies, weights, decay)

    @contextlib.contextmanager
    def using(self, name: str | None):
        """Runs the block with the copy `name` in place of the weights (None: with the weights)."""
        if name is None:
            yield
            return
        self._exchange(name)
        try:
            yield
        finally:
            self._exchange(name)

    @contextlib.contextmanager
    def reference(self):
        """Runs the block with the frozen base: the adapter off under LoRA, else the copy "reference"."""
        with adapter_off(self.model) if self.lora else self.using("reference"):
            yield

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        for key, p in self.current.items():
            before = p.detach().clone()
            p.copy_(self.copies[name][key])
            self.copies[name][key].copy_(before)


def blend_unless(stay: torch.Tensor, copies: list[torch.Tensor], weights: list[torch.Tensor], decay: float) -> None:
    """copies = decay * copies + (1 - decay) * weights in one pass, unless `stay`, which only the device reads.

    That is a step of gradient descent on |copy - weights|^2 / 2: its fused kernel takes copy - weights as a weight decay of 1
    and a gradient of weights that is climbed, and knows what to do where a gradient was not finite.
    """
    descent = dict(lr=1 - decay, weight_decay=1.0, maximize=True, momentum=0.0, dampening=0.0, nesterov=False)
    sgd(copies, weights, [], fused=True, found_inf=stay.float(), **descent)
