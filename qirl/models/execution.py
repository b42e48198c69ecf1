"""How a model computes, set from outside: which attention backend, and the blocks' products in 8-bit floats or not."""

from __future__ import annotations

import contextlib

import torch

from qirl.config_sections import Model, Section
from qirl.models import fp8, fp8_te
from qirl.models.architecture import Transformer
from qirl.models.attention_backends import use_attention
from qirl.models.graphs import Graphed, check_graphs
from qirl.parallel.data import gathered


def compute_as(model: Transformer, options: Model) -> Transformer:
    """Sets `model.attention` and `model.fp8` on a model that lies on its device, before adapters; returns it.

    Raises UserError where they cannot serve the device, the dtype or the sizes.
    """
    device, dtype = next(model.parameters()).device, getattr(torch, options.dtype)
    use_attention(model, options.attention, device, dtype)
    if options.fp8 != "off":
        {"torch": fp8.use_fp8, "te": fp8_te.use_te}[options.fp8](model, device, dtype)
    return model


def runner_of(model: Transformer, config: Section, sharded: bool = False) -> Transformer | Graphed:
    """What is called as the model: itself, or with `run.graphs` its graphs. Raises UserError where those cannot be had."""
    if not config.run.graphs:
        return model
    check_graphs(model, sharded)
    return Graphed(model)


@contextlib.contextmanager
def at_rest(model: Transformer):
    """Weights do not change inside the block: a rollout gathers and quantises them once instead of at every step."""
    with gathered(model), fp8.held(model):
        yield
