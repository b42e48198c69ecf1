"""LoRA adapters on disk, in peft's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qirl.errors import UserError
from qirl.models.lora import target_pattern

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# fields of adapter_config.json that say nothing of the weights, or are read below; any other must be unset
_HARMLESS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "lora_alpha", "use_rslora", "init_lora_weights", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    "loftq_config", "lora_ga_config",
}  # fmt: skip
# starts after which the weight is W + scale * B A of an unchanged W; PiSSA and the like change W as well
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """Low-rank matrices of a base: matrices[module] = (A [rank, in], B [out, rank]), the weight is W + scale * B A."""

    rank: int
    scale: float
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    base: str | None

    def check(self, base: nn.Module, folder: Path) -> None:
        """Raises UserError if a matrix has no place in `base` (which may be on the meta device)."""
        for name, (a, b) in self.matrices.items():
            try:
                weight = base.get_submodule(name).weight
            except AttributeError:
                raise UserError(f"{folder} adapts '{name}', which the base does not have; take its own base") from None
            if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != self.rank or b.shape[1] != self.rank:
                raise UserError(
                    f"{folder}: '{name}' is {list(b.shape)} times {list(a.shape)} with r={self.rank}, the base has "
                    f"{list(weight.shape)} there; take the adapter's own base"
                )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (Path(folder) / CONFIG).exists()


def save_adapter(state: dict[str, torch.Tensor], lora, base: str | None, folder: Path) -> None:
    """Writes the adapter "default" of a state dict with adapters; lora: the run's model.lora. Any rank's whole tensors."""
    from peft import LoraConfig

    tensors = {
        PREFIX + name.replace(".default.", "."): value.contiguous() for name, value in state.items() if ".lora_" in name
    }
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=target_pattern(lora.targets), base_model_name_or_path=base,
        inference_mode=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter saved by peft or by a LoRA run. Raises UserError for damaged files and for more than plain LoRA."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder / WEIGHTS} does not exist; copy the adapter folder again") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no readable adapter ({error}); copy it again") from None
    rank, alpha = _plain_lora(config, folder / CONFIG)
    stems = _stems(tensors, folder)
    matrices = {stem: tuple(tensors[f"{PREFIX}{stem}.lora_{x}.weight"] for x in "AB") for stem in stems}
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(rank, scale, matrices, config.get("base_model_name_or_path"))


def _plain_lora(config, path: Path) -> tuple[int, float]:
    """(rank, alpha). Raises UserError, naming the field, unless the weights are W + scale * B A with one scale."""
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object; copy the adapter again")
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: peft_type={config['peft_type']!r} is not LoRA; merge the adapter into a model")
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain and isinstance(start, str) for plain in _PLAIN_STARTS):
        raise UserError(
            f"{path}: init_lora_weights={start!r} changes the base as well; convert the adapter (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it into a model"
        )
    for name in sorted(config.keys() - _HARMLESS):
        if config[name] not in (None, False, "none", {}, []):
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; merge the adapter into a model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path}: r={rank!r} must be a whole number of at least 1; copy the adapter again")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{path}: lora_alpha={alpha!r} must be a number; copy the adapter again")
    return rank, float(alpha)


def add_slots(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Adds places for any of `adapters`, one at a time, to a model in place: `fill` says what goes there."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA teachers need peft; pip install 'qirl[lora]', or name their merged models") from None
    rank = max(adapter.rank for adapter in adapters)
    modules = sorted({name for adapter in adapters for name in adapter.matrices})
    with torch.random.fork_rng():
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), model)


def fill(slots: dict[str, torch.Tensor], adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """The values of all slots (name to parameter) for an adapter, or for none: smaller ranks are filled up with zeros."""
    values = {}
    for name, slot in slots.items():
        stem, _, which = name.removesuffix(".default.weight").rpartition(".lora_")
        values[name] = value = torch.zeros(slot.shape, dtype=slot.dtype)
        if adapter is not None and stem in adapter.matrices:
            a, b = adapter.matrices[stem]
            if which == "A":
                value[: adapter.rank] = a
            else:
                value[:, : adapter.rank] = b.double() * adapter.scale
    return values


def _stems(names: Iterable[str], folder: Path) -> list[str]:
    """The adapted modules; both matrices of each must be there."""
    names = set(names)
    stems = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names})
    wanted = {f"{PREFIX}{stem}.lora_{x}.weight" for stem in stems for x in "AB"}
    if wanted != names or not stems:
        odd = min(wanted ^ names, default=WEIGHTS)
        raise UserError(f"{folder / WEIGHTS}: '{odd}' is missing or no LoRA matrix of a transformer; copy it again")
    return stems
