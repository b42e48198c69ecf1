"""What the configs of transformers share: diffusers' config.json read field by field, and sizes that fit."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qirl.errors import UserError, nearest
from qirl.packing import Pack

Config = TypeVar("Config")
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class Transformer(Protocol):
    """What sampling and training ask of a transformer, whichever packs it takes."""

    config: Any  # with in_channels, latent_channels (of the velocity), num_layers and width
    transformer_blocks: nn.ModuleList
    pad: int  # packs it takes have their text padded to a multiple of this many tokens; 1: not padded

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self, pack: Pack | None, latents: torch.Tensor | None = None, t: torch.Tensor | None = None, past=None
    ) -> torch.Tensor | KeysValues | None:
        """Velocity [target_tokens, latent_channels] of a pack's targets at t [targets].

        Without latents: what `past` is for packs without their prefix, None where nothing is shared.
        """


class Recomputed(nn.Module):
    """A module that keeps nothing for its backward but its inputs, where `recompute` says so: it runs again there.

    Inside the module and not around it, so that FSDP gathers its weights for the second run as for the first.
    """

    recompute = False

    def forward(self, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
        return self.run(*inputs)

    def run(self, *inputs):
        """The forward."""
        raise NotImplementedError


def recompute(model: Transformer, what: str) -> None:
    """Activation checkpointing of "block" (all of every block), "attention" (that part of it), or "none"."""
    for block in model.transformer_blocks:
        block.recompute, block.attn.recompute = what == "block", what == "attention"


def from_diffusers(cls: type[Config], values: dict) -> Config:
    """The dataclass `cls` from a diffusers config.json; unknown fields are refused by name (private ones skipped)."""
    known = {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    for name in values.keys() - known:
        raise UserError(f"model config field '{name}'={values[name]!r} is not supported{nearest(name, known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"the model config has a field of the wrong type ({error}); copy it again") from None


def check_sizes(config) -> None:
    """Raises UserError unless the rotary axes are even and fill a head, and every size is a whole number above 0."""
    axes, head = config.axes_dims_rope, config.attention_head_dim
    whole = len(axes) == 3 and all(type(d) is int and d >= 0 for d in axes)
    if not whole or sum(axes) != head or any(d % 2 for d in axes):
        raise UserError(
            f"axes_dims_rope={axes} must be three even numbers of at least 0 that sum to attention_head_dim={head}"
        )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int | None" and value is None:
            continue
        if field.type.startswith("int") and (type(value) is not int or value < 1):
            raise UserError(f"model config field {field.name}={value!r} must be a whole number of at least 1")
        if field.type == "bool" and type(value) is not bool:
            raise UserError(f"model config field {field.name}={value!r} must be true or false")
