"""AdamW with warm-up and clipping; an update whose gradient is not finite is left out.

On a GPU no update makes the host wait: the gradient's norm stays there, and torch's fused AdamW reads there by what to
divide the gradients and whether to leave everything as it is. `Engine.outcome` reads the norms of a whole training step.
What cannot be told on the device (the CPU's loop, torchao's 8 bits, apex) reads each norm before its update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from qirl.config_sections import Optimizer as Options
from qirl.errors import UserError
from qirl.parallel.data import local, sharded_as
from qirl.parallel.mesh import Axis
from qirl.parallel.sharding import WHOLE, Sharding
from qirl.run.checkpoint import adam_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Steps the trainable parameters of `model`.

    fused: whether torch's fused AdamW decides on the device; None: where all parameters are on a GPU, for on the CPU it rounds
    otherwise than the loop. sharding: how tensor parallelism cuts them. Raises UserError for weights that the implementation does not take; `check` knows the rest.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: Options,
        total_steps: int,
        fused: bool | None = None,
        sharding: Sharding = WHOLE,
    ):
        self.options, self.total, self.sharding = options, total_steps, sharding
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # what this rank holds of each: no implementation has to know of sharded tensors
        self.local = {name: local(p) for name, p in self.named.items()}
        on_gpu = all(p.device.type != "cpu" for p in self.local.values())
        self.fused = options.kind == "adamw" and options.impl != "apex" and (on_gpu if fused is None else fused)
        self.adam = self._adam(list(self.local.values()))

    def _adam(self, parameters: list[torch.Tensor]):
        o = self.options
        given = dict(lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        if o.kind == "adamw_8bit":
            return _eight_bits(self.named.values(), self.sharding)(parameters, **given)
        if o.impl == "apex":
            return ApexAdamW(parameters, **given)
        return torch.optim.AdamW(parameters, **given, fused=self.fused or None)

    def lr(self, step: int) -> float:
        """Learning rate of training step `step` (from 0)."""
        o = self.options
        warm = min(1.0, (step + 1) / o.warmup) if o.warmup else 1.0
        done = max(0, step - o.warmup) / max(1, self.total - o.warmup)
        return o.lr * warm * (0.5 * (1 + math.cos(math.pi * done)) if o.decay == "cosine" else 1.0)

    @torch.no_grad()
    def step(self, step: int) -> torch.Tensor:
        """Clips and applies the gradients, then clears them.

        Returns their norm before clipping, a number on their device; where that is not finite, weights, moments and step
        counts are what they were.
        """
        for group in self.adam.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # what is compiled reads it there
                group["lr"].fill_(self.lr(step))
            else:
                group["lr"] = self.lr(step)
        norm = self._step_on_the_device() if self.fused else self._step_after_reading()
        for parameter in (*self.named.values(), *self.local.values()):
            parameter.grad = None
        return norm

    def _step_on_the_device(self) -> torch.Tensor:
        norm = self._norm()
        self.adam.grad_scale = ((norm + 1e-6) / self.options.clip).clamp(min=1).float()
        self.adam.found_inf = norm.isfinite().logical_not().float()
        self._give_local()
        self.adam.step()
        return norm

    def _step_after_reading(self) -> torch.Tensor:
        if self.sharding.axis.size > 1:
            norm = self._norm()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._give_local()
        torch.nn.utils.clip_grads_with_norm_(self.local.values(), self.options.clip, norm)
        if norm.isfinite():
            self.adam.step()
        return norm

    def _norm(self) -> torch.Tensor:
        """`total_norm`, over tensor parallel ranks too."""
        grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        return total_norm(
            *([grads[name] for name in names] for names in self.sharding.split(grads)), self.sharding.axis
        )

    def _give_local(self) -> None:
        for name, parameter in self.named.items():
            self.local[name].grad = None if parameter.grad is None else local(parameter.grad)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The moments, sharded as their parameters, and step counts by parameter name, to save or to load into."""
        found = adam_tensors(self.adam, {own: name for name, own in self.local.items()})
        placed = lambda name, t: self.sharding.view(name, sharded_as(self.named[name], t))  # noqa: E731
        return {
            name: {part: placed(name, t) if part in _MOMENTS else t for part, t in state.items()}
            for name, state in found.items()
        }


