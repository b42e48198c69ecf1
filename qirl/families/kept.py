"""Conditions on disk: tensors as safetensors, the layout as JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from qirl.packing import Condition

TENSORS, LAYOUT = "condition.safetensors", "layout.json"


def write_condition(folder: Path, condition: Condition) -> None:
    tensors = {"text": condition.text, **{f"reference{i}": r for i, r in enumerate(condition.references)}}
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    (folder / LAYOUT).write_text(json.dumps(condition.layout))


def read_layout(folder: Path) -> tuple[tuple, ...]:
    return tuple(tuple(block) for block in json.loads((folder / LAYOUT).read_text()))


def read_condition(folder: Path, shared: bool) -> Condition:
    tensors = load_file(folder / TENSORS)
    layout = read_layout(folder)
    references = tuple(tensors[f"reference{i}"] for i in range(len(tensors) - 1))
    return Condition(tensors["text"], references, layout, shared)
