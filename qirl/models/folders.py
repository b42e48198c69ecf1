"""Where models lie: a folder of diffusers, a pipeline, a finished run, or the hub; and what a folder says of its world."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qirl.errors import UserError
from qirl.paths import HUB

WORLD_FILE = "qirl.json"


def find_model(path: str) -> Path:
    """The diffusers folder meant by `path`: itself, the model/ of a finished run, the transformer/ of a pipeline, or one of
    these at hf://OWNER/NAME of the hub."""
    folder = local(path)
    for candidate in (folder, folder / "model", folder / "transformer"):
        if (candidate / "config.json").exists():
            return candidate
    hub = f", or {HUB}{path} for the hub's" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not folder.exists() else ""
    raise UserError(f"{path} holds no model (no config.json, no model/ of a finished run); check model.path{hub}")


def local(path: str) -> Path:
    """`path` itself, or for hf://OWNER/NAME (and @REVISION) the folder in the local cache, fetched if it is not there.

    Raises UserError for a name that the hub does not have, and where it cannot be asked.
    """
    if not path.startswith(HUB):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=["*.bin", "*.pt", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is not in the local cache and cannot be fetched ({reason}); check name and network"
        ) from None


def world_facts(folder: Path) -> dict:
    """What a model folder says of its world; another system's folder says nothing and is assumed to know guidance.

    Raises UserError for a damaged file and for a text_dim or unconditional of another type.
    """
    path = folder / WORLD_FILE
    try:
        facts = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is truncated or damaged; copy the model folder again")
    for name, kind, what in (("text_dim", int, "a whole number"), ("unconditional", bool, "true or false")):
        if type(facts.get(name, kind())) is not kind:
            raise UserError(f"{path}: {name}={facts[name]!r} must be {what}; copy the model folder again")
    return facts
