"""The update's packs: (sample, node) pairs laid out under a token budget, with the prefix shared.

Whole prompts are put into packs while they fit. Where one prompt's pairs alone exceed the budget, the seam is used, prompt
by prompt: the prefix runs once, its keys and values become leaves for packs of targets only, and one prefix backward at
the end takes the gradients that added up there. Where the objective itself is guided (scope `both`), every target has
an unconditional twin in its pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qirl.flow.rollout import with_negatives
from qirl.models.architecture import KeysValues, Transformer
from qirl.packing import Condition, Pack, Target, cut, pack

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
    """How pairs are cut: packs of pair indices, and the number that all ranks run.

    live: how many of the packs are this rank's own; the others repeat the first one, with weight 0. negatives: the
    unconditional twin of every condition where the objective is guided, else nothing. pad: that of the model.
    """

    conditions: Sequence[Condition]
    pairs: Sequence[Pair]
    packs: list[list[int]]
    live: int
    seam: bool
    negatives: Sequence[Condition] = ()
    pad: int = 1

    def body(self, members: Sequence[int], device) -> Pack:
        """The pack of these pairs (and their twins): with the prefixes of its prompts, or without any under the seam."""
        pairs = [self.pairs[i] for i in members]
        used = range(len(self.conditions)) if self.seam else sorted({p.prompt for p in pairs})
        place = {prompt: index for index, prompt in enumerate(used)}
        targets = [Target(place[p.prompt], p.height, p.width) for p in pairs]
        return self._pack(used, targets, prefix=not self.seam, device=device)

    def prefix(self, device) -> Pack | None:
        """The prefixes of all prompts (and their twins), without targets."""
        return self._pack(range(len(self.conditions)), [], prefix=True, device=device)

    def _pack(self, used: Sequence[int], targets: list[Target], prefix: bool, device) -> Pack | None:
        conditions, twins = [self.conditions[i] for i in used], []
        if self.negatives:
            conditions, twins = with_negatives(conditions, targets, [self.negatives[i] for i in used])
        return pack(conditions, [*targets, *twins], prefix=prefix, device=device, pad=self.pad)


def lay_out(
    conditions: Sequence[Condition],
    pairs: Sequence[Pair],
    budget: int,
    agree: Callable[[bool, int], tuple[bool, int]],
    negatives: Sequence[Condition] = (),
    pad: int = 1,
) -> list[Layout]:
    """Cuts one optimizer step's pairs (sorted by prompt) into packs of at most `budget` target tokens under the seam, of
    all tokens without it: one layout without the seam, or one a prompt with it.

    `agree` makes ranks agree on (seam, number of packs); all have the same number of prompts. negatives, pad: see `Layout`.
    Raises UserError if one pair alone exceeds the budget.
    """
    twice = 2 if negatives else 1
    by_prompt: list[list[int]] = [[] for _ in conditions]
    for index, pair in enumerate(pairs):
        by_prompt[pair.prompt].append(index)
    both = [[c, *negatives[i : i + 1]] for i, c in enumerate(conditions)]
    carried, prefixes = ([sum(getattr(c, n) for c in own) for own in both] for n in ("carried_tokens", "prefix_tokens"))
    sizes = [[pairs[i].tokens * twice + carried[p] for i in own] for p, own in enumerate(by_prompt)]
    runs = [cut(own, budget, BUDGET) for own in sizes]  # the packs of the seam; also checks every pair
    costs = [prefix + sum(own) for prefix, own in zip(prefixes, sizes, strict=True)]
    seam, _ = agree(any(prefixes) and max(costs, default=0) > budget, 0)

    def layout(conditions, pairs, packs, negatives) -> Layout:
        _, count = agree(seam, len(packs))
        return Layout(conditions, pairs, packs + packs[:1] * (count - len(packs)), len(packs), seam, negatives, pad)

    if seam:
        return [
            layout([conditions[i]], [replace(pairs[k], prompt=0) for k in own], runs[i], negatives[i : i + 1])
            for i, own in enumerate(by_prompt)
        ]
    if any(prefixes):
        packs = [[k for i in run for k in by_prompt[i]] for run in cut(costs, budget, BUDGET)]
    else:  # nothing is shared: any pairs make a pack
        packs = cut([size for own in sizes for size in own], budget, BUDGET)
    return [layout(conditions, pairs, packs, negatives)]


class Prefix:
    """The prefix of one optimizer step: nothing when packs carry their own, else its keys and values as leaves."""

    def __init__(self, model: Transformer, layout: Layout, device):
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
