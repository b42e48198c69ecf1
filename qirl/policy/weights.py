"""Copies of the trainable weights that can take their place: the sampling policy, the average, the KL reference."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from qirl.models.lora import adapter_off


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
    def blend(self, name: str, decay: float) -> None:
        """copy = decay * copy + (1 - decay) * weights."""
        for key, p in self.current.items():
            self.copies[name][key].lerp_(p.detach(), 1 - decay)

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
