"""Rewards from the shell: `qirl reward score` and `qirl reward check`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qirl.config import ServeConfig
from qirl.config_sections import Scoring
from qirl.data.images import read_image
from qirl.data.lines import parse_object, read_lines, told_at
from qirl.errors import UserError
from qirl.rewards.attacks import ATTACKS
from qirl.rewards.protocol import Sample, Scores
from qirl.rewards.registry import build
from qirl.rewards.scorer import score as score_with
from qirl.run.folder import check_writable, write_bytes

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")


def read_samples(path: str | Path) -> tuple[list[Sample], list[str]]:
    """(samples, their names). A folder's images have the text of NAME.txt beside them as prompt, or none; a .jsonl file has
    one object a line: {"image", "prompt"?, "category"?, "sources"?, "metadata"?}, paths relative to the file.

    Raises UserError for an input without images, and for a line or an image that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        given = [{"image": p.name, "prompt": _text(p.with_suffix(".txt"))} for p in images]
        root = path
    elif path.suffix == ".jsonl" and path.is_file():
        given, root = [_line(path, *numbered) for numbered in read_lines(path, "sample file")], path.parent
    else:
        raise UserError(f"{path} is no folder and no .jsonl file; give images one way or the other")
    if not given:
        raise UserError(f"{path} has no image to score")
    samples = []
    for i, own in enumerate(given):
        sources = tuple(read_image(root / source) for source in own.get("sources", ()))
        prompt, category = own.get("prompt", ""), own.get("category", "general")
        samples.append(
            Sample(i, i, prompt, read_image(root / own["image"]), category, sources, own.get("metadata", {}))
        )
    return samples, [own["image"] for own in given]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _line(path: Path, number: int, line: str) -> dict:
    kinds = {"image": str, "prompt": str, "category": str, "sources": list, "metadata": dict}
    with told_at(path, number):
        own = parse_object(line, '{"image": "out.png", "prompt": "a red 7"}')
        if "image" not in own:
            raise UserError("there must be an image")
        for name, value in own.items():
            if name not in kinds:
                raise UserError(f"'{name}' is no field; there are {', '.join(kinds)}")
            if not isinstance(value, kinds[name]):
                raise UserError(f"{name}={value!r} must be of type {kinds[name].__name__}")
        if not all(isinstance(source, str) for source in own.get("sources", ())):
            raise UserError(f"sources={own['sources']!r} must list paths")
    return own


def score(config: ServeConfig, given: str, out: str | None = None) -> tuple[Path, list[Scores]]:
    """Scores of every image into JSON lines {"image", "scores"}: the file, and the scores (NaN where scoring failed)."""
    samples, names = read_samples(given)
    source = Path(given)
    path = Path(out) if out else (source / "scores.jsonl" if source.is_dir() else source.with_suffix(".scores.jsonl"))
    check_writable(path.parent)
    rows = score_with(build(config.rewards, config.serve.device), samples, Scoring(timeout=config.serve.timeout))
    lines = [
        json.dumps({"image": name, "scores": {k: None if math.isnan(v) else v for k, v in row.items()}})
        for name, row in zip(names, rows, strict=True)
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path, rows


def check(config: ServeConfig, given: str) -> dict[str, dict[str, tuple[float, float]]]:
    """{component: {attack: (mean score, share of the real images that score no higher)}}; "real" is the images themselves.

    Every attack is made of every real sample, whose prompt and sources it keeps. An attack that does not apply (a copied
    source where nothing is edited) is left out.
    """
    samples, _ = read_samples(given)
    rewards = build(config.rewards, config.serve.device)
    scoring = Scoring(timeout=config.serve.timeout)
    real = score_with(rewards, samples, scoring)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in sorted({name for row in real for name in row}):
        found[name] = {"real": (_mean([row.get(name, math.nan) for row in real]), math.nan)}
    for attack, make in ATTACKS.items():
        made = [(i, image) for i, sample in enumerate(samples) if (image := make(sample)) is not None]
        if not made:
            continue
        rows = score_with(rewards, [replace(samples[i], image=image) for i, image in made], scoring)
        for name in found:
            values = [row.get(name, math.nan) for row in rows]
            found[name][attack] = (_mean(values), beaten(values, [row.get(name, math.nan) for row in real]))
    return found


def beaten(values: Sequence[float], real: Sequence[float]) -> float:
    """The mean share of `real` that a value beats, ties counted half; NaN where either has none."""
    a, b = (np.array([v for v in own if not math.isnan(v)]) for own in (values, real))
    if not len(a) or not len(b):
        return math.nan
    return float(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())


def _mean(values: Sequence[float]) -> float:
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan
