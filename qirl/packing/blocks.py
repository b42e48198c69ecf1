"""What packs are made of: conditions, targets, spans of attention, and how items are cut to a budget of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qirl.errors import UserError


def send(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`values` of the host on `device`, while a GPU works on what it was given before.

    Safe for memory that is not pinned: CUDA reads it before the call returns.
    """
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Condition:
    """What a prompt gives the transformer.

    text: [n, D] states of all text tokens in order. references: latents [h*w, C], one per reference image.
    layout: the order of the blocks, ("text", length) or ("image", height, width) in latent tokens. shared: whether it is a
    prefix that all targets of the prompt share (`shared`), or every target carries a copy of its own (`joint`).
    """

    text: torch.Tensor
    references: tuple[torch.Tensor, ...] = ()
    layout: tuple[tuple, ...] = ()
    shared: bool = True

    def __post_init__(self):
        if not self.layout:
            if self.references:
                raise UserError(
                    "a condition with reference images needs a layout, which says where they stand in the text"
                )
            object.__setattr__(self, "layout", (("text", self.text.shape[0]),))
        text = sum(block[1] for block in self.layout if block[0] == "text")
        images = [block[1] * block[2] for block in self.layout if block[0] == "image"]
        if text != self.text.shape[0] or images != [r.shape[0] for r in self.references]:
            raise UserError(
                f"layout {self.layout} does not fit {self.text.shape[0]} text tokens and reference images of "
                f"{[r.shape[0] for r in self.references]} tokens"
            )

    @property
    def tokens(self) -> int:
        return self.text.shape[0] + sum(r.shape[0] for r in self.references)

    @property
    def prefix_tokens(self) -> int:
        """Tokens that a pack holds once, however many targets the prompt has in it."""
        return self.tokens if self.shared else 0

    @property
    def carried_tokens(self) -> int:
        """Tokens that every target brings along."""
        return 0 if self.shared else self.tokens


@dataclass(frozen=True)
class Target:
    """One image to denoise: the index of its condition in the pack, and its size in latent tokens."""

    prompt: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Span:
    """`count` attention calls of one shape: queries [q, q + count * q_len), keys [k, k + count * k_len).

    images: (first key, length) of the images among a single call's keys, the others being text.
    """

    q: int
    q_len: int
    k: int
    k_len: int
    causal: bool = False
    count: int = 1
    images: tuple[tuple[int, int], ...] = ()

    def shifted(self, q: int, k: int) -> Span:
        images = tuple((first + k, length) for first, length in self.images)
        return dataclasses.replace(self, q=self.q + q, k=self.k + k, images=images)

    def blocks(self) -> tuple[list[Span], list[Span]]:
        """The same queries on each run of text among the keys, and on each image."""
        if not self.images:
            return [self], []
        text, start = [], self.k
        for first, length in (*self.images, (self.k + self.k_len, 0)):
            if first > start:
                text.append(Span(self.q, self.q_len, start, first - start))
            start = first + length
        return text, [Span(self.q, self.q_len, first, length) for first, length in self.images]

    def follows(self, other: Span) -> bool:
        """True if this single span continues the run `other` with the same shape and stride."""
        return (
            (self.q_len, self.k_len, self.causal, self.images) == (other.q_len, other.k_len, other.causal, ())
            and self.q == other.q + other.count * other.q_len
            and self.k == other.k + other.count * other.k_len
        )


def missing(tokens: int, pad: int) -> int:
    """Tokens that bring `tokens` to a multiple of `pad`: 1 to `pad` of them, or none for pad 1."""
    return pad - tokens % pad if pad > 1 else 0


def image_positions(place: int, height: int, width: int) -> torch.Tensor:
    """int64 [h*w, 3]: the frame axis frozen at `place`, height and width centred on zero (as in diffusers)."""
    rows = torch.arange(height) - (height - height // 2)
    columns = torch.arange(width) - (width - width // 2)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)
    return torch.cat([torch.full((height * width, 1), place), grid], 1)


def append_span(spans: list[Span], span: Span) -> None:
    """Adds a span, merged into the last one where it continues that run: one batched call instead of many."""
    if spans and span.follows(spans[-1]):
        last = spans.pop()
        span = Span(last.q, last.q_len, last.k, last.k_len, last.causal, last.count + 1)
    spans.append(span)


def cut(costs: Sequence[int], budget: int, what: str) -> list[list[int]]:
    """Cuts items of the given token costs, in order, into runs of at most `budget` tokens: lists of indices.

    Raises UserError if one item alone is larger.
    """
    runs: list[list[int]] = []
    room = 0
    for index, cost in enumerate(costs):
        if cost > budget:
            raise UserError(
                f"{what}={budget} tokens is smaller than one sample of {cost} tokens; set it to {cost} or more"
            )
        if not runs or cost > room:
            runs.append([])
            room = budget
        runs[-1].append(index)
        room -= cost
    return runs
