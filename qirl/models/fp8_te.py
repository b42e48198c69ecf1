"""The blocks' matrix products by Transformer Engine, in 8-bit floats with current scaling (`model.fp8=te`).

Scales come from the tensors at hand, so rollout and update quantise alike. Transformer Engine is imported here alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qirl.errors import UserError
from qirl.models.fp8 import products_in
from qirl.models.quantised import FrozenLinear

ROWS = 16  # tokens are padded to a multiple of it


class TeLinear(nn.Linear):
    """A linear layer that runs as te.Linear; its parameters are those of the layer it is made from, under their names."""

    def __init__(self, linear: nn.Linear, te, recipe):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        rows, columns = self.weight.shape  # of this rank's part
        inner = te.Linear(columns, rows, bias=self.bias is not None, device="meta")
        self.engine = te, recipe, [inner]  # a list: its parameters are none of this module's
        self.exact = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out], in x's dtype."""
        if self.exact:
            return F.linear(x, self.weight, self.bias)
        te, recipe, [inner] = self.engine
        inner._parameters["weight"] = self.weight
        if self.bias is not None:
            inner._parameters["bias"] = self.bias
        more = -len(x) % ROWS
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return inner(F.pad(x, (0, 0, 0, more)) if more else x)[: len(x)]


def use_te(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a TeLinear in place of the linear layers of the blocks (`fp8.products_in`).

    Raises UserError without Transformer Engine or a GPU that it serves, and for a base in 8 bits.
    """
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8CurrentScaling
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError without cuDNN
        raise UserError(
            f"model.fp8=te needs Transformer Engine, which cannot be imported here ({str(error).splitlines()[0]}); "
            "pip install 'qirl[te]', or use model.fp8=torch"
        ) from None
    serves, why = te.fp8.check_fp8_support()
    if device.type != "cuda" or not serves:
        raise UserError(
            f"model.fp8=te needs a GPU with 8-bit products ({why or 'this run is on a CPU'}); use model.fp8=off"
        )
    recipe = Float8CurrentScaling()
    for parent, name, linear in products_in(model):
        if isinstance(linear, FrozenLinear):
            raise UserError(f"model.fp8=te takes no base in 8 bits (model.base={linear.kind}); use model.fp8=torch")
        setattr(parent, name, TeLinear(linear, te, recipe))
