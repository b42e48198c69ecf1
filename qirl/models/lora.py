"""LoRA by peft on the diffusers module names: add, switch off, merge."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from qirl.errors import UserError, nearest

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "out")


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> nn.Module:
    """Freezes the weights and adds adapters in place. Section 3: the KL reference is the same model, adapter off.

    Raises UserError if peft is missing or a target names no module.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "LoRA needs peft; pip install 'qirl[lora]', or train all parameters (model.lora.rank=0)"
        ) from None
    check_targets(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_pattern(targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def target_pattern(targets: Sequence[str]) -> str:
    """The regular expression, as peft reads it, of the modules in the blocks whose path ends in one of `targets`."""
    return rf"transformer_blocks\.\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises UserError for a target that is the end of no linear module's path in the blocks, such as attn.to_q."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(re.fullmatch(target_pattern([target]), name) for name in linears):
            paths = {name.split(".", 2)[2] for name in linears if name.startswith("transformer_blocks.")}
            known = {path.split(".", cut)[-1] for path in paths for cut in range(path.count(".") + 1)} - {"0"}
            raise UserError(
                f"model.lora.targets: no linear module in the blocks is called '{target}'{nearest(target, known)}"
            )


def _adapters(model: nn.Module):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


@contextlib.contextmanager
def adapter_off(model: nn.Module):
    """The frozen base, inside the block."""
    layers = _adapters(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def with_base(state: dict[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The adapters of a state dict over `weights` of the base as its file has them, in place of the state's own."""
    found = {name: value for name, value in state.items() if ".lora_" in name}
    for name, value in weights:
        stem, _, kind = name.rpartition(".")
        adapted = f"{stem}.base_layer.{kind}"
        found[adapted if adapted in state else name] = value
    return found


def merged_state(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict with adapters, merged into plain names: W + scale * B A, in float64, in W's dtype.

    scale = alpha / rank. State dicts without adapters come back as they are.
    """
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = (state[f"{stem}.lora_{x}.default.weight"].double() for x in "AB")
            value = (value.double() + scale * b @ a).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged
