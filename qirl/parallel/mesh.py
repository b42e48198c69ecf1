"""The ranks as a grid of four axes: pipeline stages (pp), data (dp), context (cp) and tensor parallel (tp).

The last axis runs fastest, so ranks of one tensor parallel group are neighbours: on one machine, over NVLink.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qirl.config_parallel import Parallel
from qirl.errors import UserError


@dataclass(frozen=True)
class Degrees:
    """How many ranks lie along each axis."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, options: Parallel, world: int) -> Degrees:
        """The degrees of `world` ranks. Raises UserError where they do not multiply to it."""
        fixed = options.pp * options.cp * options.tp
        asked = f"parallel.tp={options.tp}" if fixed == options.tp else f"parallel.pp x cp x tp = {fixed}"
        if world % fixed:
            more = -(-world // fixed) * fixed
            raise UserError(
                f"{asked} does not divide the number of ranks, {world}; start {more} of them (torchrun --nproc-per-node), or "
                f"use {math.gcd(world, fixed)}"
            )
        dp = world // fixed
        if options.dp not in (0, dp):
            raise UserError(
                f"parallel.dp={options.dp} x {fixed} ({asked}) is {options.dp * fixed} ranks and torchrun starts {world}; use "
                f"parallel.dp={dp}, or start {options.dp * fixed} ranks"
            )
        return cls(options.pp, dp, options.cp, options.tp)

    def check(self, config: Any) -> None:
        """Raises UserError where the transformer of `config` cannot be cut so: its heads (and with them its widths), its
        layers."""
        heads, layers = config.num_attention_heads, config.num_layers
        if heads % self.tp:
            fitting = " or ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            raise UserError(
                f"parallel.tp={self.tp} does not divide the model's {heads} attention heads (width {config.width}); use {fitting}"
            )
        if layers < self.pp:
            raise UserError(f"parallel.pp={self.pp} is more than the model's {layers} layers; use {layers} or fewer")


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it: its place among the ranks that differ along this axis alone, and their group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh, name: str) -> Axis:
        """The axis `name`; one rank where the mesh has none of that name."""
        if name not in (mesh.mesh_dim_names or ()):
            return cls()
        own = mesh[name]
        return cls(own.get_local_rank(), own.size(), own.get_group())

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank of the axis gave, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduces `tensor` in place over the axis; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op, group=self.group)
        return tensor


def make_mesh(device: str, degrees: Degrees) -> DeviceMesh:
    """The mesh of this process group: "dp", and every other axis that has more than one rank."""
    named = {n: d for n, d in vars(degrees).items() if d > 1 or n == "dp"}
    return init_device_mesh(device, tuple(named.values()), mesh_dim_names=tuple(named))


def turned(mesh: DeviceMesh, names: Sequence[str]) -> DeviceMesh:
    """The same ranks and groups with the axes in the order of `names`: DTensor cuts along the first one first."""
    order = [mesh.mesh_dim_names.index(name) for name in names]
    assert len(order) == mesh.ndim and math.prod(mesh.shape) == mesh.size()
    if len(order) == 1:
        return mesh
    groups = [mesh.get_group(name) for name in names]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh.mesh.permute(order), mesh_dim_names=tuple(names))
