"""Packed sequences with a shared prefix: everything the transformer sees is one token axis.

A pack holds, for each prompt, its prefix once (text and reference images, modulated at t = 0) and then all its
targets (the images being denoised). Prefix tokens come first, then the targets, both in prompt order:

    [ prefix of prompt 0 | prefix of prompt 1 | ... | targets of prompt 0 | targets of prompt 1 | ... ]

Every block of tokens (a run of text, one reference image, one target) attends to itself (text causally, images
fully) and to the past, which is what precedes it in its prompt's prefix. `Span` lists say so, for the two dense
attention calls whose results are merged by log-sum-exp (qirl.models.attention).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qirl.errors import UserError
from qirl.packing.blocks import Condition, Span, Target, append_span, image_positions, missing, send


@dataclass(frozen=True)
class PackedBatch:
    """Token metadata of one pack; tensors on the model's device, spans and lengths on the host.

    position int64 [N, 3]; prompt, block, target, row int64 [N] (block -1 for text, target -1 in the prefix, row 0 for
    t = 0 and j + 1 for target j). N = prefix_tokens + target_tokens. A pack without prefix (`prefix_tokens` 0) is run
    against keys and values that an earlier prefill kept; one without targets is such a prefill.
    """

    lengths_vary = False  # of images

    text: torch.Tensor
    references: torch.Tensor | None
    text_index: torch.Tensor
    reference_index: torch.Tensor
    position: torch.Tensor
    prompt: torch.Tensor
    block: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    prefix_tokens: int
    lengths: tuple[int, ...]
    own: tuple[Span, ...]
    past: tuple[Span, ...]
    extent: int | None = None  # rows of the prefix's keys and values where it is padded
    memo: dict = field(default_factory=dict, repr=False, compare=False)  # rotary tables, made by the model once

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.target_tokens

    @property
    def target_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def target_row(self) -> torch.Tensor:
        """int64 [target_tokens]: the target of each target token."""
        return self.target[self.prefix_tokens :]

    @property
    def token_in_target(self) -> torch.Tensor:
        """int64 [target_tokens]: the index of each token inside its own target."""
        if "token" not in self.memo:
            self.memo["token"] = send(torch.cat([torch.arange(n) for n in self.lengths]), self.target.device)
        return self.memo["token"]

    def without_prefix(self) -> PackedBatch:
        """The same targets, to be run against the prefix's keys and values; made once."""
        start = self.prefix_tokens
        if start and "targets" not in self.memo:
            self.memo["targets"] = dataclasses.replace(
                self,
                text=self.text[:0],
                references=None,
                text_index=self.text_index[:0],
                reference_index=self.reference_index[:0],
                **{name: getattr(self, name)[start:] for name in ("position", "prompt", "block", "target", "row")},
                prefix_tokens=0,
                own=tuple(s.shifted(-start, -start) for s in self.own if s.q >= start),
                past=tuple(s.shifted(-start, 0) for s in self.past if s.q >= start),
                memo={},
            )
        return self.memo["targets"] if start else self


def pack_shared(
    conditions: Sequence[Condition], targets: Sequence[Target], prefix: bool = True, device="cpu", pad: int = 1
) -> PackedBatch:
    """Lays out the prefixes of `conditions` and the `targets`, which must be sorted by prompt.

    prefix=False leaves the prefix tokens out: the targets then read the keys and values of a prefill of the same
    conditions. pad: the prefix ends with text of zeros, a prompt without targets, up to a multiple of `pad` tokens. Raises UserError for a target without a condition or targets out of order.
    """
    for t in targets:
        if t.height < 1 or t.width < 1:
            raise UserError(f"a target of {t.height} x {t.width} latent tokens is empty; give at least 1 x 1")
    order = [t.prompt for t in targets]
    if order != sorted(order) or (order and not 0 <= order[0] <= order[-1] < len(conditions)):
        raise UserError(
            f"targets must be sorted by prompt and name one of {len(conditions)} conditions; got {order[:20]}"
        )
    if more := missing(sum(c.tokens for c in conditions), pad):
        conditions = [*conditions, Condition(conditions[0].text.new_zeros(more, conditions[0].text.shape[1]))]
    prefixes, images = _Blocks(), _Blocks(sum(c.tokens for c in conditions))
    starts = [prefixes.add_prefix(i, condition) for i, condition in enumerate(conditions)]
    for prompt, group in itertools.groupby(enumerate(targets), key=lambda pair: pair[1].prompt):
        images.add_targets(prompt, list(group), *starts[prompt])
    long = lambda values: send(torch.tensor(values, dtype=torch.int64), device)  # noqa: E731
    references = [r for c in conditions for r in c.references]
    target = prefixes.target + images.target
    packed = PackedBatch(
        text=send(torch.cat([c.text for c in conditions]), device),
        references=send(torch.cat(references), device) if references else None,
        text_index=long(prefixes.text_index),
        reference_index=long(prefixes.reference_index),
        position=send(torch.cat(prefixes.position + images.position), device),
        prompt=long(prefixes.prompt + images.prompt),
        block=long(prefixes.block + images.block),
        target=long(target),
        row=long([t + 1 for t in target]),
        prefix_tokens=prefixes.cursor,
        lengths=tuple(t.tokens for t in targets),
        own=tuple(prefixes.own + images.own),
        past=tuple(prefixes.past + images.past),
        extent=prefixes.cursor if pad > 1 else None,
    )
    return packed if prefix else packed.without_prefix()


class _Blocks:
    """Appends blocks of tokens from `cursor` on and keeps the books."""

    def __init__(self, cursor: int = 0):
        self.cursor = cursor
        self.position, self.prompt, self.block, self.target = [], [], [], []
        self.text_index, self.reference_index = [], []
        self.own, self.past = [], []

    def add_prefix(self, prompt: int, condition: Condition) -> tuple[int, int, int, tuple]:
        """Returns (start, length, next position, images as Span has them) of the prefix."""
        start, place, image = self.cursor, 0, 0
        images = []
        for kind, *size in condition.layout:
            n = size[0] if kind == "text" else size[0] * size[1]
            if n == 0:
                continue
            index = range(self.cursor, self.cursor + n)
            if kind == "text":
                self.text_index.extend(index)
                where, block, advance = torch.arange(place, place + n)[:, None].expand(n, 3), -1, n
            else:
                self.reference_index.extend(index)
                where, block, advance = image_positions(place, *size), image, max(size)
                image += 1
            if self.cursor > start:
                append_span(self.past, Span(self.cursor, n, start, self.cursor - start, images=tuple(images)))
            if kind == "image":
                images.append((self.cursor, n))
            self._add(n, where, prompt, block, target=-1, causal=kind == "text")
            place += advance
        return start, self.cursor - start, place, tuple(images)

    def add_targets(self, prompt, targets, start, length, place, images):
        first = self.cursor
        for index, t in targets:
            self._add(t.tokens, image_positions(place, t.height, t.width), prompt, len(images), index, causal=False)
        if length:
            append_span(self.past, Span(first, self.cursor - first, start, length, images=images))

    def _add(self, n, position, prompt, block, target, causal):
        append_span(self.own, Span(self.cursor, n, self.cursor, n, causal))
        self.position.append(position)
        self.prompt.extend([prompt] * n)
        self.block.extend([block] * n)
        self.target.extend([target] * n)
        self.cursor += n
