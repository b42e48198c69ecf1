"""LoRA on the diffusers module names: add, switch off, merge. Names and files are peft's; the layer is ours."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from qirl.errors import UserError, nearest
from qirl.models.linear import products_of, switched, together

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "out")


class LoraLinear(nn.Module):
    """A frozen linear layer W [out, in] beside A [rank, in] and B [out, rank]: y = x W^T + scale (x A^T) B^T.

    Names of parameters as in peft, for its adapter "default". A begins as peft's does, B at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        weight = base.weight
        exact = weight.dtype if weight.dtype.is_floating_point and weight.element_size() > 2 else torch.float32
        made = dict(bias=False, device=weight.device, dtype=exact)
        self.base_layer, self.scale, self.enabled = base, scale, True
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, **made)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, **made)})
        nn.init.kaiming_uniform_(self.lora_A["default"].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out], in x's dtype."""
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: torch.Tensor, layers: Sequence[LoraLinear]) -> Sequence[torch.Tensor]:
        """What `layers` make of the same x: their adapters read it in one product, and in one they send its gradient."""
        bases, first = [layer.base_layer for layer in layers], layers[0]
        if not first.enabled:
            return together(x, *bases)
        if any((layer.scale, layer.enabled) != (first.scale, True) for layer in layers) or len({*map(type, bases)}) > 1:
            return [layer(x) for layer in layers]
        a, b = (
            [getattr(layer, name)["default"].weight.to(x.dtype) for layer in layers] for name in ("lora_A", "lora_B")
        )
        return _Products.apply(x, products_of(bases), first.scale, *a, *b)


class _Products(torch.autograd.Function):
    """The products of LoRA layers that share x, the adapters' scaled and added into the frozen ones by the same call,
    forward and backward alike."""

    @staticmethod
    def forward(ctx, x, base, scale, *ab):
        a, b = ab[: len(ab) // 2], ab[len(ab) // 2 :]
        joint = a[0] if len(a) == 1 else torch.cat(a)
        low, ctx.ranks = x @ joint.T, [len(own) for own in a]
        ctx.save_for_backward(x, low, joint, *b)
        ctx.base, ctx.scale = base, scale
        parts = zip(base.forward(x), low.split(ctx.ranks, 1), b, strict=True)
        return tuple(out.addmm_(own, w.T, alpha=scale) for out, own, w in parts)

    @staticmethod
    def backward(ctx, *grads):
        x, low, joint, *b = ctx.saved_tensors
        of_low, scaled = torch.empty_like(low), dict(beta=0, alpha=ctx.scale)  # beta=0: the first argument is not read
        for grad, own, w in zip(grads, of_low.split(ctx.ranks, 1), b, strict=True):
            torch.mm(grad, w, out=own)
        of_x = ctx.base.backward(grads).addmm_(of_low, joint, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        of_a = torch.addmm(joint, of_low.T, x, **scaled).split(ctx.ranks)
        parts = zip(b, grads, low.split(ctx.ranks, 1), strict=True)
        return of_x, None, None, *of_a, *(torch.addmm(w, grad.T, own, **scaled) for w, grad, own in parts)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> nn.Module:
    """Freezes the weights and adds adapters in place. Section 3: the KL reference is the same model, adapter off.

    Raises UserError if a target names no module.
    """
    check_targets(model, targets)
    pattern = re.compile(target_pattern(targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        put_adapters(model, [n for n, m in model.named_modules() if pattern.fullmatch(n)], rank, alpha / rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def put_adapters(model: nn.Module, names: Iterable[str], rank: int, scale: float) -> None:
    """Puts a LoraLinear in place of the linear layers `names`."""
    for name in names:
        parent, _, own = name.rpartition(".")
        base = model.get_submodule(name)
        if isinstance(base, nn.Linear):
            model.get_submodule(parent).register_module(own, LoraLinear(base, rank, scale))


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


def adapter_off(model: nn.Module) -> contextlib.AbstractContextManager:
    """The frozen base, inside the block."""
    return switched((m for m in model.modules() if isinstance(m, LoraLinear)), "enabled", False)


def with_base(state: dict[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The adapters of a state dict over `weights` of the base as its file has them, in place of the state's own."""
    found = {name: value for name, value in state.items() if ".lora_" in name}
    for name, value in weights:
        stem, _, kind = name.rpartition(".")
        adapted = f"{stem}.base_layer.{kind}"
        found[adapted if f"{stem}.lora_A.default.weight" in state else name] = value
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
