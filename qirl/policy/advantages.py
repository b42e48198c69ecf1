"""From raw scores to advantages: components, category weights, groups by integer id (algorithm page, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qirl.config_sections import Advantage
from qirl.errors import UserError, nearest
from qirl.kernels.group_advantage import group_advantage
from qirl.kernels.philox import DATA, stream, uniform
from qirl.rewards.protocol import Reward, Scores, noise_of

# in a gathered table: the component does not apply (NaN is a failure); no reward returns it, and it is finite in float32
ABSENT = torch.finfo(torch.float32).min


def table(scores: Sequence[Scores], components: Sequence[str]) -> torch.Tensor:
    """float64 [N, K]: the scores, NaN where scoring failed, ABSENT where a component does not apply."""
    rows = [[s.get(c, ABSENT) for c in components] for s in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(scores), len(components))


def noise_table(scores: Sequence[Scores], components: Sequence[str]) -> torch.Tensor:
    """float64 [N, K]: the noise of noisy scores, NaN elsewhere."""
    rows = [[noise_of(s.get(c, ABSENT)) for c in components] for s in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(scores), len(components))


def pool_noise(pool: dict, noise: torch.Tensor, components: Sequence[str]) -> None:
    """Adds a noise table to pool["noise"], {component: [sum of squares, count]}: a step after the other, in one order."""
    squares, count = noise.nan_to_num(0.0).square().sum(0).tolist(), (~noise.isnan()).sum(0).tolist()
    for component, own, new in zip(components, squares, count, strict=True):
        if new:
            total, before = pool.setdefault("noise", {}).get(component, [0.0, 0])
            pool["noise"][component] = [total + own, before + new]


def pooled_noise(pool: dict) -> dict[str, float]:
    """{component: root mean square} of what `pool_noise` has put together."""
    return {name: math.sqrt(total / count) for name, (total, count) in pool.get("noise", {}).items()}


def check_components(options: Advantage, components: Sequence[str], categories: Sequence[str]) -> None:
    """Raises UserError if a weight names a component or category that does not exist, or all weights are 0."""
    for name in unknown_weights(options, components):
        raise UserError(f"advantage.weights names '{name}', which no reward returns{nearest(name, components)}")
    check_categories(options, components, categories)


def unknown_weights(options: Advantage, components: Sequence[str]) -> list[str]:
    """Names with a weight that are none of the components."""
    named = {*options.weights, *(name for weights in options.category_weights.values() for name in weights)}
    return sorted(named - set(components))


def check_categories(options: Advantage, components: Sequence[str], categories: Sequence[str]) -> None:
    """Raises UserError for weights of a category that no prompt has, or a category whose weights are all 0."""
    for category in options.category_weights:
        if category not in categories:
            raise UserError(
                f"advantage.category_weights names '{category}', which no prompt has{nearest(category, categories)}"
            )
    for category in categories:
        if not any(weights_of(options, category, components)):
            raise UserError(f"every weight of category '{category}' is 0; give at least one component a weight")


def read_noise(known: dict[str, float], components: Sequence[str]) -> torch.Tensor:
    """float64 [K]: how much each component's reading varies by itself; 0 where nobody says so."""
    return torch.tensor([known.get(c, 0.0) for c in components], dtype=torch.float64)


def declared_components(rewards: Sequence[Reward]) -> list[str]:
    """What the rewards say they return (an attribute `components`), empty if one of them does not say."""
    said = [getattr(reward, "components", None) for reward in rewards]
    return [] if None in said else [name for own in said for name in own]


def weigh(
    trainer, scores: torch.Tensor, categories: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights [N, K], scale [N] (None: 1) and read noise [K] of scores [N, K], by the calibration where there is one."""
    notes = trainer.engine.notes
    noise = read_noise(notes.get("declared_noise", {}) | pooled_noise(notes), trainer.components)
    if trainer.calibration is None:
        options, components = trainer.config.advantage, trainer.components
        return torch.tensor([weights_of(options, c, components) for c in categories]), None, noise
    trainer.calibration.check_unchanged(notes)
    return *trainer.calibration.tables(scores, categories, trainer.components), noise


def weights_of(options: Advantage, category: str, components: Sequence[str]) -> list[float]:
    """The weight of every component for one category."""
    own = options.category_weights.get(category, {})
    return [own.get(c, options.weights.get(c, 1.0)) for c in components]


def advantages(
    scores: torch.Tensor,
    group: torch.Tensor,
    weights: torch.Tensor,
    options: Advantage,
    noise: torch.Tensor | None = None,
    control: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage float32 [N] and valid bool [N] of a table [N, K]; group int64 [N], weights [N, K].

    noise: read noise of each component, [K]; one that varies less inside a group gives no signal there. control: a
    permutation of the samples inside their groups; the shuffled-reward experiment applies it. scale: a factor on each
    sample's advantage, [N].
    """
    shown = scores if control is None else scores[control]
    applies = shown != ABSENT
    return group_advantage(
        shown, applies, group, weights, noise, options.floor, options.clip, options.convention, scale
    )


def composite(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float64 [N]: the weighted mean of the raw scores [N, K] that apply, never z-scored; NaN where one failed."""
    applies = scores != ABSENT
    total = (shares_of(applies, weights) * torch.where(scores.isnan() | ~applies, 0, scores)).sum(1)
    return torch.where((applies & scores.isnan()).any(1), torch.nan, total)


def shares_of(applies: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float64 [N, K]: weights that sum to 1 over the components that apply to a sample."""
    share = torch.where(applies, weights.double(), 0)
    return share / share.sum(1, keepdim=True).clamp_min(1e-30)


def z_scores(
    scores: torch.Tensor, group: torch.Tensor, floor: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [N, K]: every component normalised inside its group, as the advantage takes it; and valid bool [N]."""
    applies, columns = scores != ABSENT, []
    for k in range(scores.shape[1]):
        alone = torch.zeros_like(scores)
        alone[:, k] = 1.0
        z, valid = group_advantage(scores, applies, group, alone, noise, floor=floor, clip=float("inf"))
        columns.append(z.double())
    return torch.stack(columns, 1), valid


def contributions(
    scores: torch.Tensor,
    group: torch.Tensor,
    weights: torch.Tensor,
    floor: float,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [N, K]: what each component adds to an advantage before it is clipped (per_reward); and valid bool [N]."""
    z, valid = z_scores(scores, group, floor, noise)
    factor = 1.0 if scale is None else scale.double()[:, None]
    return factor * shares_of(scores != ABSENT, weights) * z, valid


def variance_shares(parts: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """float64 [K]: cov(part_k, A) / var(A) inside groups, of the parts [n, K] of advantages A; NaN where A never varies."""
    groups, place = group.unique(return_inverse=True)
    size = parts.new_zeros(len(groups)).index_add_(0, place, parts.new_ones(len(place)))
    mean = parts.new_zeros(len(groups), parts.shape[1]).index_add_(0, place, parts) / size[:, None]
    centred = parts - mean[place]
    total = centred.sum(1)
    return (centred * total[:, None]).sum(0) / (total**2).sum()


def shuffle_inside(group: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """int64 [N]: a random permutation that keeps every sample's group; a pure function of (seed, step)."""
    index = torch.arange(len(group))
    draws = uniform(stream(seed, index.tolist(), [0] * len(group), step), 1, 1, DATA)[:, 0]
    source = index[torch.argsort(draws, stable=True)]
    source = source[torch.argsort(group[source], stable=True)]  # by group, in random order
    place = index[torch.argsort(group, stable=True)]  # by group, in their own order
    out = torch.empty_like(index)
    out[place] = source
    return out
