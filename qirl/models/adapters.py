"""LoRA adapters of a model: what they are, where they fit, how they are written. `adapter_files` reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from qirl.errors import UserError
from qirl.models.lora import put_adapters, target_pattern

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
DIFFUSERS_WEIGHTS, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")  # before a module's path with underscores for dots


class LowRank(NamedTuple):
    """What one module's weight W [out, in] becomes: W + scale * b a, with a [rank, in] and b [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """The low-rank changes of a base's modules, by their paths; base: where it lies, if the adapter says so."""

    matrices: dict[str, LowRank]
    base: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(m.a) for m in self.matrices.values())

    def fitted(self, base: nn.Module, path: Path) -> Adapter:
        """The same with the paths of `base` (which may be on the meta device), where kohya's names lost their dots.

        Raises UserError, naming `path`, if a matrix has no place in it.
        """
        weights = {n: m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear)}
        underscored = {prefix + n.replace(".", "_"): n for n in weights for prefix in ("", *KOHYA_PREFIXES)}
        fitted = {}
        for given, low in self.matrices.items():
            name = given if given in weights else underscored.get(given)
            if name is None:
                raise UserError(f"{path} adapts '{given}', which the base does not have; take its own base")
            if (len(low.b), low.a.shape[1]) != tuple(weights[name].shape):
                raise UserError(
                    f"{path}: '{given}' is {list(low.b.shape)} times {list(low.a.shape)}, the base has "
                    f"{list(weights[name].shape)} there; take the adapter's own base"
                )
            fitted[name] = low
        return Adapter(fitted, self.base)


def save_adapter(state: dict[str, torch.Tensor], lora, base: str | None, folder: Path) -> None:
    """Writes the adapter "default" of a state dict with adapters for peft and for diffusers; lora: the run's model.lora.

    peft reads alpha in its config. diffusers' file holds B times alpha / rank: a reader without metadata takes scale 1.
    """
    tensors = {n.replace(".default.", "."): value.contiguous() for n, value in state.items() if ".lora_" in n}
    config = {
        "peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": target_pattern(lora.targets), "base_model_name_or_path": base, "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    own = {PEFT_PREFIX + name: value for name, value in tensors.items()}
    save_file(own, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    for name, value in tensors.items():
        if ".lora_B." in name:
            tensors[name] = (value.double() * (lora.alpha / lora.rank)).to(value.dtype)
    scaled = {DIFFUSERS_PREFIX + name: value for name, value in tensors.items()}
    save_file(scaled, folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})


def add_slots(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Adds places for any of `adapters`, one at a time, to a model in place: `fill` says what goes there."""
    rank = max(adapter.rank for adapter in adapters)
    modules = sorted({name for adapter in adapters for name in adapter.matrices})
    with torch.random.fork_rng():
        put_adapters(model, modules, rank, 1.0)


def fill(slots: dict[str, torch.Tensor], adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """The values of all slots (name to parameter) for an adapter, or for none: smaller ranks are filled up with zeros."""
    values = {}
    for name, slot in slots.items():
        stem, _, which = name.removesuffix(".default.weight").rpartition(".lora_")
        values[name] = value = torch.zeros(slot.shape, dtype=slot.dtype)
        if adapter is not None and stem in adapter.matrices:
            a, b, scale = adapter.matrices[stem]
            if which == "A":
                value[: len(a)] = a
            else:
                value[:, : len(a)] = b.double() * scale
    return values
