"""One pack of on-policy distillation: the student walks from noise to an image, and learns at every node it passes.

    v = student(x_n, c), no guidance      u = guided teacher at the same x_n, no gradient
    loss += weight_n (|v - u|^2 + anchor |v - v_base|^2)          x_{n+1} = step(x_n, stopgrad(v))

States carry no gradient, so the backward of node n runs at once and is exact: no second rollout, no stored trajectory,
one node's graph in memory. The prefix does not depend on the node either (the weights change between steps only): it
runs once per pack, its keys and values are leaves that gather the gradients of all nodes, and one backward at the end
takes them further. Algorithm page, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qirl.config_sections import Distill, Flow
from qirl.errors import UserError
from qirl.flow.rollout import mode_table, step_at, with_negatives
from qirl.kernels.flow_step import ODE, SDE, Noise, Step, coefficients, flow_step
from qirl.kernels.philox import INITIAL, Stream, normal
from qirl.kernels.velocity_match import velocity_match
from qirl.models.architecture import Transformer
from qirl.packing import Condition, PackedBatch, Target, pack, send
from qirl.policy.packs import Layout, Prefix

STATS = ("loss", "match", "anchor")
Schedule = Sequence[tuple[bool, bool]]  # per node: does any rank train samples there, does any only pass


@dataclass(frozen=True)
class Guide:
    """The teacher of a step and how it is guided."""

    model: Callable
    guidance: float = 1.0
    rescale: bool = False


@dataclass(frozen=True)
class Part:
    """Some samples of a pack. body: their targets; guided: those with unconditional twins; None where unguided."""

    samples: torch.Tensor  # int64 [r]
    tokens: torch.Tensor  # int64 [target tokens], places in the pack
    body: PackedBatch
    guided: PackedBatch | None


@dataclass
class Lesson:
    """What one rank distils in one step, per sample: target (sorted by prompt), noise, grid, trained nodes.

    negatives: the unconditional twin of every condition, empty for an unguided teacher. grid float32 [R, steps + 1].
    """

    conditions: Sequence[Condition]
    negatives: Sequence[Condition]
    targets: Sequence[Target]
    stream: Stream
    grid: torch.Tensor
    nodes: Sequence[tuple[int, ...]]
    pad: int = 1  # that of the student, for all packs
    _parts: dict[tuple[int, ...], Part] = field(default_factory=dict, repr=False)

    def take(self, members: Sequence[int]) -> Lesson:
        """The samples `members`, with their own prompts only."""
        used = sorted({self.targets[i].prompt for i in members})
        place = {prompt: index for index, prompt in enumerate(used)}
        targets = [Target(place[t.prompt], t.height, t.width) for t in (self.targets[i] for i in members)]
        rows = send(torch.tensor(list(members)), self.grid.device)
        negatives = [self.negatives[i] for i in used] if self.negatives else ()
        return Lesson(
            [self.conditions[i] for i in used], negatives, targets, self.stream.rows(rows), self.grid[rows],
            [self.nodes[i] for i in members], self.pad,
        )  # fmt: skip

    def schedule(self) -> list[tuple[bool, bool]]:
        """Per node: (is a sample trained there, does a sample only pass)."""
        trained = [sum(node in own for own in self.nodes) for node in range(self.grid.shape[1] - 1)]
        return [(n > 0, n < len(self.nodes)) for n in trained]

    def with_twins(self, targets: Sequence[Target]) -> tuple[list[Condition], list[Target]]:
        """Conditions and targets as the teacher sees them: with their unconditional twins where it is guided."""
        if not self.negatives:
            return list(self.conditions), list(targets)
        everything, twins = with_negatives(self.conditions, targets, self.negatives)
        return everything, [*targets, *twins]

    def part(self, members: Sequence[int]) -> Part:
        """The packs of some samples, made once; they run against the prefixes of all conditions."""
        key = tuple(members)
        if key not in self._parts:
            device, targets = self.grid.device, [self.targets[i] for i in members]
            lengths = [t.tokens for t in self.targets]
            tokens = torch.cat([torch.arange(lengths[i]) + sum(lengths[:i]) for i in members])
            some = dict(prefix=False, device=device, pad=self.pad)
            body = pack(self.conditions, targets, **some)
            guided = pack(*self.with_twins(targets), **some) if self.negatives else None
            self._parts[key] = Part(send(torch.tensor(key), device), send(tokens, device), body, guided)
        return self._parts[key]


def cut_samples(lesson: Lesson, budget: int) -> list[list[int]]:
    """Packs of samples, in order, of at most `budget` tokens with the prefixes of their prompts.

    Raises UserError if one sample with its prefix exceeds the budget.
    """
    packs: list[list[int]] = []
    room, before = 0, None
    for index, target in enumerate(lesson.targets):
        condition = lesson.conditions[target.prompt]
        whole = target.tokens + condition.tokens
        if whole > budget:
            raise UserError(
                f"distill.micro_tokens={budget} tokens is smaller than one sample of {whole} tokens (its prompt's "
                f"included); set it to {whole} or more"
            )
        cost = whole - condition.prefix_tokens if packs and target.prompt == before else whole
        if not packs or cost > room:
            packs.append([])
            room, cost = budget, whole
        packs[-1].append(index)
        room, before = room - cost, target.prompt
    return packs


def node_weight(kind: str, step: Step) -> torch.Tensor:
    """What a node's squared velocity difference weighs, [R]: one 1; step |dt|; sde 1 / (2 std^2) times the square of
    what the mean of the sde transition multiplies v with, so that the weighted loss is the KL of two such transitions:

        (1 + a^2 / 2)^2 |dt| (1 - t~) / (2 a^2 t),  at t = 1 without the square's a^2 / 2
    """
    if kind == "one":
        return torch.ones_like(step.t)
    if kind == "step":
        return step.t - step.s
    t, s, cap = (p.double() for p in (step.t, step.s, step.cap))
    sde = Step(t, s, cap, torch.full_like(step.mode, SDE), step.level)
    _, on_v, std = coefficients(sde, t.dtype)
    return on_v**2 / (2 * std**2)


def sweep(
    student: Transformer,
    guide: Guide,
    lesson: Lesson,
    flow: Flow,
    options: Distill,
    weight: float,
    base: Callable | None = None,
    schedule: Schedule | None = None,
) -> torch.Tensor:
    """Adds the gradients of one pack to the student; returns STATS per node, float64 [steps, 3], each times `weight`.

    weight: 1 / (number of trained pairs of the step over all ranks); 0 for a pack that only keeps ranks in step. base:
    the frozen base, for options.anchor. schedule: what the ranks agreed on; a rank that has no samples for a run that
    others do repeats its first one with weight 0. flow.sampler makes the states, as in a rollout.
    """
    device, channels = lesson.grid.device, student.config.latent_channels
    prefix = Prefix(student, Layout(lesson.conditions, (), [], 0, seam=True, pad=lesson.pad), device)
    with torch.no_grad():
        taught = guide.model(pack(lesson.with_twins([])[0], [], device=device, pad=lesson.pad))
        anchored = base(pack(lesson.conditions, [], device=device, pad=lesson.pad)) if base else None
    whole = lesson.part(range(len(lesson.targets)))
    row, token = whole.body.target_row, whole.body.token_in_target
    modes = mode_table(lesson.nodes, flow)
    random = (modes != ODE).any(1).tolist()
    modes = send(modes, device)

    x = normal(lesson.stream, row, token, channels, 0, INITIAL)
    x = x.double() if student.dtype == torch.float64 else x
    stats = torch.zeros(flow.steps, len(STATS), dtype=torch.float64, device=device)
    for node, (anywhere, passes) in enumerate(schedule or lesson.schedule()):
        step = step_at(lesson.grid, node, modes[node], flow.level)
        trained = [i for i, own in enumerate(lesson.nodes) if node in own]
        passing = [i for i, own in enumerate(lesson.nodes) if node not in own]
        v = x.new_empty(x.shape)
        if passes:
            part = lesson.part(passing or [0])
            with torch.no_grad():
                out = student(part.body, x[part.tokens], step.t[part.samples], prefix.leaves)
            v[part.tokens] = out.to(v.dtype)
        if anywhere:
            part = lesson.part(trained or [0])
            own = step.rows(part.samples)
            u, u_negative, v_base = _targets(guide, base, part, x[part.tokens], own.t, taught, anchored)
            out = student(part.body, x[part.tokens], own.t, prefix.leaves)
            own_row = part.body.target_row
            match = velocity_match(out, u, part.body.lengths, u_negative, guide.guidance, guide.rescale, own_row)
            pull = velocity_match(out, v_base, part.body.lengths, row=own_row) if base else torch.zeros_like(match)
            loss = node_weight(options.weight, own).to(match.dtype) * (match + options.anchor * pull)
            factor = weight if trained else 0.0
            (loss.sum() * factor).backward()
            stats[node] = torch.stack([loss.detach(), match.detach(), pull.detach()], 1).double().sum(0) * factor
            if trained:
                v[part.tokens] = out.detach().to(v.dtype)
        x, _ = flow_step(x, v, row, step, noise=Noise(lesson.stream, token, node) if random[node] else None)
    prefix.backward()
    return stats


@torch.no_grad()
def _targets(guide: Guide, base, part: Part, x, t, taught, anchored):
    """The teacher's conditional and unconditional velocity (None unguided), and the base's (None without anchor)."""
    if part.guided is None:
        u, negative = guide.model(part.body, x, t, taught), None
    else:
        u, negative = guide.model(part.guided, torch.cat([x, x]), torch.cat([t, t]), taught).chunk(2)
    return u, negative, base(part.body, x, t, anchored) if base else None


__all__ = ["STATS", "Guide", "Lesson", "cut_samples", "node_weight", "sweep"]
