"""Attention backends: one call of softmax(q k^T / sqrt(D)) v over many sequences, with its log-sum-exp.

A backend offers, for tensors of tokens [N, H, D] and a `Call` (qirl.models.attention) whose spans index them,

    forward(q, k, v, call) -> (out [M, H, D], lse [M, H])
    backward(dout, q, k, v, out, lse, call) -> (dq [M, H, D], dk [K, H, D], dv [K, H, D])

M: the call's queries in order, K its keys. out and lse given to the backward may come from more keys than the call's: the
gradients are then the call's exact share. lse is float32 (float64 for float64), and D is the contiguous dimension.
"""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any, Protocol

import torch
from torch import nn

from qirl.errors import UserError
from qirl.kernels.dispatch import compute_dtype
from qirl.packing import send

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
ROUND = 128  # lengths that kernels are told as the longest


class Backend(Protocol):
    by_block: bool  # it wants calls on images apart from those on text

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot serve such tensors; None if it can."""

    def forward(self, q, k, v, call): ...

    def backward(self, dout, q, k, v, out, lse, call): ...

    def facts(self, call, device) -> tuple[Any, list[torch.Tensor]]:
        """What decides which kernels a call runs, hashable, and the tensors that tell them the rest."""


class BySpan:
    """A backend of one batched call a span, on [B, H, L, D] views: `run` and `run_backward`, lse [B, H, L]."""

    by_block = False

    def facts(self, call, device):
        return call.spans, []

    def forward(self, q, k, v, call):
        parts = [self.run(*self._views(s, q, k, v), s.causal) for s in call.spans]
        return _tokens([out for out, _ in parts]), _tokens([lse for _, lse in parts])

    def backward(self, dout, q, k, v, out, lse, call):
        parts = []
        for s in call.spans:
            dout_, out_, lse_ = (_view(x, s.q, s.q_len, s.count) for x in (dout, out, lse))
            parts.append(self.run_backward(dout_, *self._views(s, q, k, v), out_, lse_, s.causal))
        return tuple(_tokens(list(each)) for each in zip(*parts, strict=True))

    @staticmethod
    def _views(s, q, k, v):
        return _view(q, s.q, s.q_len, s.count), *(_view(x, s.k, s.k_len, s.count) for x in (k, v))


def _view(x: torch.Tensor, start: int, length: int, count: int) -> torch.Tensor:
    """[N, H, ...] -> [count, H, length, ...] view of `count` consecutive runs."""
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _tokens(parts: list[torch.Tensor]) -> torch.Tensor:
    """[count, H, length, ...] of consecutive spans -> [M, H, ...]; no copy for a single span of a flash kernel."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class CpuFlash(BySpan):
    """torch's CPU flash attention. It does not check its inputs: strides and empty lengths are guarded before."""

    def refusal(self, device, dtype, head_dim):
        return None if device.type == "cpu" else "runs on a CPU"

    def run(self, q, k, v, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    def run_backward(self, dout, q, k, v, out, lse, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)


class Dense(BySpan):
    """The formula with the score matrix in memory: any device and dtype."""

    def refusal(self, device, dtype, head_dim):
        return None

    @staticmethod
    def _scores(q, k, causal):
        dtype = compute_dtype(q)
        scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(above, -math.inf)
        return scores

    def run(self, q, k, v, causal):
        scores = self._scores(q, k, causal)
        lse = scores.logsumexp(-1)
        return (torch.exp(scores - lse[..., None]) @ v.to(scores.dtype)).to(q.dtype), lse

    def run_backward(self, dout, q, k, v, out, lse, causal):
        p = torch.exp(self._scores(q, k, causal) - lse[..., None])
        dout = dout.to(p.dtype)
        row = (dout * out.to(p.dtype)).sum(-1, keepdim=True)
        ds = p * (dout @ v.to(p.dtype).transpose(-1, -2) - row) / math.sqrt(q.shape[-1])
        dq, dk, dv = ds @ k.to(p.dtype), ds.transpose(-1, -2) @ q.to(p.dtype), p.transpose(-1, -2) @ dout
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _half_on_cuda(device, dtype, head_dim, largest: int) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in HALF:
        return "takes bfloat16 and float16"
    return None if head_dim % 8 == 0 and head_dim <= largest else f"takes heads of a multiple of 8, at most {largest}"


class Cudnn(BySpan):
    """cuDNN's attention, 1.9 times as fast as FlashAttention 2 on an H200; it plans every shape anew."""

    def refusal(self, device, dtype, head_dim):
        return _half_on_cuda(device, dtype, head_dim, 128)

    def run(self, q, k, v, causal):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
        return out, lse.view(lse.shape[:3])

    def run_backward(self, dout, q, k, v, out, lse, causal):
        seed = torch.empty(0, dtype=torch.int64, device=q.device)  # of dropout, which is off
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous()[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal
        )  # fmt: skip


class Varlen:
    """A backend of one call for all sequences, which are marked by cumulative lengths: `run` and `run_backward`."""

    by_block = False

    def forward(self, q, k, v, call):
        return self.run(q[call.rows], k[call.key_rows], v[call.key_rows], _Lengths.of(call, q.device), call.causal)

    def backward(self, dout, q, k, v, out, lse, call):
        keys = k[call.key_rows], v[call.key_rows]
        queries = (x[call.rows] for x in (out, lse))
        lengths = _Lengths.of(call, q.device)
        dq, dk, dv = self.run_backward(dout[call.rows], q[call.rows], *keys, *queries, lengths, call.causal)
        if call.varies:  # rows of no sequence, which the kernel leaves unset
            covered = (torch.arange(len(dk), device=dk.device) < lengths.k[-1])[:, None, None]
            dk, dv = (torch.where(covered, grad, 0) for grad in (dk, dv))
        return dq, dk, dv

    def facts(self, call, device):
        n = _Lengths.of(call, device)
        return (len(n.q), n.longest, call.causal), [n.q, n.k, *n.places]


class _Lengths:
    """int32 [B + 1] first tokens of a call's sequences, and the longest, rounded up to few values; `places` for a
    log-sum-exp padded to [B, H, L]."""

    def __init__(self, call, device):
        queries, keys = (torch.tensor(each) for each in call.lengths())
        self.longest = tuple(-(-int(n.max()) // ROUND) * ROUND for n in (queries, keys))
        self.q, self.k = (send(torch.cat([n.new_zeros(1), n.cumsum(0)]).int(), device) for n in (queries, keys))
        sequence = torch.arange(len(queries)).repeat_interleave(queries)
        token = torch.arange(len(sequence)) - (queries.cumsum(0) - queries)[sequence]
        self.places = send(sequence, device), send(token, device)

    def copy(self) -> _Lengths:
        """The same lengths in tensors of their own."""
        own = copy.copy(self)
        own.q, own.k, own.places = self.q.clone(), self.k.clone(), tuple(p.clone() for p in self.places)
        return own

    @classmethod
    def of(cls, call, device) -> _Lengths:
        if "lengths" not in call.memo:
            call.memo["lengths"] = cls(call, device)
        return call.memo["lengths"]


class TorchFlash(Varlen):
    """torch's FlashAttention 2."""

    def refusal(self, device, dtype, head_dim):
        return _half_on_cuda(device, dtype, head_dim, 256)

    def run(self, q, k, v, n, causal):
        out, lse = aten._flash_attention_forward(q, k, v, n.q, n.k, *n.longest, 0.0, causal, False)[:2]
        return out, lse.T

    def run_backward(self, dout, q, k, v, out, lse, n, causal):
        seed = torch.empty(0, dtype=torch.int64, device=q.device)  # of dropout, which is off
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse.T.contiguous(), n.q, n.k, *n.longest, 0.0, causal, seed, seed
        )


class Efficient(Varlen):
    """torch's memory-efficient attention: float32 too, in full precision."""

    def refusal(self, device, dtype, head_dim):
        if device.type != "cuda":
            return "needs a CUDA device"
        if dtype == torch.float64:
            return "takes float32, bfloat16 and float16"
        return None if head_dim % 8 == 0 else "takes heads of a multiple of 8"

    def run(self, q, k, v, n, causal):
        longest = self._longest(q, k, n)
        out, lse = aten._efficient_attention_forward(
            q[None], k[None], v[None], None, n.q, n.k, *longest, 0.0, int(causal), True
        )[:2]
        sequence, token = n.places
        return out[0], lse[sequence, :, token]

    def run_backward(self, dout, q, k, v, out, lse, n, causal):
        longest = self._longest(q, k, n)
        padded = lse.new_zeros(len(n.q) - 1, lse.shape[1], -(-longest[0] // 32) * 32)  # as its forward pads
        sequence, token = n.places
        padded[sequence, :, token] = lse
        seed = torch.empty((), dtype=torch.int64)  # of dropout, which is off
        grads = aten._efficient_attention_backward(
            dout[None], q[None], k[None], v[None], None, out[None], n.q, n.k, *longest, padded, 0.0, seed, seed,
            int(causal), False,
        )  # fmt: skip
        return tuple(grad[0] for grad in grads[:3])

    @staticmethod
    def _longest(q, k, n) -> tuple[int, int]:
        """No longer than the tensors, as it asks for."""
        return min(n.longest[0], len(q)), min(n.longest[1], len(k))


class FlashAttn(Varlen):
    """The package flash-attn: version 4, 3 or 2, the newest that is installed."""

    MODULES = ("flash_attn.cute.interface", "flash_attn_interface", "flash_attn.flash_attn_interface")

    def refusal(self, device, dtype, head_dim):
        if self.module() is None:
            return "needs the package flash-attn"
        return _half_on_cuda(device, dtype, head_dim, 256)

    @classmethod
    def module(cls):
        """The module of the newest version that can be imported, or None."""
        for name in cls.MODULES:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError):  # OSError: a library of it is missing
                continue
        return None

    def run(self, q, k, v, n, causal):
        module = self.module()
        scale = q.shape[-1] ** -0.5
        if module.__name__ == self.MODULES[2]:
            found = module._flash_attn_varlen_forward(q, k, v, n.q, n.k, *n.longest, 0.0, scale, causal)
        else:
            run = getattr(module, "_flash_attn_fwd", None) or module._flash_attn_forward
            more = {"return_lse": True} if hasattr(module, "_flash_attn_fwd") else {}
            found = run(q, k, v, causal=causal, softmax_scale=scale, **self._named(n), **more)
        return found[0], found[1].T

    def run_backward(self, dout, q, k, v, out, lse, n, causal):
        module, lse, scale = self.module(), lse.T.contiguous(), q.shape[-1] ** -0.5
        if hasattr(module, "_flash_attn_bwd"):
            return module._flash_attn_bwd(
                q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, **self._named(n)
            )[:3]  # fmt: skip
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        if module.__name__ == self.MODULES[2]:
            module._flash_attn_varlen_backward(
                dout, q, k, v, out, lse, *grads, n.q, n.k, *n.longest, 0.0, scale, causal, -1, -1, 0.0, None, False
            )  # fmt: skip
        else:
            named = self._named(n) | dict(zip(("dq", "dk", "dv"), grads, strict=True))
            module._flash_attn_backward(dout, q, k, v, out, lse, softmax_scale=scale, is_causal=causal, **named)
        return tuple(grads)

    @staticmethod
    def _named(n) -> dict:
        return dict(cu_seqlens_q=n.q, cu_seqlens_k=n.k, max_seqlen_q=n.longest[0], max_seqlen_k=n.longest[1])


class Fastest:
    """cuDNN for images, whose sizes come again and again, and torch's FlashAttention for text: cuDNN would plan every length
    anew, which takes it 0.1 s."""

    by_block = True
    LEAST, SPANS = 256, 16  # tokens of a sequence; spans of a call

    def __init__(self):
        self.cudnn, self.flash = Cudnn(), TorchFlash()

    def refusal(self, device, dtype, head_dim):
        return self.cudnn.refusal(device, dtype, head_dim) or self.flash.refusal(device, dtype, head_dim)

    def _choice(self, call) -> Backend:
        long = all(min(s.q_len, s.k_len) >= self.LEAST for s in call.spans)
        dense = call.images and long and not call.varies and len(call.spans) <= self.SPANS
        return self.cudnn if dense else self.flash

    def facts(self, call, device):
        backend = self._choice(call)
        own, tensors = backend.facts(call, device)
        return (type(backend).__name__, own), tensors

    def forward(self, q, k, v, call):
        return self._choice(call).forward(q, k, v, call)

    def backward(self, dout, q, k, v, out, lse, call):
        return self._choice(call).backward(dout, q, k, v, out, lse, call)


BACKENDS: dict[str, Backend] = {
    "fastest": Fastest(),
    "cudnn": Cudnn(),
    "flash": TorchFlash(),
    "efficient": Efficient(),
    "cpu": CpuFlash(),
    "dense": Dense(),
    "flash_attn": FlashAttn(),
}
AUTO = ("cpu", "fastest", "flash", "efficient", "dense")  # the first that serves


def automatic(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend that `auto` takes."""
    return next(name for name in AUTO if BACKENDS[name].refusal(device, dtype, head_dim) is None)


def backend_for(q: torch.Tensor) -> Backend:
    """The attention backend for queries of this device, dtype and head size."""
    return BACKENDS[automatic(q.device, q.dtype, q.shape[-1])]


def use_attention(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Makes all attention of the blocks run on the backend `name`; "auto": the fastest that serves.

    Raises UserError if it cannot serve that device, dtype and head size.
    """
    head_dim = model.config.attention_head_dim
    if name != "auto":
        why = BACKENDS[name].refusal(device, dtype, head_dim)
        if why:
            serving = [n for n, b in BACKENDS.items() if b.refusal(device, dtype, head_dim) is None]
            raise UserError(
                f"model.attention={name} {why}; this run computes in {str(dtype).removeprefix('torch.')} with heads of "
                f"{head_dim} on {device.type}: use auto, {', '.join(serving)}"
            )
    for block in model.transformer_blocks:
        block.attn.backend = None if name == "auto" else BACKENDS[name]
