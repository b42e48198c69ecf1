"""Attention over packed sequences: calls of a backend on blocks of tokens, merged by log-sum-exp.

Every block attends to itself (`own` spans: text causally, images fully) and to what precedes it in its prompt's
prefix (`past` spans). With the merged output and log-sum-exp the flash backward of each call gives the exact share of
the gradient: the softmax probabilities it recomputes, exp(score - lse), are those of the full row, and its row term
sum(dout * out) is the full one. So there is no merge backward, no mask and no copy of the prefix's keys and values.

Spans are gathered into as few calls as their masks allow (`Call`); qirl.models.attention_backends says what a backend is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from qirl.kernels.merge_attention import merge_attention_
from qirl.models.attention_backends import Backend, backend_for
from qirl.packing import Pack, Span, send

Rows = slice | torch.Tensor


@dataclass(frozen=True)
class Call:
    """Spans of one mask whose queries, and whose keys, are disjoint and in order.

    rows, key_rows: the tokens that they cover, in order: a slice where these are neighbours, else int64 indices.
    images: its keys are images, whose sizes come again in other packs. varies: the pack is padded, so that packs of one shape differ in the lengths; keys may go on beyond the last span's.
    """

    spans: tuple[Span, ...]
    rows: Rows
    key_rows: Rows
    images: bool
    varies: bool
    memo: dict = field(default_factory=dict, repr=False, compare=False)  # what a backend makes of the lengths, once

    @classmethod
    def of(cls, spans: Sequence[Span], device, images: bool, varies: bool, extent: int | None = None) -> Call:
        queries = _rows_of([(s.q, s.count * s.q_len) for s in spans], device)
        keys = _rows_of([(s.k, s.count * s.k_len) for s in spans], device)
        if extent is not None and isinstance(keys, slice):
            keys = slice(keys.start, extent)
        return cls(tuple(spans), queries, keys, images, varies)

    def copy(self) -> Call:
        """The call with tensors of its own."""
        rows, keys = (x.clone() if isinstance(x, torch.Tensor) else x for x in (self.rows, self.key_rows))
        memo = {name: value.copy() for name, value in self.memo.items()}
        return dataclasses.replace(self, rows=rows, key_rows=keys, memo=memo)

    @property
    def causal(self) -> bool:
        return self.spans[0].causal

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of every sequence."""
        return [s.q_len for s in self.spans for _ in range(s.count)], [
            s.k_len for s in self.spans for _ in range(s.count)
        ]


@dataclass(frozen=True)
class Calls:
    """All attention of one pack: `own` covers every token once, `past` adds what some of them see of their prefix."""

    own: tuple[Call, ...]
    past: tuple[Call, ...]

    @classmethod
    def of(cls, pack: Pack, device, by_block: bool = False) -> Calls:
        """The calls of a pack, made once. by_block: what precedes a block is seen image by image and text by text, so that
        images, whose sizes come again, have calls of their own."""
        name = "attention by block" if by_block else "attention"
        if name not in pack.memo:
            kinds = [[s for s in pack.own if s.causal == causal] for causal in (True, False)]
            past = [_Past(level, True) for level in _levels(pack.past)]
            if by_block:
                past = [part for own in past for part in own.by_block()]
            pack.memo[name] = cls(
                tuple(Call.of(own, device, not own[0].causal, pack.lengths_vary) for own in kinds if own),
                tuple(p.call(device, pack.extent) for p in past),
            )
        return pack.memo[name]


@dataclass(frozen=True)
class _Past:
    """Spans of one call on the prefix; text: their keys are text, or all kinds, of any length."""

    spans: Sequence[Span]
    text: bool

    def call(self, device, extent: int | None) -> Call:
        """extent: rows of the prefix, if it is padded."""
        varies = self.text and extent is not None
        return Call.of(self.spans, device, not self.text, varies, extent if varies else None)

    def by_block(self) -> list[_Past]:
        texts, images = zip(*(span.blocks() for span in self.spans), strict=True)
        columns = [(each, kind) for parts, kind in ((texts, True), (images, False)) for each in zip_longest(*parts)]
        return [_Past([s for s in each if s is not None], kind) for each, kind in columns]


