"""Packs of a dual-stream transformer: every target carries its own text and references, and all of them see each other.

The text of Qwen-Image 1.x is modulated at the target's time and attends to the target, so no prefix can be shared. One
token axis holds, target by target,

    [ text | target | reference 1 | reference 2 | ... ]

and attention is one dense call per target (one batched call for neighbours of equal lengths). The two streams stand apart:
all text, and all targets followed by all references; `order` brings them onto the token axis and `back` off it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qirl.errors import UserError
from qirl.packing.blocks import Condition, Span, Target, append_span, image_positions, missing, send


@dataclass(frozen=True)
class JointPack:
    """Token metadata of one pack; tensors on the model's device, spans and lengths on the host.

    text [T, D] and references [F, C] are repeated for every target of a prompt. order int64 [N]: the token of the streams
    (text, targets, references) at each place of the token axis, back its inverse. position int64 [N, 3] along the
    axis. text_row, image_row, reference_row int64: the target of each token of a stream, plus one.

    It has what all packs have: target_tokens, lengths, target_row, token_in_target, prefix_tokens, tokens, without_prefix.
    """

    text: torch.Tensor
    references: torch.Tensor | None
    order: torch.Tensor
    back: torch.Tensor
    position: torch.Tensor
    text_row: torch.Tensor
    image_row: torch.Tensor
    reference_row: torch.Tensor
    lengths: tuple[int, ...]
    own: tuple[Span, ...]
    lengths_vary: bool = False  # padded: packs of one shape differ in their spans
    memo: dict = field(default_factory=dict, repr=False, compare=False)  # rotary tables, made by the model once

    prefix_tokens, past, extent = 0, (), None

    @property
    def tokens(self) -> int:
        return len(self.order)

    @property
    def target_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def target_row(self) -> torch.Tensor:
        """int64 [target_tokens]: the target of each target token."""
        if "target" not in self.memo:
            self.memo["target"] = self.image_row - 1
        return self.memo["target"]

    @property
    def token_in_target(self) -> torch.Tensor:
        """int64 [target_tokens]: the index of each token inside its own target."""
        if "token" not in self.memo:
            self.memo["token"] = send(torch.cat([torch.arange(n) for n in self.lengths]), self.order.device)
        return self.memo["token"]

    def without_prefix(self) -> JointPack:
        """The same: there is none."""
        return self


def pack_joint(conditions: Sequence[Condition], targets: Sequence[Target], device="cpu", pad: int = 1) -> JointPack:
    """Lays out `targets`, each with the text and the references of its condition.

    pad: text of zeros, which sees itself alone, brings all text to a multiple of `pad` tokens.

    Positions are those of Qwen-Image 1.x: image i of a target has frame i, height and width centred on zero, and the text
    goes on from half of the longest side. Raises UserError for an empty target or one without a condition.
    """
    for t in targets:
        if t.height < 1 or t.width < 1:
            raise UserError(f"a target of {t.height} x {t.width} latent tokens is empty; give at least 1 x 1")
        if not 0 <= t.prompt < len(conditions):
            raise UserError(f"a target names condition {t.prompt} of {len(conditions)}; name one that is there")
    own_of = [conditions[t.prompt] for t in targets]
    sizes = [[(t.height, t.width), *_references(c)] for t, c in zip(targets, own_of, strict=True)]
    texts = [c.text.shape[0] for c in own_of]
    more = missing(sum(texts), pad)
    streams = _Streams(sum(texts) + more, sum(t.tokens for t in targets))
    order, position, own, cursor = [], [], [], 0
    for text, images in zip(texts, sizes, strict=True):
        tokens = [h * w for h, w in images]
        order += [streams.take("text", text), streams.take("target", tokens[0])]
        order += [streams.take("reference", n) for n in tokens[1:]]
        place = max(max(h // 2, w // 2) for h, w in images)
        position.append(torch.arange(place, place + text)[:, None].expand(text, 3))
        position += [image_positions(frame, h, w) for frame, (h, w) in enumerate(images)]
        length = text + sum(tokens)
        append_span(own, Span(cursor, length, cursor, length))
        cursor += length
    if more:
        order.append(streams.take("text", more))
        position.append(torch.zeros(more, 3, dtype=torch.int64))
        own.append(Span(cursor, more, cursor, more))
    order = torch.cat(order)
    rows = [
        (n, t.tokens, sum(h * w for h, w in images[1:])) for n, t, images in zip(texts, targets, sizes, strict=True)
    ]
    rows[-1] = rows[-1][0] + more, *rows[-1][1:]  # padding is modulated as the last target, and no one sees it
    number = torch.arange(1, len(targets) + 1)
    text_row, image_row, reference_row = (
        send(number.repeat_interleave(torch.tensor(each)), device) for each in zip(*rows, strict=True)
    )
    text = [c.text for c in own_of]
    references = [r for c in own_of for r in c.references]
    return JointPack(
        text=send(torch.cat([*text, text[0].new_zeros(more, text[0].shape[1])]), device),
        references=send(torch.cat(references), device) if references else None,
        order=send(order, device),
        back=send(torch.argsort(order), device),
        position=send(torch.cat(position), device),
        text_row=text_row,
        image_row=image_row,
        reference_row=reference_row,
        lengths=tuple(t.tokens for t in targets),
        own=tuple(own),
        lengths_vary=pad > 1,
    )


class _Streams:
    """Hands out the tokens of the three streams in order, as indices into (text, targets, references)."""

    def __init__(self, text: int, target: int):
        self.next = {"text": 0, "target": text, "reference": text + target}

    def take(self, stream: str, count: int) -> torch.Tensor:
        first = self.next[stream]
        self.next[stream] += count
        return torch.arange(first, first + count)


def _references(condition: Condition) -> list[tuple[int, int]]:
    return [tuple(size) for kind, *size in condition.layout if kind == "image"]
