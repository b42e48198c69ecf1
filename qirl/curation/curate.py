"""Prompt curation: keep the prompts whose images the rewards tell apart (algorithm page, section 5).

A prompt is dropped for the first reason that holds:
    failed     fewer than 2 of its images could be scored
    range      max - min of the composite is not above tau x d2(number of scored images)
    saturated  the mean composite is above curate.saturated: the base does it already
    balance    its category keeps more than curate.balance times the smallest category's; the widest ranges stay
The composite is the weighted sum of the raw scores in [0, 1], never z-scored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qirl.config import CurateConfig, to_dict
from qirl.config_sections import Advantage, Composition, Curate
from qirl.curation.ledger import MEASURED, NOISE, RAW
from qirl.curation.probe import Probe, collect, open_probe
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.kernels.reward_range import expected_range, reward_range
from qirl.policy.advantages import (
    ABSENT,
    check_components,
    composite,
    declared_components,
    read_noise,
    shares_of,
    table,
    weights_of,
)
from qirl.policy.composition import compose
from qirl.rewards.protocol import Reward, declared_noise
from qirl.run.folder import write_bytes

CURATED = "curated.jsonl"
REASONS = ("failed", "range", "saturated", "balance")


def curate(config: CurateConfig, rewards: Sequence[Reward] = (), quiet: bool = False) -> Path:
    """Probes every candidate prompt, decides, and writes curated.jsonl (what world.prompts takes) beside the ledger.

    Raises UserError as `qirl.curation.probe.collect` does, for a tau below twice the read noise and where no prompt is
    kept; the ledger then holds all scores, and the same command with other options of `curate` needs no new images.
    """
    probe = open_probe(config, rewards)
    check_declared(probe)
    ledger = collect(probe, quiet)
    path = ledger.path.with_name(CURATED)
    if probe.ranks.first:
        header, rows = ledger.read()
        live = declared_noise(probe.rewards).items() - header["read_noise"].items()  # learned while they scored
        measured = header.get(MEASURED, {}) | dict(live) | measured_noise(rows)
        if measured != header.get(MEASURED, {}):  # before a decision may be refused
            header |= {MEASURED: measured}
            ledger.replace(header, rows)
        rows = decide(rows, config.curate, config.advantage, header["read_noise"] | measured, config.composition)
        plain = to_dict(config)
        weights = {name: plain["advantage"][name] for name in ("weights", "category_weights")}
        path.unlink(missing_ok=True)  # of earlier decisions
        ledger.replace(header | {"curate": plain["curate"], **weights}, rows)
        check_some_kept(rows, config.curate, ledger.path)
        kept = {row["id"] for row in rows if row["decision"] == "keep"}
        write_prompts(path, [p for p in probe.prompts if p.id in kept])
    probe.ranks.barrier()
    return path


def check_declared(probe: Probe) -> None:
    """Raises before the first image what declared components and read noises already tell."""
    config, declared = probe.config, declared_components(probe.rewards)
    if not declared:
        return
    categories = sorted({p.category for p in probe.prompts})
    check_components(config.advantage, declared, categories)
    noise = read_noise(declared_noise(probe.rewards), declared)
    for category in categories:
        weights = torch.tensor([weights_of(config.advantage, category, declared)], dtype=torch.float64)
        check_tau(config.curate.tau, composite_noise(torch.zeros(1, len(declared)), weights, noise), category)


def check_tau(tau: float, noise: float, whose: str) -> None:
    if tau < 2 * noise:
        needed = math.ceil(2 * noise * 1e4) / 1e4
        raise UserError(
            f"curate.tau={tau} is below twice the read noise {noise:.4f} of the composite of {whose}: it would keep prompts "
            f"whose images differ by chance only; set curate.tau={needed:g} or more"
        )


def composite_noise(scores: torch.Tensor, weights: torch.Tensor, noise: torch.Tensor) -> float:
    """The largest read noise of the composite of samples [N, K] (ABSENT where a component does not apply)."""
    share = shares_of(scores != ABSENT, weights)
    return float(((share * noise.double()) ** 2).sum(1).sqrt().max())


def measured_noise(rows: Sequence[dict]) -> dict[str, float]:
    """{component: root mean square of the noise} of a ledger's noisy scores."""
    found: dict[str, list[float]] = {}
    for own in (own for row in rows for own in row.get(NOISE, ())):
        for name, value in own.items():
            found.setdefault(name, []).append(value**2)
    return {name: math.sqrt(math.fsum(squares) / len(squares)) for name, squares in sorted(found.items())}


