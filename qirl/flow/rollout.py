"""Sampling a batch of images from noise, keeping what the update needs (algorithm page, sections 1b, 2 and 4).

The prefixes (prompts, and their unconditional twins under guidance) are prefilled once; every denoising step runs
target tokens only, the conditional and unconditional ones in one pack. The step loop never waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qirl.config_sections import Flow
from qirl.errors import UserError
from qirl.flow.grid import sigmas
from qirl.kernels.flow_step import MODES, ODE, Noise, Step, flow_step
from qirl.kernels.philox import INITIAL, Stream, normal
from qirl.models.architecture import Transformer
from qirl.packing import Condition, Target, pack, send

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Kept:
    """One trained transition of one sample: x and x' [tokens, C] as rounded to the storage dtype, and the velocity
    [tokens, C] the conditional model gave there, in its own dtype."""

    x: torch.Tensor
    x_next: torch.Tensor
    v: torch.Tensor


@dataclass
class Rollout:
    """x0: the finished latents [target_tokens, C], float32. kept[sample, node]: transitions asked for."""

    x0: torch.Tensor
    lengths: tuple[int, ...]
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)

    def latents(self) -> list[torch.Tensor]:
        """The finished latents per sample, [tokens, C]."""
        return list(self.x0.split(list(self.lengths)))


def not_finite(latents: Sequence[torch.Tensor]) -> list[bool]:
    """Which samples' finished latents hold a NaN or an infinity: those have failed and are no images. Warns of them."""
    failed = _failed(latents)
    if any(failed):
        warnings.warn(f"{sum(failed)} of {len(failed)} latents are not finite: these samples failed", stacklevel=2)
    return failed


def _failed(latents: Sequence[torch.Tensor]) -> list[bool]:
    """One wait for the device, whatever their number."""
    return [not fine for fine in torch.stack([x.isfinite().all() for x in latents]).tolist()] if len(latents) else []


def without_failed(
    x0: Sequence[torch.Tensor], kept: Mapping[tuple[int, int], Kept]
) -> tuple[list[torch.Tensor], dict[tuple[int, int], Kept]]:
    """Finished latents and transitions with zeros in place of samples that are not finite: they weigh 0 in the update,
    and 0 times NaN would be NaN."""
    failed = _failed(x0)
    if not any(failed):
        return list(x0), dict(kept)

    def zeros(old: Kept) -> Kept:
        return Kept(*(torch.zeros_like(value) for value in (old.x, old.x_next, old.v)))

    return (
        [torch.zeros_like(x) if bad else x for x, bad in zip(x0, failed, strict=True)],
        {key: zeros(old) if failed[key[0]] else old for key, old in kept.items()},
    )


def grids(targets: Sequence[Target], flow: Flow, device="cpu") -> torch.Tensor:
    """float32 [R, steps + 1]: each sample's own grid, by its number of tokens."""
    by_tokens = {n: torch.from_numpy(sigmas(n, flow)) for n in {t.tokens for t in targets}}
    return send(torch.stack([by_tokens[t.tokens] for t in targets]), device)


def step_at(grid: torch.Tensor, node: int, mode: torch.Tensor, level: float) -> Step:
    """The transition from `node` to the next one for every sample of `grid` [R, steps + 1]; mode int64 [R]."""
    return Step(grid[:, node], grid[:, node + 1], grid[:, 1], mode, level)


def mode_table(nodes: Sequence[Sequence[int]], flow: Flow) -> torch.Tensor:
    """int64 [steps, R]: which transition each sample makes at each step; the last step is always ode."""
    table = torch.full((flow.steps, len(nodes)), ODE, dtype=torch.int64)
    sampler = MODES.index(flow.sampler)
    if flow.stochastic == "all":
        table[:-1] = sampler
    else:
        for sample, own in enumerate(nodes):
            table[list(own), sample] = sampler
    table[-1] = ODE
    return table


@torch.no_grad()
def rollout(
    model: Transformer,
    conditions: Sequence[Condition],
    targets: Sequence[Target],
    stream: Stream,
    flow: Flow,
    nodes: Sequence[Sequence[int]] | None = None,
    negatives: Sequence[Condition] | None = None,
) -> Rollout:
    """Samples every target from t = 1 to 0.

    targets: sorted by prompt. stream: one row per target. nodes: per target, the nodes whose transitions are kept and,
    for a stochastic sampler, random. negatives: the unconditional twin of every condition, for guidance other than 1.
    Raises UserError for guidance without them.
    """
    device = stream.prompt.device
    guided = flow.guidance != 1.0
    if guided and negatives is None:
        raise UserError(
            f"flow.guidance={flow.guidance} needs an unconditional embedding and this model has none "
            "(pretrain.drop_condition was 0); set flow.guidance=1"
        )
    nodes = nodes if nodes is not None else [()] * len(targets)
    everything, twins = with_negatives(conditions, targets, negatives) if guided else (list(conditions), [])
    packed = pack(everything, [*targets, *twins], device=device, pad=model.pad)
    half = packed.target_tokens // (2 if guided else 1)
    row, token = packed.target_row[:half], packed.token_in_target[:half]
    lengths = tuple(t.tokens for t in targets)

    grid, modes = grids(targets, flow, device), mode_table(nodes, flow)
    random = (modes != ODE).any(1).tolist()
    modes = send(modes, device)
    keepers = _Keepers(nodes, lengths, flow, device)
    x = normal(stream, row, token, model.config.latent_channels, 0, INITIAL)
    if model.dtype == torch.float64:
        x = x.double()

    past = model(pack(everything, [], device=device, pad=model.pad))
    body = packed.without_prefix()
    for node in range(flow.steps):
        t = grid[:, node]
        v = model(body, torch.cat([x, x]) if guided else x, torch.cat([t, t]) if guided else t, past)
        x_next, _ = flow_step(
            x, v[:half], row, step_at(grid, node, modes[node], flow.level),
            v[half:] if guided else None, flow.guidance, flow.rescale, Noise(stream, token, node) if random[node] else None,
        )  # fmt: skip
        keepers.keep(node, x, x_next, v)
        x = x_next
    return Rollout(x, lengths, keepers.kept)


def with_negatives(conditions, targets, negatives) -> tuple[list[Condition], list[Target]]:
    """All conditions with the unconditional ones behind them (equal neighbours once), and the targets' twins."""
    unique, place = [], []
    for negative in negatives:
        if not unique or unique[-1] is not negative:
            unique.append(negative)
        place.append(len(conditions) + len(unique) - 1)
    twins = [Target(place[t.prompt], t.height, t.width) for t in targets]
    return [*conditions, *unique], twins


class _Keepers:
    """Collects the transitions to keep; the indices are on the device before the loop starts."""

    def __init__(self, nodes, lengths, flow: Flow, device):
        self.kept: dict[tuple[int, int], Kept] = {}
        self.dtype = DTYPES[flow.storage]
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        self.plan = {}
        for node in range(flow.steps):
            samples = [i for i, own in enumerate(nodes) if node in own]
            if samples:
                index = send(torch.cat([torch.arange(starts[i], starts[i + 1]) for i in samples]), device)
                self.plan[node] = (samples, [lengths[i] for i in samples], index)

    def keep(self, node: int, x, x_next, v) -> None:
        if node in self.plan:
            samples, lengths, index = self.plan[node]
            parts = [p[index].split(lengths) for p in (x.to(self.dtype), x_next.to(self.dtype), v)]
            for sample, *own in zip(samples, *parts, strict=True):
                self.kept[sample, node] = Kept(*own)
