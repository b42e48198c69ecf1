"""Calls of a transformer as CUDA graphs: one launch instead of thousands (`run.graphs`).

A call is captured when packs of its shape come a second time, and replayed from then on: what the pack and the inputs say is
copied into the tensors of the first one. Packs are padded to few shapes (`pad`), and lengths of text are data of the
attention kernels, so prompts of different lengths share a graph. With gradients there are two graphs, forward and backward;
the backward adds the parameters' gradients to buffers that become their `grad`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qirl.errors import UserError
from qirl.models.architecture import KeysValues, Transformer
from qirl.models.attention import Call, Calls
from qirl.models.attention_backends import backend_for
from qirl.models.fp8_te import TeLinear
from qirl.models.lora import LoraLinear
from qirl.packing import Pack

PAD = 128  # tokens of text that packs are padded to a multiple of
KEPT = 32  # graphs; the one that was not used for longest goes
ALONE = 64  # calls in a row whose shapes did not come again, before a warning


class Graphed:
    """A model whose calls are replayed. It is called as the model is, and has its attributes.

    recorder: makes what captures, a class like CudaRecorder. There are two, with memory of their own: one for calls whose
    results are used up, backward included, before the next call comes, and one for prefixes, whose activations must outlive
    the calls between their forward and their backward.
    """

    pad = PAD

    def __init__(self, model: Transformer, recorder: Callable | None = None):
        recorder = recorder or CudaRecorder
        self.model, self.passing, self.lasting = model, recorder(), recorder()
        self.calls: OrderedDict[Any, _Call | None] = OrderedDict()
        self.gradients = Gradients(model)
        self.switches = [m for m in model.modules() if isinstance(m, LoraLinear) or hasattr(m, "exact")]
        self.alone, self.latest = 0, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, pack: Pack | None, latents=None, t=None, past: KeysValues | None = None):
        if pack is None:
            return self.model(pack, latents, t, past)
        inputs = [x for x in (latents, t) if x is not None] + [x for pair in past or () for x in pair]
        shapes = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        key = self._facts(pack)[0], shapes, latents is None, torch.is_grad_enabled(), self._mode()
        if key not in self.calls:
            self.calls[key] = None
            self._forget()
            return self.model(pack, latents, t, past)
        self.calls.move_to_end(key)
        self.alone = 0
        if self.calls[key] is None:
            self.calls[key] = _Call(self, pack, latents, t, past)
        return self.calls[key](pack, self._facts(pack)[1], inputs)

    def _facts(self, pack: Pack) -> tuple[Any, list[torch.Tensor]]:
        if "graph" not in pack.memo:
            pack.memo["graph"] = facts(pack, self._backend(pack))
        return pack.memo["graph"]

    def _backend(self, pack: Pack):
        head = torch.empty(0, 1, self.config.attention_head_dim, dtype=self.dtype, device=pack.position.device)
        return self.transformer_blocks[0].attn.backend or backend_for(head)

    def _mode(self) -> frozenset:
        """What changes how the model computes beside its inputs: adapters on or off, 8 bits or not."""
        return frozenset((getattr(m, "enabled", None), getattr(m, "exact", None)) for m in self.switches)

    def _forget(self) -> None:
        self.alone += 1
        if self.alone == ALONE:
            warnings.warn(
                f"run.graphs: {ALONE} packs in a row had shapes that did not come again, and ran without a graph; give images "
                "one size (world.resolution) and groups that fill their packs, or set run.graphs=false",
                stacklevel=3,
            )
        while len(self.calls) > KEPT:
            self.calls.popitem(last=False)


class Gradients:
    """The sums of the parameters' gradients, in memory that does not move."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sums: list[torch.Tensor] = []
        self.reached: set[int] = set()  # by a backward: the others have no gradient, not one of zeros

    def make(self) -> None:
        """Before a capture: what is allocated inside would belong to that graph."""
        self.sums = self.sums or [torch.zeros_like(p) for p in self.parameters]

    def ready(self) -> None:
        """Makes the sums the parameters' `grad`, with what that holds already."""
        pairs = [(self.parameters[i], self.sums[i]) for i in self.reached]
        fresh = [(p, own) for p, own in pairs if p.grad is not own]
        if fresh:
            torch._foreach_zero_([own for _, own in fresh])
        for p, own in fresh:
            if p.grad is not None:
                own.copy_(p.grad)
            p.grad = own

    def add(self, found: Sequence[torch.Tensor | None]) -> None:
        """Adds the gradients of all parameters; None where there is none."""
        own = [i for i, grad in enumerate(found) if grad is not None]
        self.reached.update(own)
        torch._foreach_add_([self.sums[i] for i in own], [found[i] for i in own])


