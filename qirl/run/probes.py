"""Run folders of `qirl curate` and `qirl calibrate`, which have a ledger and a calibration but no training log, as tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from qirl.errors import UserError
from qirl.run.folder import RunFolder
from qirl.run.logs import read

LEDGER, CALIBRATION = "ledger.jsonl", "calibration.json"


def is_probe(folder: str | Path) -> bool:
    """Whether a folder is one of a curation or a calibration and of no training."""
    folder = RunFolder(folder)
    return not folder.metrics.exists() and any((folder.path / name).exists() for name in (LEDGER, CALIBRATION))


def curation(folder: str | Path) -> dict[str, Any] | None:
    """Decisions by category: {"prompts", "reasons", "rows": [{"category", "kept", "dropped": [count by reason], "range"}]}.

    The last row is of all categories; range: the median of the decided prompts'. None where nothing was decided (yet).
    Raises UserError for a damaged ledger.
    """
    path = Path(folder) / LEDGER
    rows = [row for row in read(path) if row.get("decision")] if path.exists() else []
    if not rows:
        return None
    reasons = sorted({row["reason"] for row in rows if row["reason"]})
    found = []
    for name in [*sorted({row["category"] for row in rows}), None]:
        own = [row for row in rows if name in (None, row["category"])]
        count, ranges = Counter(row["reason"] for row in own), sorted(r["range"] for r in own if r["range"] is not None)
        entry = {"category": name or "all", "kept": count[None], "dropped": [count[reason] for reason in reasons]}
        found.append(entry | {"range": ranges[len(ranges) // 2] if ranges else None})
    return {"prompts": len(rows), "reasons": reasons, "rows": found}


def calibration(folder: str | Path) -> dict[str, Any] | None:
    """{"method", "categories": [{"name", "scale", "groups", "notes", "components": {name: {"weight", "wanted",
    "realised", ...}}}]}, or None where there is no calibration. Raises UserError for a damaged one."""
    path = Path(folder) / CALIBRATION
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        keys = ("scale", "groups", "notes", "components")
        own = [{"name": name, **{key: row[key] for key in keys}} for name, row in record["categories"].items()]
        return {"method": record["method"], "categories": own}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or no calibration; make it again with `qirl calibrate`") from None
