"""Per-category calibration: reward weights that realise wanted shares of the advantage's variance (section 5).

From a probe's scores, by category: z = the components normalised inside groups exactly as training does, M = mean of
z z' over the samples. A component whose spread is often below its floor has a = M_kk < 1, the share of groups in which
it is active. With G the correlation of M (shrunk 5 % to the identity), v of `calibrated_weights` solves
v_k (G v)_k / (v' G v) = t_k; then w = (v / sqrt(a)) / sum(v / sqrt(a)) gives the shares t of the variance of
A = scale * sum_k w_k z_k, and scale = 1 / RMS(sum_k w_k z_k). The targets t are the wanted shares times reliability
1 - n^2 / s^2, normalised; s^2 is the pooled variance inside groups, n the read noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qirl.config import CalibrateConfig
from qirl.config_sections import Calibrate
from qirl.curation.calibration import NAME, VERSION
from qirl.curation.ledger import DRAWN, MEASURED, Ledger, check_header
from qirl.curation.ledger import NAME as LEDGER
from qirl.curation.probe import collect, open_probe, policy_hash, sampler_facts
from qirl.errors import UserError, nearest
from qirl.kernels.calibrated_weights import calibrated_weights
from qirl.models.folders import find_model
from qirl.parallel.data import start
from qirl.policy.advantages import (
    ABSENT,
    check_components,
    contributions,
    table,
    variance_shares,
    weights_of,
    z_scores,
)
from qirl.policy.composition import compose
from qirl.rewards.protocol import Reward
from qirl.run.folder import check_writable, write_json

SHRINK = 0.05


def calibrate(config: CalibrateConfig, rewards: Sequence[Reward] = (), quiet: bool = False) -> Path:
    """Writes calibration.json into config.run.out, from calibrate.ledger or from a probe of its own.

    Raises UserError for a ledger that is damaged, unfinished or of another policy or sampler, for shares of unknown
    components or categories, and for a category in which no component varies.
    """
    path = Path(config.run.out) / NAME
    check_writable(path.parent)
    if config.calibrate.ledger is not None:
        ranks, ledger = start(device=config.run.device), known_ledger(config)
    else:
        probe = open_probe(config, rewards)
        ranks, ledger = probe.ranks, collect(probe, quiet)
    if ranks.first:
        _write(config, path, ledger)
    ranks.barrier()
    return path


def known_ledger(config: CalibrateConfig) -> Ledger:
    """The ledger of calibrate.ledger, which must have been drawn by model.path with the sampler of this config."""
    path = Path(config.calibrate.ledger)
    ledger = Ledger(path / LEDGER if path.is_dir() else path)
    header, _ = ledger.read()
    now = {"policy": policy_hash(find_model(config.model.path), config.model.variant), **sampler_facts(config)}
    check_header(ledger.path, header, now, DRAWN)
    return ledger


def _write(config: CalibrateConfig, path: Path, ledger: Ledger) -> None:
    header, rows = ledger.read()
    if config.calibrate.ledger is not None and config.calibrate.only_kept:
        kept = [row for row in rows if row.get("decision", "keep") == "keep"]
        if not kept:
            raise UserError(
                f"{ledger.path} keeps no prompt; curate with other options, or set calibrate.only_kept=false"
            )
        rows = kept
    found = calibrated(rows, header["read_noise"] | header.get(MEASURED, {}), config)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: header[name] for name in (*DRAWN, "group", "seed", "read_noise")}
    record = {"calibration": VERSION, "method": config.calibrate.method, "ledger": str(ledger.path)}
    write_json(path, record | plain | {"floor": config.advantage.floor, "categories": found})


def calibrated(rows: Sequence[dict], noise: dict[str, float], config: CalibrateConfig) -> dict[str, dict]:
    """The record of every category; rows as `Ledger.read` gives them."""
    components = sorted({name for row in rows for own in row["scores"] for name in own})
    categories = sorted({row["category"] for row in rows})
    if config.calibrate.method == "table":
        check_components(config.advantage, components, categories)
    check_shares(config.calibrate, components, categories)
    found = {}
    for category in categories:
        own = [row["scores"] for row in rows if row["category"] == category]
        raw = table([scores for group in own for scores in group], components)
        scores = compose(raw, components, config.composition)
        used = [k for k in range(len(components)) if bool((scores[:, k] != ABSENT).any())]
        names = [components[k] for k in used]
        group = torch.arange(len(own)).repeat_interleave(len(own[0]))
        noises = torch.tensor([noise.get(name, 0.0) for name in names], dtype=torch.float64)
        hand = wanted = None
        if config.calibrate.method == "table":
            hand = torch.tensor(weights_of(config.advantage, category, names), dtype=torch.float64)
            if not hand.sum() > 0:
                raise UserError(f"every weight of category '{category}' is 0; give {' or '.join(names)} a weight")
        else:
            wanted = torch.tensor(wanted_shares(config.calibrate, category, names), dtype=torch.float64)
        found[category] = measure(scores[:, used], group, names, noises, config.advantage.floor, category, wanted, hand)
    return found


def check_shares(options: Calibrate, components: Sequence[str], categories: Sequence[str]) -> None:
    """Raises UserError for wanted shares of a component or category that the probe does not have."""
    for section, shares in (("shares", options.shares), *options.category_shares.items()):
        for name in shares:
            if name not in components:
                where = "calibrate.shares" if section == "shares" else f"calibrate.category_shares.{section}"
                raise UserError(f"{where} names '{name}', which no reward returns{nearest(name, components)}")
    for name in options.category_shares:
        if name not in categories:
            raise UserError(f"calibrate.category_shares names '{name}', which no prompt has{nearest(name, categories)}")


def wanted_shares(options: Calibrate, category: str, components: Sequence[str]) -> list[float]:
    """The wanted share of every component in one category: equal where none is given, else all of them must be."""
    given = options.shares | options.category_shares.get(category, {})
    if not given:
        return [1.0] * len(components)
    for name in components:
        if name not in given:
            raise UserError(
                f"calibrate.shares gives '{name}' no share in category '{category}'; add it (0 takes it out of the advantage)"
            )
    return [given[name] for name in components]


def measure(
    scores: torch.Tensor,
    group: torch.Tensor,
    names: Sequence[str],
    noise: torch.Tensor,
    floor: float,
    category: str,
    wanted: torch.Tensor | None = None,
    hand: torch.Tensor | None = None,
) -> dict:
    """One category's record from its raw scores [N, K]: solved weights for `wanted` shares, or the `hand` weights.

    Hand weights keep scale 1. Raises UserError, naming the category, if no wanted component varies.
    """
    z, valid = z_scores(scores, group, floor, noise)
    moments = z[valid].T @ z[valid] / max(1, int(valid.sum()))
    active = moments.diagonal().clamp(0, 1)
    variance = pooled_variance(scores[valid], group[valid])
    reliability = (1 - noise**2 / variance.clamp_min(1e-30)).clamp(0, 1)
    spread = active.clamp_min(1e-30).sqrt()
    correlation = moments / torch.outer(spread, spread)
    correlation.fill_diagonal_(1.0)
    notes: list[str] = []
    if wanted is None:
        weights, target = hand / hand.sum(), None
        scale = torch.ones(())
    else:
        weights, target, scale = solve(wanted, active, variance, noise, correlation, category, names, notes)
    parts, _ = contributions(scores, group, weights.expand_as(scores), floor, noise, scale.expand(len(scores)))
    own = parts[valid]
    realised = variance_shares(own, group[valid]) if len(own) else torch.full_like(weights, torch.nan)
    groups = int(group[valid].unique().numel())
    return {
        "scale": float(scale), "rms": float((own.sum(1) ** 2).mean().sqrt()) if len(own) else None,
        "groups": groups, "samples": int(valid.sum()),
        "components": {
            name: {
                "wanted": None if wanted is None else float(wanted[k] / wanted.sum()),
                "target": None if target is None else float(target[k]), "weight": float(weights[k]),
                "realised": float(realised[k]), "variance": float(variance[k]), "read_noise": float(noise[k]),
                "reliability": float(reliability[k]), "active": float(active[k]),
            }
            for k, name in enumerate(names)
        },
        "correlation": {name: dict(zip(names, row, strict=True)) for name, row in zip(names, correlation.tolist(), strict=True)},
        "notes": notes,
    }  # fmt: skip


def solve(wanted, active, variance, noise, correlation, category: str, names: Sequence[str], notes: list[str]):
    """(weights [K], target shares [K], scale): a component without signal gets weight 0 and its share goes to the others."""
    usable = (active > 0) & (variance > noise**2)
    for k, name in enumerate(names):
        if wanted[k] > 0 and not usable[k]:
            notes.append(
                f"{name} never varies beyond its floor and read noise inside a group; its share goes to the others"
            )
    chosen = (usable & (wanted > 0)).nonzero()[:, 0]
    if not len(chosen):
        raise UserError(
            f"category '{category}': no component with a wanted share ({', '.join(names)}) varies inside its groups more than "
            "advantage.floor and its read noise; probe more images or prompts, or curate the prompts first"
        )
    inside = correlation[chosen][:, chosen]
    v, scale, shares = calibrated_weights(wanted[chosen], variance[chosen], noise[chosen], inside, SHRINK)
    raw = v / active[chosen].sqrt()
    weights, target = torch.zeros_like(wanted), torch.zeros_like(wanted)
    weights[chosen], target[chosen] = raw / raw.sum(), shares
    return weights, target, scale * raw.sum()


def pooled_variance(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """float64 [K]: unbiased variance inside groups, pooled over them, of the scores [n, K] that apply."""
    applies = scores != ABSENT
    groups, place = group.unique(return_inverse=True)
    count = scores.new_zeros(len(groups), scores.shape[1]).index_add_(0, place, applies.double())
    filled = torch.where(applies, scores, 0)
    mean = torch.zeros_like(count).index_add_(0, place, filled) / count.clamp_min(1)
    squares = (torch.where(applies, scores - mean[place], 0) ** 2).sum(0)
    return squares / (count - 1).clamp_min(0).sum(0).clamp_min(1)