def total_norm(
    gradients: Sequence[torch.Tensor], cut: Sequence[torch.Tensor] = (), axis: Axis | None = None
) -> torch.Tensor:
    """The 2-norm of all gradients together, float64 [], on their device and the same on every rank; no host waits for it.

    Sharded ones count over every axis of their mesh that shards them, replicated ones once. cut: those of which every rank of
    `axis` has its own part besides.
    """
    if axis is None or axis.size == 1:
        return _squares([*gradients, *cut]).sqrt()
    device = (*gradients, *cut)[0].device
    both = [
        _squares(some) if some else torch.zeros((), dtype=torch.float64, device=device) for some in (gradients, cut)
    ]
    return (both[0] + axis.all_reduce(both[1])).sqrt()


def _squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    alike = defaultdict(list)
    for gradient in gradients:
        where = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        alike[where].append(local(gradient))
    squares = []
    for where, own in alike.items():
        square = torch.stack(torch._foreach_norm(own)).double().square().sum()
        if where is not None:
            mesh, placements = where
            summed = [Partial() if place.is_shard() else Replicate() for place in placements]
            square = DTensor.from_local(square, mesh, summed, run_check=False).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum()


class ApexAdamW:
    """NVIDIA apex's FusedAdam with the state of torch's AdamW: "step", "exp_avg" and "exp_avg_sq" of each parameter.

    parameters: float32, on a GPU. apex counts steps once for all parameters, so one that gets its first gradient later than
    the others has their bias correction. Raises UserError for another dtype.
    """

    def __init__(self, parameters: list[torch.Tensor], **options):
        from apex.optimizers import FusedAdam

        if others := {p.dtype for p in parameters} - {torch.float32}:
            raise UserError(
                f"optimizer.impl=apex steps float32 weights, not {', '.join(map(str, others))}; use model.dtype=float32 "
                "or bfloat16, or optimizer.impl=torch"
            )
        self.fused = FusedAdam(parameters, bias_correction=True, adam_w_mode=True, set_grad_none=True, **options)
        self.param_groups, self.state = self.fused.param_groups, self.fused.state
        adam_tensors(self, {p: i for i, p in enumerate(parameters)})  # apex then makes no state of its own

    def step(self) -> None:
        for group in self.param_groups:
            stepping = [self.state[p] for p in group["params"] if p.grad is not None]
            group["step"] = max((int(state["step"]) for state in stepping), default=0)  # apex counts this one itself
            for state in stepping:
                state["step"] += 1
        self.fused.step()


def check(options: Options, device: torch.device) -> None:
    """Raises UserError where the optimizer's implementation is missing or does not run on `device`."""
    if options.impl != "apex":
        return
    if device.type != "cuda":
        raise UserError("optimizer.impl=apex runs on a GPU alone; use optimizer.impl=torch, the same numbers")
    try:
        import amp_C  # noqa: F401 its CUDA extension, which a build may lack
        from apex.optimizers import FusedAdam  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"optimizer.impl=apex needs NVIDIA's apex, built from source with its CUDA extensions ({error}); build it, or use "
            "optimizer.impl=torch, whose fused AdamW gives the same numbers"
        ) from None


def _eight_bits(parameters: Iterable[torch.Tensor], sharding: Sharding) -> type[torch.optim.Optimizer]:
    """torchao's AdamW. Raises UserError without torchao, and for weights that are sharded."""
    if sharding.axis.size > 1 or any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in parameters):
        raise UserError("optimizer.kind=adamw_8bit runs on one rank; several share the moments: use adamw")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer.kind=adamw_8bit needs torchao ({error}): pip install 'qirl[torchao]'") from None
    return AdamW8bit
