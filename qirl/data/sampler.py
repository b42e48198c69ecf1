"""Which prompts a training step uses: a pure function of the step, balanced over categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from qirl.data.prompts import Prompt
from qirl.kernels.philox import DATA, stream, uniform


class PromptSampler:
    """Goes round the categories, and through each category in a new order every epoch (noise purpose 4)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        self.seed = seed
        self.by_category: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self.by_category.setdefault(prompt.category, []).append(prompt)
        self.categories = sorted(self.by_category)
        self._orders: dict[tuple[str, int], list[Prompt]] = {}

    def step(self, step: int, count: int) -> list[tuple[Prompt, int]]:
        """The `count` prompts of a step, each with how often it came before in this very step (usually 0)."""
        seen: Counter[int] = Counter()
        chosen = []
        for place in range(step * count, (step + 1) * count):
            turn, which = divmod(place, len(self.categories))
            category = self.categories[which]
            epoch, index = divmod(turn, len(self.by_category[category]))
            prompt = self._order(category, epoch)[index]
            chosen.append((prompt, seen[prompt.id]))
            seen[prompt.id] += 1
        return chosen

    def _order(self, category: str, epoch: int) -> list[Prompt]:
        key = (category, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != category}
            prompts = self.by_category[category]
            draws = uniform(stream(self.seed, [p.id for p in prompts], [0] * len(prompts), epoch), 1, 0, DATA)
            self._orders[key] = [prompts[i] for i in torch.argsort(draws[:, 0], stable=True).tolist()]
        return self._orders[key]
