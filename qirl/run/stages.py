"""Which run folders a report is about, and what their evaluations found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qirl.errors import UserError
from qirl.run.probes import CALIBRATION, LEDGER, is_probe


def stages_of(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Stage name to run folder, for run folders and for folders that hold some: probes, then the others as they were started.

    Raises UserError for a folder that is neither.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if (folder / "metrics.jsonl").exists() or is_probe(folder):
            found.append(folder)
            continue
        inside = [log.parent for log in folder.glob("*/metrics.jsonl")]
        probes = {log.parent for name in (LEDGER, CALIBRATION) for log in folder.glob(f"*/{name}")} - set(inside)
        if not inside and not probes:
            raise UserError(f"{folder} holds no run (no metrics.jsonl in it or one level below); check the path")
        found += sorted(probes)
        found += sorted(inside, key=lambda run: (run / "config.yaml").stat().st_mtime)
    names = [run.resolve().name for run in found]
    return {name if names.count(name) == 1 else str(run): run for name, run in zip(names, found, strict=True)}


def summary_of(folders: Sequence[str | Path], stages: Mapping[str, Path]) -> dict[str, Any] | None:
    """The summary.json of a folder, or one made of the runs' evaluation.json, each at its best guidance; else None.

    Raises UserError for a broken file.
    """
    for folder in folders:
        if (path := Path(folder) / "summary.json").exists() and not (Path(folder) / "metrics.jsonl").exists():
            return _read(path)
    made = {}
    for name, run in stages.items():
        if (path := run / "evaluation.json").exists():
            results = _read(path).get("guidance") or {}
            best = max(results, key=lambda scale: results[scale]["judge_accuracy"], default=None)
            made |= {} if best is None else {name: {"guidance": float(best), **results[best]}}
    return {"stages": made} if made else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is truncated or no JSON object; delete it, or write it again by `qirl evaluate`")
    return value