class _Call:
    """One captured call: static tensors to copy into, graphs, and the outputs they leave."""

    def __init__(self, owner: Graphed, pack: Pack, latents, t, past):
        self.owner, self.pack = owner, copy_of(pack)
        self.latents, self.t = (None if x is None else x.detach().clone() for x in (latents, t))
        self.past = None
        if past is not None:
            self.past = [tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in pair) for pair in past]
        self.leaves = [x for pair in self.past or () for x in pair]
        self.inputs = [x for x in (self.latents, self.t) if x is not None] + self.leaves
        self.static = facts(self.pack, owner._backend(pack))[1]
        self.last, self.number, self.grad = None, 0, torch.is_grad_enabled()
        self.lasts = self.latents is None and self.grad  # its activations outlive other calls
        named = owner.model.named_parameters() if self.grad else ()
        self.aliases = {name: p.detach().requires_grad_() for name, p in named if p.requires_grad}
        record = owner.lasting if self.lasts else owner.passing
        self.forward = record(self._forward)
        self.backward = None
        if self.grad and any(x.requires_grad for x in self.outs):
            owner.gradients.make()
            self.slopes = [torch.zeros_like(x) for x in self.outs]
            self.backward = record(self._backward)

    def _forward(self) -> None:
        for part in _parts(self.pack):
            part.memo.pop("rope", None)
        model, inputs = self.owner.model, (self.pack, self.latents, self.t, self.past)
        with torch.set_grad_enabled(self.grad):
            # parameters in tensors of their own: those of the model belong, for autograd, to the stream of calls before
            out = torch.func.functional_call(model, self.aliases, inputs) if self.grad else model(*inputs)
        self.outs = [x for pair in out for x in pair] if self.latents is None else [out]

    def _backward(self) -> None:
        """Gradients of the past, and the parameters' added up. Activations that last are kept, so that no graph reuses them."""
        wanted = [x for x in self.leaves if x.requires_grad]
        outs = [(x, slope) for x, slope in zip(self.outs, self.slopes, strict=True) if x.requires_grad]
        found = torch.autograd.grad(
            [x for x, _ in outs], [*wanted, *self.aliases.values()], [slope for _, slope in outs],
            allow_unused=True, retain_graph=self.lasts,
        )  # fmt: skip
        slopes = iter(found)
        self.of_leaves = [next(slopes) if x.requires_grad else None for x in self.leaves]
        self.owner.gradients.add(found[len(wanted) :])

    def __call__(self, pack: Pack, tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]):
        if self.last is not pack:
            for own, new in zip(self.static, tensors, strict=True):
                own.copy_(new)
            self.last = pack
        if inputs:
            with torch.no_grad():
                torch._foreach_copy_(self.inputs, list(inputs))
        if not self.lasts:
            self.owner.latest = self
        if self.backward is None:
            self.forward()
            outs = [x.detach().clone() for x in self.outs]
        else:
            anchor = torch.zeros((), requires_grad=True)  # outputs need a gradient though no input may
            outs = _Replay.apply(self, anchor, *inputs[len(inputs) - len(self.leaves) :])
        return list(zip(outs[::2], outs[1::2], strict=True)) if self.latents is None else outs[0]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, anchor, *leaves):
        call.forward()
        call.number += 1
        ctx.call, ctx.number = call, call.number
        ctx.set_materialize_grads(False)
        outs = [x.detach().clone() for x in call.outs]
        ctx.mark_non_differentiable(*(new for new, x in zip(outs, call.outs, strict=True) if not x.requires_grad))
        return tuple(outs)

    @staticmethod
    def backward(ctx, *slopes):
        call = ctx.call
        assert ctx.number == call.number, "a graph was replayed again before its backward"
        assert call.lasts or call.owner.latest is call, "another graph was replayed before this one's backward"
        for own, new in zip(call.slopes, slopes, strict=True):
            own.zero_() if new is None else own.copy_(new)
        call.owner.gradients.ready()
        call.backward()
        return None, None, *(None if grad is None else grad.clone() for grad in call.of_leaves)


class CudaRecorder:
    """Captures into CUDA graphs that share one pool of memory, where a graph may write over what others left."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads (rewards, decoding) may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


def facts(pack: Pack, backend) -> tuple[Any, list[torch.Tensor]]:
    """(what two packs must share to be run by one graph, hashable; the tensors in which they may differ)."""
    key, tensors = [], []
    for field in dataclasses.fields(pack):
        value = getattr(pack, field.name)
        if isinstance(value, torch.Tensor):
            key.append((value.shape, value.dtype))
            tensors.append(value)
        elif field.name not in ("own", "past", "memo"):
            key.append(value)
    for part in _parts(pack):
        calls = Calls.of(part, pack.position.device, backend.by_block)
        for call in (*calls.own, *calls.past):
            own, more = backend.facts(call, pack.position.device)
            rows = [x for x in (call.rows, call.key_rows) if isinstance(x, torch.Tensor)]
            key.append((own, *(_row_facts(x) for x in (call.rows, call.key_rows))))
            tensors += [*rows, *more]
        key.append((len(calls.own), len(calls.past)))
    return tuple(key), tensors


def _row_facts(rows) -> tuple:
    return ("slice", rows.start, rows.stop) if isinstance(rows, slice) else tuple(rows.shape)


def _parts(pack: Pack) -> list[Pack]:
    """The pack, and the one without its prefix that its last block runs."""
    return [pack, pack.without_prefix()] if pack.prefix_tokens and pack.target_tokens else [pack]


def copy_of(pack: Pack) -> Pack:
    """The pack with tensors of its own, its attention's included."""
    fields = {f.name: getattr(pack, f.name) for f in dataclasses.fields(pack)}
    own = dataclasses.replace(pack, **{n: v.clone() for n, v in fields.items() if isinstance(v, torch.Tensor)}, memo={})
    for new, old in zip(_parts(own), _parts(pack), strict=True):
        for name, calls in old.memo.items():
            if isinstance(calls, Calls):
                new.memo[name] = Calls(*(tuple(map(Call.copy, each)) for each in (calls.own, calls.past)))
    return own


def check_graphs(model: nn.Module, sharded: bool) -> None:
    """Raises UserError where run.graphs cannot be had."""
    why = None
    if not hasattr(model, "transformer_blocks") or not hasattr(model, "pad"):
        why = "is for image transformers, not for judges"
    elif next(model.parameters()).device.type != "cuda":
        why = "needs a CUDA device"
    elif sharded:
        why = "runs on one rank with weights that are not sharded: LoRA over a frozen base, or model.dtype=float32"
    elif any(isinstance(m, TeLinear) for m in model.modules()):
        why = "does not capture Transformer Engine; use model.fp8=torch"
    if why:
        raise UserError(f"run.graphs=true {why}; or set run.graphs=false")
