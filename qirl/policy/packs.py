"""The update's packs: (sample, node) pairs laid out under a token budget, with the prefix shared.

Whole prompts are put into packs while they fit. Where one prompt's pairs alone exceed the budget, the seam is used: the
prefixes run once, their keys and values become leaves for packs of targets only, and one prefix backward at the end
takes the gradients that added up there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qirl.models.qwen_image_21 import KeysValues, QwenImage21
from qirl.packing import Condition, PackedBatch, Target, cut, pack

BUDGET = "policy.micro_tokens"


@dataclass(frozen=True)
class Pair:
    """One trained node of one sample; `sample` and `prompt` index the experience's lists."""

    sample: int
    node: int
    prompt: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Layout:
    """How one optimizer step's pairs are cut: packs of pair indices, and the number that all ranks run."""

    conditions: Sequence[Condition]
    pairs: Sequence[Pair]
    packs: list[list[int]]
    seam: bool

    def body(self, members: Sequence[int], device) -> PackedBatch:
        """The pack of these pairs: with the prefixes of its own prompts, or without any under the seam."""
        pairs = [self.pairs[i] for i in members]
        used = range(len(self.conditions)) if self.seam else sorted({p.prompt for p in pairs})
        place = {prompt: index for index, prompt in enumerate(used)}
        targets = [Target(place[p.prompt], p.height, p.width) for p in pairs]
        return pack([self.conditions[i] for i in used], targets, prefix=not self.seam, device=device)

    def prefix(self, device) -> PackedBatch:
        return pack(self.conditions, [], device=device)


def lay_out(
    conditions: Sequence[Condition], pairs: Sequence[Pair], budget: int, agree: Callable[[bool, int], tuple[bool, int]]
) -> Layout:
    """Cuts pairs (sorted by prompt) into packs of at most `budget` tokens.

    `agree` makes ranks agree on (seam, number of packs); a rank with fewer repeats its first pack, with weight 0.
    Raises UserError if one pair alone exceeds the budget.
    """
    targets = cut([p.tokens for p in pairs], budget, BUDGET)  # the packs of the seam; also checks every pair
    by_prompt: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt, []).append(index)
    cost = {p: conditions[p].tokens + sum(pairs[i].tokens for i in members) for p, members in by_prompt.items()}
    seam = max(cost.values(), default=0) > budget
    whole = [] if seam else [[i for p in run for i in by_prompt[p]] for run in _runs(cost, budget)]
    seam_anywhere, _ = agree(seam, 0)
    packs = targets if seam_anywhere else whole
    _, count = agree(seam, len(packs))
    packs = packs + [packs[0]] * (count - len(packs))
    return Layout(conditions, pairs, packs, seam_anywhere)


def _runs(cost: dict[int, int], budget: int) -> list[list[int]]:
    prompts = list(cost)
    return [[prompts[i] for i in run] for run in cut([cost[p] for p in prompts], budget, BUDGET)]


class Prefix:
    """The prefix of one optimizer step: nothing when packs carry their own, else its keys and values as leaves."""

    def __init__(self, model: QwenImage21, layout: Layout, device):
        self.kept: KeysValues | None = model(layout.prefix(device)) if layout.seam else None
        self.leaves: KeysValues | None = None
        if self.kept is not None:
            grad = torch.is_grad_enabled()
            self.leaves = [tuple(x.detach().requires_grad_(grad) for x in pair) for pair in self.kept]

    def backward(self) -> None:
        """Sends the gradients gathered on the leaves through the prefix."""
        if self.kept is None:
            return
        pairs = [
            (x, leaf.grad)
            for pair, own in zip(self.kept, self.leaves, strict=True)
            for x, leaf in zip(pair, own, strict=True)
        ]
        pairs = [(x, grad) for x, grad in pairs if grad is not None and x.requires_grad]
        torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
