"""Column and row parallel linear layers, and where tokens enter and leave them.

A rank's part of a linear layer is a linear layer of the same kind: plain, with LoRA, int8 or in 8-bit products. So nothing
replaces it; what is added from outside is a hook. `enter` stands before the module whose layers share one x (one all-gather
for queries, keys and values), `leave` after a row layer. Between the two are this rank's heads or hidden channels:

    x --enter--> column layers -> heads, or activations -> row layer --leave--> y

    sequence   x, y                 enter                            leave
    no         [N, W], replicated   as it is; gradient all-reduced   all-reduce
    yes        [N / size, W]        all-gather                       reduce-scatter
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qirl.parallel import collectives
from qirl.parallel.mesh import Axis


@dataclass(frozen=True)
class Region:
    """The tensor parallel part of a block. sequence: whether tokens are cut outside of it."""

    axis: Axis
    sequence: bool = False

    def enter(self, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """rows: N, where cut tokens were filled up to a multiple of the ranks; None: keep what they were filled with."""
        return collectives.gather(x, self.axis, rows) if self.sequence else collectives.copy(x, self.axis)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        return collectives.scatter(y, self.axis) if self.sequence else collectives.reduce(y, self.axis)

    def feed_forward(self, module: nn.Module, row: nn.Module) -> None:
        """A module of x alone whose first layers are column layers, and its row layer."""
        module.register_forward_pre_hook(lambda _, inputs: (self.enter(inputs[0]),))
        self.row(row)

    def row(self, layer: nn.Module) -> None:
        """A layer whose inputs are cut: its outputs are summed."""
        layer.register_forward_hook(lambda _, inputs, out: self.leave(out))

    def whole_column(self, layer: nn.Module) -> None:
        """A column layer of rows that are no tokens (modulation): its outputs [R, out] are put together on every rank."""
        layer.register_forward_hook(lambda _, inputs, out: collectives.gather_columns(out, self.axis, self.sequence))