def _levels(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans, in order, in as few lists as it takes for no key to be in two spans of a list.

    Spans of one prompt begin at the same key, so each of them comes in a later list than those before it.
    """
    levels: list[list[Span]] = []
    for span in spans:
        free = (own for own in levels if own[-1].k + own[-1].count * own[-1].k_len <= span.k)
        level = next(free, None)
        if level is None:
            levels.append([span])
        else:
            level.append(span)
    return levels


def _rows_of(runs: Sequence[tuple[int, int]], device) -> Rows:
    first, end = runs[0][0], runs[0][0]
    for start, length in runs:
        if start != end:
            return send(torch.cat([torch.arange(s, s + n) for s, n in runs]), device)
        end = start + length
    return slice(first, end)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    pack: Pack,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Block-causal attention of one pack.

    q, k, v [N, H, D]: the pack's tokens, which its `own` spans cover block by block. past_k, past_v [P, H, D]: the prefix
    tokens that its `past` spans index, from an earlier prefill; None where they stand in k and v themselves. Returns
    [N, H, D]. Differentiable once in all five.
    """
    backend = backend or backend_for(q)
    return _PackedAttention.apply(q, k, v, past_k, past_v, Calls.of(pack, q.device, backend.by_block), backend)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, past_k, past_v, calls, backend):
        q, k, v, past_k, past_v = (None if x is None else _last_contiguous(x) for x in (q, k, v, past_k, past_v))
        out, lse = _join(calls.own, [backend.forward(q, k, v, call) for call in calls.own], len(q))
        past_keys, past_values = (k, v) if past_k is None else (past_k, past_v)
        for call in calls.past:
            _merge(out, lse, call.rows, *backend.forward(q, past_keys, past_values, call))
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        ctx.calls, ctx.backend = calls, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, past_k, past_v, out, lse = ctx.saved_tensors
        dout, calls = _last_contiguous(dout), ctx.calls
        parts = [ctx.backend.backward(dout, q, k, v, out, lse, call) for call in calls.own]
        dq, dk, dv = _join(calls.own, parts, len(q))
        inside = past_k is None
        past_keys, past_values = (k, v) if inside else (past_k, past_v)
        dpast = [dk, dv] if inside else [None, None]
        for call in calls.past:
            of_q, *of_keys = ctx.backend.backward(dout, q, past_keys, past_values, out, lse, call)
            _add(dq, call.rows, of_q)
            for place, part in enumerate(of_keys):
                dpast[place] = _added(dpast[place], call.key_rows, part, past_keys)
        if not inside:
            dpast = [torch.zeros_like(past_k) if grad is None else grad for grad in dpast]
        return dq, dk, dv, *((None, None) if inside else dpast), None, None


def _join(calls: Sequence[Call], parts: Sequence[tuple[torch.Tensor, ...]], tokens: int) -> list[torch.Tensor]:
    """Results of calls that cover all tokens, token by token; no copy where one call does."""
    assert sum(len(part[0]) for part in parts) == tokens, "own spans must cover the pack"
    if len(calls) == 1 and isinstance(calls[0].rows, slice):
        return list(parts[0])
    joined = [x.new_empty((tokens, *x.shape[1:])) for x in parts[0]]
    for call, part in zip(calls, parts, strict=True):
        for whole, own in zip(joined, part, strict=True):
            whole[call.rows] = own
    return joined


def _merge(out: torch.Tensor, lse: torch.Tensor, rows: Rows, *part: torch.Tensor) -> None:
    own = out[rows], lse[rows]  # views of a slice, copies of indices
    merge_attention_(*own, *part)
    if not isinstance(rows, slice):
        out[rows], lse[rows] = own


def _add(whole: torch.Tensor, rows: Rows, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        whole[rows.start : rows.start + len(part)].add_(part)  # rows may go on beyond what is covered
    else:
        whole.index_add_(0, rows, part)


def _added(whole: torch.Tensor | None, rows: Rows, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, zeros where it is None, with `part` added to its rows."""
    if whole is None:
        if len(part) == len(like) and isinstance(rows, slice):
            return part
        whole = torch.zeros_like(like)
    _add(whole, rows, part)
    return whole


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The flash kernels read the last dimension as contiguous, whatever its stride says."""
    return x if x.stride(-1) == 1 else x.contiguous()
