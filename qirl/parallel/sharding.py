"""How tensor parallelism cuts a transformer's parameters: by their names, and nothing else.

Of a layer y = x W^T + b with W [out, in], "column" cuts the outputs (rows of W, b, B of LoRA) and "row" the inputs (columns of
W, A of LoRA). The bias of a row layer is the first rank's, for outputs of all ranks are summed. Everything else is
replicated; what a replicated parameter does on this rank's part alone ("partial": A of a column layer, B of a row layer, norms of
heads) has a gradient that is summed over the ranks. FSDP then shards each rank's part, whichever it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from qirl.parallel.data import Ranks
from qirl.parallel.mesh import Axis, turned

_NAME = re.compile(
    r"transformer_blocks\.\d+\.(?P<layer>.+?)(\.base_layer)?(\.lora_(?P<ab>[AB])\.default)?\.(?P<what>weight|bias|scale)"
)


@dataclass(frozen=True)
class Plan:
    """The layers of a block by how they are cut; heads: weights that every head uses."""

    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a parameter lies on the ranks. dim: the one that is cut, None where it is not. partial: its gradient is this
    rank's part of a sum. first: only the first rank has it."""

    dim: int | None = None
    partial: bool = False
    first: bool = False


@dataclass(frozen=True)
class Sharding:
    """A plan on this rank; without a plan nothing is cut."""

    plan: Plan = Plan()
    ranks: Ranks = Ranks()

    @property
    def axis(self) -> Axis:
        return self.ranks.tp

    def place(self, name: str) -> Place:
        """Of the parameter `name`, with or without adapters."""
        found = _NAME.fullmatch(name)
        if self.axis.size == 1 or found is None:
            return Place()
        layer, ab, what = found["layer"], found["ab"], found["what"]
        if layer in self.plan.heads:
            return Place(partial=True)
        if layer in self.plan.column:
            return Place(partial=True) if ab == "A" else Place(0)
        if layer in self.plan.row:
            if ab == "B":
                return Place(partial=True)
            return Place(1) if what == "weight" else Place(first=what == "bias")
        return Place()

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """What this rank holds of a parameter of this shape, to index it by; None for nothing."""
        dim, _, first = self.place(name)
        if first and self.axis.rank:
            return None
        if dim is None:
            return ()
        each, rest = divmod(shape[dim], self.axis.size)
        assert not rest, f"{name} {shape} is not cut evenly by {self.axis.size}"
        return (*(slice(None),) * dim, slice(each * self.axis.rank, each * (self.axis.rank + 1)))

    @torch.no_grad()
    def cut(self, model: nn.Module, adapters: bool = False) -> nn.Module:
        """Leaves this rank's parts in place of whole parameters (the adapters, or all others), which may be on the meta device.

        Layers keep their whole sizes as in_features and out_features.
        """
        for name, parameter in list(model.named_parameters()):
            part = self.part(name, parameter.shape) if (".lora_" in name) == adapters else ()
            if part == ():
                continue
            stem, _, own = name.rpartition(".")
            new = None
            if part is not None:
                new = nn.Parameter(parameter.detach()[part].clone(), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(stem), own, new)
        return model

    def reduce(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Sums the gradients of partial parameters over the ranks, in one message per dtype."""
        grads = [p.grad for name, p in parameters.items() if p.grad is not None and self.place(name).partial]
        own = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        for dtype in sorted({g.dtype for g in own}, key=str):
            alike = [g for g in own if g.dtype == dtype]
            flat = self.axis.all_reduce(torch.cat([g.flatten() for g in alike]))
            for grad, total in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
                grad.copy_(total.view_as(grad))

    def split(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Those that every rank has whole, and those of which each rank has its own part."""
        own, whole = [], []
        for name in names:
            dim, _, first = self.place(name)
            (whole if dim is None and not first else own).append(name)
        return whole, own

    def view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter `name`, or a tensor like it, as a DTensor of its whole shape that shares the memory of `tensor`: what
        checkpoints save and load, whatever the ranks. As it is where this axis does not cut it."""
        dim = self.place(name).dim
        if dim is None:
            return tensor
        shape = list(tensor.shape)
        shape[dim] *= self.axis.size
        stride = torch.empty(shape, device="meta").stride()
        if isinstance(tensor, DTensor):
            local, mesh, places = tensor.to_local(), self._tp_first, [Shard(dim), *tensor.placements]
        else:
            local, mesh, places = tensor, self.ranks.grid["tp"], [Shard(dim)]
        return DTensor.from_local(local, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)

    @functools.cached_property
    def _tp_first(self):
        """The mesh by which FSDP's shards are parts of this axis's: where both cut one dim, tp cuts first."""
        return turned(self.ranks.grid, ("tp", "dp"))

    def views(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.view(name, tensor) for name, tensor in tensors.items()}

    def wholes(self, state: Mapping[str, torch.Tensor], holding: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a state dict whose names hold `holding`, whole, one after the other; called on every rank. Not every
        rank has all of them (`Place.first`)."""
        names = self.axis.gather_objects([name for name in state if holding in name])
        for name in dict.fromkeys(name for own in names for name in own):
            if name in state:
                tensor = state[name].detach()
                yield name, self._whole(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def _whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        dim = self.place(name).dim
        if dim is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.axis.size)]
        dist.all_gather(parts, part.contiguous(), group=self.axis.group)
        return torch.cat(parts, dim)


WHOLE = Sharding()  # one rank has all of every parameter
