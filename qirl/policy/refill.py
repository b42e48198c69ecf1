"""Online curation: a group in which all advantages are 0 teaches nothing; other prompts are drawn in its place.

After a step's groups are scored, up to policy.refill rounds draw one fresh prompt for every group without signal: the next
places of the prompt sampler, past the step's own, that this step has not drawn. A fresh group with signal takes the
place of the one without. All of it is a pure function of (config, seed, step) and the scores, which all ranks know: they
agree, the number of ranks does not matter, and a run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.kernels.philox import Stream
from qirl.policy.advantages import ABSENT, advantages, weigh
from qirl.policy.scoring import StepScores, gather_scores
from qirl.policy.update import Experience
from qirl.rewards.protocol import Scores

SILENT = 1e-9  # an advantage below this is rounding: batch-wide conventions leave some


@dataclass
class Drawn:
    """One step's groups. chosen and table are of all ranks: slot s is row s * group and the following; the rest is of
    this rank's slots, in their order."""

    chosen: list[tuple[Prompt, int]]
    slots: list[int]
    exp: Experience
    scores: list[Scores]
    images: list[np.ndarray]
    table: torch.Tensor  # float64 [len(chosen) * group, K], ABSENT where a component does not apply


def refill(trainer, drawn: Drawn, step: int, sample: Callable) -> dict[str, int]:
    """Replaces groups without signal in `drawn`, in place; returns metrics.

    sample: `qirl.policy.trainer.sample`. Metrics: refill/silent, groups without signal at first; refill/drawn, fresh
    groups; refill/left, groups that stay without signal because the rounds or the prompts ended.
    """
    count, ranks, place = len(drawn.chosen), trainer.engine.ranks, (step + 1) * len(drawn.chosen)
    extended = list(drawn.chosen)  # every prompt of the step by the number of its drawing
    silent = first = silent_slots(trainer, drawn.table, [p.category for p, _ in drawn.chosen])
    for _ in range(trainer.config.policy.refill):
        fresh, place = fresh_prompts(trainer.prompts, {p.id for p, _ in extended}, place, len(silent))
        if not fresh:
            break
        start, extended = len(extended), [*extended, *fresh]
        goes_to = dict(zip(range(start, len(extended)), silent, strict=False))
        own = [number for number, slot in goes_to.items() if slot % ranks.world == ranks.rank]
        most = max(sum(slot % ranks.world == r for slot in goes_to.values()) for r in range(ranks.world))
        scoring = StepScores(trainer, extended, step)
        # a rank without a fresh group runs one nobody asks for: all ranks take part in every forward pass
        exp, _ = sample(trainer, extended, step, scoring.submit if own else None, own or [start])
        known = list(trainer.components)
        scores, images, _ = scoring.collect(exp.ids if own else exp.ids[:0])
        ids = exp.ids if own else exp.ids[:0]
        table = gather_scores(trainer, ids, scores, extended, step, most * trainer.config.policy.group, scoring.lost)
        drawn.table = widened(drawn.table, known, trainer.components)
        dead = silent_slots(trainer, table, [p.category for p, _ in fresh])
        alive = {number: slot for i, (number, slot) in enumerate(goes_to.items()) if i not in dead}
        put(drawn, alive, start, own, exp, scores, images, table, extended)
        silent = [slot for slot in silent if slot not in alive.values()]
        if not silent:
            break
    return {"refill/silent": len(first), "refill/drawn": len(extended) - count, "refill/left": len(silent)}


def silent_slots(trainer, table: torch.Tensor, categories: Sequence[str]) -> list[int]:
    """Which groups of a table [len(categories) * group, K] have no advantage other than 0, or no valid sample."""
    group, options = trainer.config.policy.group, trainer.config.advantage
    slot = torch.arange(len(table)) // group
    weights, scale, noise = weigh(trainer, table, [categories[s] for s in slot.tolist()])
    advantage, _ = advantages(table, slot, weights, options, noise, scale=scale)
    return (advantage.view(-1, group).abs().amax(1) <= SILENT).nonzero()[:, 0].tolist()


def fresh_prompts(prompts: PromptSampler, seen: set[int], place: int, count: int) -> tuple[list, int]:
    """Up to `count` prompts that are not `seen`, with 0 earlier drawings, from `place` of the sampler on; the next place.

    Looks through one round of the largest category: a small set of prompts may hold fewer.
    """
    fresh, seen = [], set(seen)
    for _ in range(len(prompts.categories) * max(map(len, prompts.by_category.values()))):
        if len(fresh) == count:
            break
        ((prompt, _),) = prompts.step(place, 1)
        place += 1
        if prompt.id not in seen:
            seen.add(prompt.id)
            fresh.append((prompt, 0))
    return fresh, place


def widened(table: torch.Tensor, before: Sequence[str], after: Sequence[str]) -> torch.Tensor:
    """The table with the columns of components that were first returned since."""
    out = table.new_full((len(table), len(after)), ABSENT)
    out[:, [after.index(name) for name in before]] = table
    return out


def put(drawn: Drawn, alive: dict[int, int], start: int, own: list[int], exp, scores, images, table, extended) -> None:
    """Puts the fresh groups `alive` (number of the drawing: slot) into `drawn`; own: this rank's drawings, as in `exp`."""
    group = len(drawn.table) // len(drawn.chosen)
    for number, slot in alive.items():
        drawn.chosen[slot] = extended[number]
        drawn.table[slot * group : (slot + 1) * group] = table[(number - start) * group : (number - start + 1) * group]
    pairs = [(drawn.slots.index(alive[number]), i) for i, number in enumerate(own) if number in alive]
    for here, there in pairs:
        drawn.scores[here * group : (here + 1) * group] = scores[there * group : (there + 1) * group]
        drawn.images[here * group : (here + 1) * group] = images[there * group : (there + 1) * group]
    drawn.exp = with_groups(drawn.exp, exp, pairs, group)


def with_groups(exp: Experience, other: Experience, pairs: Sequence[tuple[int, int]], group: int) -> Experience:
    """`exp` with its groups `here` replaced by the groups `there` of `other`, for (here, there) in pairs; ids stay."""
    samples = [(here * group + g, there * group + g) for here, there in pairs for g in range(group)]
    if not samples:
        return exp
    gone, taken = ({pair[side] for pair in samples} for side in (0, 1))
    place = {there: here for here, there in samples}
    kept = {key: value for key, value in exp.kept.items() if key[0] not in gone}
    kept |= {(place[i], node): value for (i, node), value in other.kept.items() if i in taken}
    index, source = (torch.tensor([pair[side] for pair in samples], device=exp.grid.device) for side in (0, 1))

    def rows(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return mine.index_copy(0, index, theirs[source])

    def items(mine, theirs, moves) -> list:
        out = list(mine)
        for here, there in moves:
            out[here] = theirs[there]
        return out

    return replace(
        exp,
        conditions=items(exp.conditions, other.conditions, pairs),
        negatives=items(exp.negatives, other.negatives, pairs if exp.negatives else ()),
        stream=Stream(
            exp.stream.seed, *(rows(getattr(exp.stream, f), getattr(other.stream, f)) for f in ("prompt", "sample"))
        ),
        grid=rows(exp.grid, other.grid),
        nodes=items(exp.nodes, other.nodes, samples),
        x0=items(exp.x0, other.x0, samples),
        kept=kept,
    )