def decide(
    rows: Sequence[dict],
    options: Curate,
    advantage: Advantage,
    noise: dict[str, float],
    composition: Composition | None = None,
) -> list[dict]:
    """Ledger lines with composite, mean, range, threshold, decision and reason; rows as `Ledger.read` gives them.

    Raises UserError for weights of no component or category, and for a tau below twice the read noise.
    """
    components = sorted({name for row in rows for own in row["scores"] for name in own})
    if not components:
        raise UserError("no reward returned a component for any sample; a reward returns {component: score} per sample")
    check_components(advantage, components, sorted({row["category"] for row in rows}))
    noises = torch.tensor([noise.get(name, 0.0) for name in components], dtype=torch.float64)
    decided = [_judge(row, components, options, advantage, noises, composition or Composition()) for row in rows]
    for row in over_balance([r for r in decided if r["decision"] == "keep"], options.balance):
        row |= {"decision": "drop", "reason": "balance"}
    return decided


def _judge(row: dict, components, options: Curate, advantage: Advantage, noise, composition: Composition) -> dict:
    scores = compose(table(row["scores"], components), list(components), composition)
    weights = torch.tensor([weights_of(advantage, row["category"], components)]).expand_as(scores)
    values = composite(scores, weights)
    scored = values[~values.isnan()]
    out = {name: row[name] for name in (*RAW, NOISE) if name in row} | {"composite": values.tolist()}
    if len(scored) < 2:
        return out | {"mean": None, "range": None, "threshold": None, "decision": "drop", "reason": "failed"}
    own = composite_noise(scores[~values.isnan()], weights[~values.isnan()], noise)
    check_tau(options.tau, own, f"prompt {row['id']} ('{row['prompt']}')")
    spread, wide = reward_range(scored[None], options.tau, own)
    mean, threshold = float(scored.mean()), options.tau * expected_range(len(scored))
    reason = "range" if not bool(wide[0]) else "saturated" if mean > options.saturated else None
    out |= {"mean": mean, "range": float(spread[0]), "threshold": threshold}
    return out | {"decision": "drop" if reason else "keep", "reason": reason}


def over_balance(kept: Sequence[dict], balance: float) -> list[dict]:
    """The kept rows that a category has beyond `balance` times the smallest category's (0: none), narrowest ranges."""
    by_category: dict[str, list[dict]] = {}
    for row in kept:
        by_category.setdefault(row["category"], []).append(row)
    if not (balance and kept):
        return []
    limit = math.floor(balance * min(map(len, by_category.values())))
    return [r for own in by_category.values() for r in sorted(own, key=lambda r: (-r["range"], r["id"]))[limit:]]


def check_some_kept(rows: Sequence[dict], options: Curate, ledger: Path) -> None:
    """Raises UserError, with the numbers that decide, where no prompt is left to train on."""
    if any(row["decision"] == "keep" for row in rows):
        return
    count = Counter(row["reason"] for row in rows)
    why = ", ".join(f"{reason} {count[reason]}" for reason in REASONS if count[reason])
    line = f"no prompt of {len(rows)} is kept ({why})"
    narrow = [row for row in rows if row["reason"] == "range"]
    if narrow:
        widest = max(narrow, key=lambda row: row["range"])
        line += (
            f": the largest range is {widest['range']:.4f}, the threshold {widest['threshold']:.4f} = curate.tau={options.tau} "
            f"x d2({sum(v == v for v in widest['composite'])})"
        )
        fix = "lower curate.tau, or draw more varied images (more noise, less guidance)"
    elif count["saturated"]:
        fix = f"raise curate.saturated={options.saturated} or take harder prompts"
    else:
        fix = "mend the reward, and delete the ledger so that its images are scored again"
    raise UserError(f"{line}; {fix}; the scores are in {ledger}")


def record_of(prompt: Prompt, place: Callable[[Path], str]) -> dict:
    """A prompt as a line of a prompt file, without its sources; place: how the file of its image is written."""
    line = {"id": prompt.id, "text": prompt.text, "category": prompt.category}
    line |= {"height": prompt.height, "width": prompt.width} if prompt.height else {}
    line |= {"metadata": prompt.metadata} if prompt.metadata else {}
    return line | ({"image": place(prompt.image)} if isinstance(prompt.image, Path) else {})


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """A prompt file for world.prompts; the sources of edits become PNG files in sources/ beside it."""
    from PIL import Image

    lines = []
    for prompt in prompts:
        line = record_of(prompt, lambda file: str(file.resolve()))
        names = [f"sources/{prompt.id}_{place}.png" for place in range(len(prompt.sources))]
        for name, source in zip(names, prompt.sources, strict=True):
            (path.parent / name).parent.mkdir(exist_ok=True)
            Image.fromarray(source).save(path.parent / name)
        lines.append(line | ({"sources": names} if names else {}))
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
