"""AdamW with warm-up, clipping, and a guard that skips an update whose gradient is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from qirl.config_sections import Optimizer as Options
from qirl.errors import UserError
from qirl.run.checkpoint import adam_tensors


class Optimizer:
    """Steps the trainable parameters of `model`; `state` holds what a checkpoint needs, by parameter name."""

    def __init__(self, model: torch.nn.Module, options: Options, total_steps: int):
        self.options, self.total = options, total_steps
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kind = _eight_bits(self.named.values()) if options.kind == "adamw_8bit" else torch.optim.AdamW
        self.adam = kind(
            self.named.values(), lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
        )

    def lr(self, step: int) -> float:
        """Learning rate of training step `step` (from 0)."""
        o = self.options
        warm = min(1.0, (step + 1) / o.warmup) if o.warmup else 1.0
        done = max(0, step - o.warmup) / max(1, self.total - o.warmup)
        return o.lr * warm * (0.5 * (1 + math.cos(math.pi * done)) if o.decay == "cosine" else 1.0)

    def step(self, step: int) -> tuple[float, bool]:
        """Clips and applies the gradients, then clears them: (gradient norm, skipped)."""
        for group in self.adam.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # what is compiled reads it there
                group["lr"].fill_(self.lr(step))
            else:
                group["lr"] = self.lr(step)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.options.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        skipped = not math.isfinite(norm)
        if skipped:
            warnings.warn(f"step {step}: the gradient norm is {norm}; this update is skipped", stacklevel=2)
        else:
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm, skipped

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The moments and step counts by parameter name, to save or to load into."""
        return adam_tensors(self.adam, {p: name for name, p in self.named.items()})


def _eight_bits(parameters: Iterable[torch.Tensor]) -> type[torch.optim.Optimizer]:
    """torchao's AdamW. Raises UserError without torchao, and for weights that are sharded."""
    if any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in parameters):
        raise UserError("optimizer.kind=adamw_8bit runs on one rank; several share the moments: use adamw")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer.kind=adamw_8bit needs torchao ({error}): pip install 'qirl[torchao]'") from None
    return AdamW8bit
