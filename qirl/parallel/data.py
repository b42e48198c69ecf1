"""Data parallelism from outside the model: ranks, FSDP2, and the gathers of the trainer.

`torchrun` starts the ranks; without it there is one. Losses are divided by global counts, so gradients are summed over
ranks (FSDP's own divide factor is 1) and the result does not depend on their number.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from qirl.config_parallel import Parallel
from qirl.errors import UserError
from qirl.parallel.mesh import Axis, Degrees, make_mesh


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    rank, world: its place among the data parallel ranks, which draw samples of their own; the ranks of `tp` share one model and
    draw the same ones. grid: the mesh of all processes, None for one. mesh: the one that FSDP shards over, None where it does
    not.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    mesh: DeviceMesh | None = None
    grid: DeviceMesh | None = None
    data: Axis = Axis()
    tp: Axis = Axis()

    @property
    def first(self) -> bool:
        """Whether this is the one process of all that writes."""
        return self.rank == 0 and self.tp.rank == 0

    @property
    def alone(self) -> bool:
        return self.world * self.tp.size == 1

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier()


def world_size() -> int:
    """The number of processes that torchrun announces, known before any of them has joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


def data_ranks(parallel: Parallel, world: int | None = None) -> int:
    """How many of `world` processes (None: torchrun's) draw samples of their own. Raises UserError as `Degrees.of` does."""
    return Degrees.of(parallel, world_size() if world is None else world).dp


def device_of(name: str, option: str = "run.device") -> torch.device:
    """The device that an option names: "auto" (a GPU if there is one), "cpu", "cuda" (that of LOCAL_RANK), "cuda:1", ...

    Raises UserError for a GPU that is not there.
    """
    here = torch.cuda.is_available()
    if name == "cpu" or name == "auto" and not here:
        return torch.device("cpu")
    if not here:
        raise UserError(f"{option}={name}, but torch finds no GPU here (see `qirl doctor`); use {option}=cpu, or auto")
    _, _, given = name.partition(":")
    index, count = int(given or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        which = f"{option}={name}" if given else f"{option}={name} of LOCAL_RANK {index}"
        raise UserError(f"{which}: there are {count} GPUs here, cuda:0 to cuda:{count - 1}; use one of them, or cpu")
    return torch.device("cuda", index)


def run_device(name: str) -> torch.device:
    """The device of `run.device` on this rank. Raises UserError as `device_of` does, and for one GPU for several ranks."""
    if ":" in name and world_size() > 1:
        raise UserError(
            f"run.device={name} is one GPU for all {world_size()} ranks of torchrun; use run.device=cuda, which gives every "
            "rank its own, or start one process"
        )
    return device_of(name)


def use_device(name: str) -> torch.device:
    """`run_device`, as the GPU on which this process computes from now on."""
    device = run_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start(always_mesh: bool = False, device: str = "auto", parallel: Parallel | None = None) -> Ranks:
    """Joins the process group that torchrun describes (nccl on GPUs, gloo on CPUs).

    always_mesh: one data parallel rank gets a mesh too, for what FSDP does besides sharding (bfloat16 over float32 weights).
    device: as `run_device` takes it, and refuses it. Raises UserError where `parallel` does not fit the number of processes.
    """
    world = world_size()
    degrees = Degrees.of(parallel or Parallel(), world)
    own = use_device(device)
    if world == 1 and not always_mesh:
        return Ranks(device=own)
    if not dist.is_initialized():
        backend = "nccl" if own.type == "cuda" else "gloo"
        if world > 1:
            dist.init_process_group(backend)
            atexit.register(leave_group)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    grid = make_mesh(own.type, degrees)
    data, tp = Axis.of(grid, "dp"), Axis.of(grid, "tp")
    return Ranks(data.rank, data.size, own, grid["dp"] if data.size > 1 or always_mesh else None, grid, data, tp)


def leave_group() -> None:
    """Leaves the process group, if this process is in one: before the interpreter goes, whose end gloo's threads may not
    survive."""
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # another rank is gone: this one ends all the same
            dist.destroy_process_group()


def shard(model: torch.nn.Module, ranks: Ranks, dtype: torch.dtype, blocks=None) -> torch.nn.Module:
    """Shards every block and the rest over the ranks, in place; computes in `dtype`, reduces in float32 or better.

    blocks: modules that are gathered one at a time; None: the model's transformer_blocks.
    """
    if ranks.mesh is None:
        return model
    blocks = list(model.transformer_blocks if blocks is None else blocks)
    # keys and values leave their block as views; nothing changes them in place, which is what FSDP warns of
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    own = max(model.parameters(), key=lambda p: p.requires_grad).dtype  # of a trained weight, if there is one
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=own, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        if hasattr(block, "keys_values"):
            register_fsdp_forward_method(block, "keys_values")
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    for module in (*blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to sum
    return model


def local_part(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The part of `whole` that this rank holds of `parameter`: its rows where it is sharded, else all of it."""
    if not isinstance(parameter, DTensor):
        return whole
    part = DTensor.from_local(whole.to(parameter.device), parameter.device_mesh, [Replicate()], run_check=False)
    return part.redistribute(placements=parameter.placements).to_local()


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor that this rank holds of `parameter`."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def sharded_as(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part`, in the shape of what this rank holds of `parameter`, as a tensor that is sharded like it and shares its memory."""
    if not isinstance(parameter, DTensor):
        return part
    whole = dict(shape=parameter.shape, stride=parameter.stride())
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **whole)


@contextlib.contextmanager
def gathered(model: torch.nn.Module):
    """Keeps the weights whole inside the block: a rollout gathers them once instead of at every step."""
    if not hasattr(model, "set_reshard_after_forward"):
        yield
        return
    modules = (*model.transformer_blocks, model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def gather_rows(ids: torch.Tensor, values: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' rows, sorted by id, on the host: int64 [n] and float64 [n, K]. The same number of rows on each rank.

    One collective; ids stay integers (float32 would merge ids beyond 2^24), values travel as their float64 bits.
    """
    table = torch.cat([ids.cpu()[:, None], values.detach().cpu().double().contiguous().view(torch.int64)], 1)
    if ranks.world > 1:
        table = table.to(ranks.device)
        parts = [torch.empty_like(table) for _ in range(ranks.world)]
        dist.all_gather(parts, table, group=ranks.data.group)
        table = torch.cat(parts)
    table = table.cpu()[torch.argsort(table[:, 0].cpu())]
    return table[:, 0], table[:, 1:].contiguous().view(torch.float64)


def agree(seam: bool, packs: int, ranks: Ranks) -> tuple[bool, int]:
    """(any rank needs the seam, the largest number of packs): every rank runs the same collectives in one order."""
    if ranks.alone:
        return seam, packs
    both = torch.tensor([int(seam), packs], device=ranks.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool(both[0]), int(both[1])
