"""Attention over packed sequences: two dense calls per block of tokens, merged by log-sum-exp.

Every block attends to itself (`own` spans: text causally, images fully) and to what precedes it in its prompt's
prefix (`past` spans). With the merged output and log-sum-exp the flash backward of each call gives the exact share of
the gradient: the softmax probabilities it recomputes, exp(score - lse), are those of the full row, and its row term
sum(dout * out) is the full one. So there is no merge backward, no mask and no copy of the prefix's keys and values.

A backend offers `forward(q, k, v, causal) -> (out, lse)` and `backward(dout, q, k, v, out, lse, causal)` on
[B, H, L, D] views (lse [B, H, L]).
"""

from __future__ import annotations

import math

import torch

from qirl.kernels.dispatch import compute_dtype
from qirl.kernels.merge_attention import merge_attention
from qirl.packing import Span

aten = torch.ops.aten


class CpuFlash:
    """torch's CPU flash attention. It does not check its inputs: strides and empty lengths are guarded here."""

    @staticmethod
    def forward(q, k, v, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    @staticmethod
    def backward(dout, q, k, v, out, lse, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)


class CudaFlash:
    """torch's CUDA flash attention: float16 and bfloat16."""

    @staticmethod
    def forward(q, k, v, causal):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]

    @staticmethod
    def backward(dout, q, k, v, out, lse, causal):
        seed = q.new_zeros((), dtype=torch.int64)  # of dropout, which is off; lse is read as contiguous
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed
        )


class Dense:
    """The formula with the score matrix in memory: any device and dtype."""

    @staticmethod
    def _scores(q, k, causal):
        dtype = compute_dtype(q)
        scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(above, -math.inf)
        return scores

    @classmethod
    def forward(cls, q, k, v, causal):
        scores = cls._scores(q, k, causal)
        lse = scores.logsumexp(-1)
        return (torch.exp(scores - lse[..., None]) @ v.to(scores.dtype)).to(q.dtype), lse

    @classmethod
    def backward(cls, dout, q, k, v, out, lse, causal):
        p = torch.exp(cls._scores(q, k, causal) - lse[..., None])
        dout = dout.to(p.dtype)
        row = (dout * out.to(p.dtype)).sum(-1, keepdim=True)
        ds = p * (dout @ v.to(p.dtype).transpose(-1, -2) - row) / math.sqrt(q.shape[-1])
        dq, dk, dv = ds @ k.to(p.dtype), ds.transpose(-1, -2) @ q.to(p.dtype), p.transpose(-1, -2) @ dout
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def backend_for(q: torch.Tensor):
    """The attention backend for queries of this device and dtype."""
    if q.device.type == "cpu":
        return CpuFlash
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        return CudaFlash
    return Dense


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    own: tuple[Span, ...],
    past: tuple[Span, ...],
    backend=None,
) -> torch.Tensor:
    """Block-causal attention of one pack.

    q, k, v [N, H, D]: the pack's tokens. own: one span per block, in order, covering all tokens. past_k, past_v
    [P, H, D]: the prefix tokens that `past` spans index, from an earlier prefill; None where they stand in k and v
    themselves. Returns [N, H, D]. Differentiable once in all five.
    """
    return _PackedAttention.apply(q, k, v, past_k, past_v, own, past, backend or backend_for(q))


def _view(x: torch.Tensor, start: int, length: int, count: int) -> torch.Tensor:
    """[N, H, ...] -> [count, H, length, ...] view of `count` consecutive runs."""
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """[count, H, length, ...] of consecutive spans -> [N, H, ...]; no copy for a single span of a flash kernel."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, past_k, past_v, own, past, backend):
        q, k, v, past_k, past_v = (None if x is None else _rows(x) for x in (q, k, v, past_k, past_v))
        parts = [backend.forward(*(_view(x, s.q, s.q_len, s.count) for x in (q, k, v)), s.causal) for s in own]
        out, lse = (_join(list(each)) for each in zip(*parts, strict=True))
        assert len(out) == len(q), "own spans must cover the pack"
        past_keys, past_values = (k, v) if past_k is None else (past_k, past_v)
        for s in past:
            own_out, own_lse = _view(out, s.q, s.q_len, s.count), _view(lse, s.q, s.q_len, s.count)
            keys = (_view(x, s.k, s.k_len, s.count) for x in (past_keys, past_values))
            part = backend.forward(_view(q, s.q, s.q_len, s.count), *keys, s.causal)
            merged = merge_attention(own_out, own_lse, *part)
            own_out.copy_(merged[0])
            own_lse.copy_(merged[1])
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        ctx.own, ctx.past, ctx.backend = own, past, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, past_k, past_v, out, lse = ctx.saved_tensors
        dout = _rows(dout)
        parts = []
        for s in ctx.own:
            view = (_view(x, s.q, s.q_len, s.count) for x in (dout, q, k, v, out, lse))
            parts.append(ctx.backend.backward(*view, s.causal))
        dq, dk, dv = (_join(list(each)) for each in zip(*parts, strict=True))
        inside = past_k is None
        past_keys, past_values = (k, v) if inside else (past_k, past_v)
        dpast_k, dpast_v = (dk, dv) if inside else (torch.zeros_like(past_k), torch.zeros_like(past_v))
        for s in ctx.past:
            view = lambda x, s=s: _view(x, s.q, s.q_len, s.count)  # noqa: E731
            keys = lambda x, s=s: _view(x, s.k, s.k_len, s.count)  # noqa: E731
            grads = ctx.backend.backward(
                view(dout), view(q), keys(past_keys), keys(past_values), view(out), view(lse), s.causal
            )
            view(dq).add_(grads[0])
            keys(dpast_k).add_(grads[1])
            keys(dpast_v).add_(grads[2])
        return dq, dk, dv, *((None, None) if inside else (dpast_k, dpast_v)), None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The flash kernels read the last dimension as contiguous, whatever its stride says."""
    return x if x.stride(-1) == 1 else x.contiguous()
