"""The small networks behind the built-in rewards: trained once, then loaded from the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from qirl.errors import UserError


def trained_once(
    cache_dir: str | Path, name: str, arguments: dict, modules: Sequence[ModuleType], train: Callable[..., Any], load
) -> Any:
    """train(**arguments), which can `save` itself, or load(path) where that was done before.

    The file's name holds a hash of the arguments and of the source of `modules`, the code that decides the weights.
    Raises UserError if the cache cannot be written.
    """
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    digest = hashlib.sha256(json.dumps([arguments, *sources]).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{name}_{arguments['part']}_{digest}.safetensors"
    if path.exists():
        return load(path)
    network = train(**arguments)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        network.save(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        what = name.replace("_", " ")
        raise UserError(f"cannot write the {what} to {path.parent} ({error}); choose a writable folder") from None
    return network
