"""webdataset: tars whose members of one name but different endings make a sample; nothing is unpacked."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from qirl.data.images import Slice
from qirl.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("text", "prompt", "caption")  # keys of a .json that hold the prompt


def samples(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(key, {"text", "metadata", "image"}) of the samples of a tar, or of all that a pattern names, in their order.

    text: of the .txt, or of the .json under one of TEXTS, whose other keys are the metadata. Raises UserError for a file that
    is missing or no plain tar.
    """
    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not files:
        raise UserError(f"no file is called {path}; check the pattern")
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        _take(found, tar, member, file)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist; check the path") from None
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{file} is no plain tar ({error}); write it again, uncompressed") from None
    return list(found.items())


def _take(found: dict, tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> None:
    """One member into its sample."""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    sample = found.setdefault(f"{file.name}/{folder}/{stem}", {"text": "", "metadata": {}, "image": None})
    ending = ending.lower()
    if ending in IMAGES:
        sample["image"] = Slice(file, member.name, member.offset_data, member.size)
    elif ending == "txt":
        sample["text"] = tar.extractfile(member).read().decode("utf-8", "replace")
    elif ending == "json":
        try:
            values = json.loads(tar.extractfile(member).read())
        except ValueError:
            values = None
        if isinstance(values, dict):
            text = next((values[key] for key in TEXTS if isinstance(values.get(key), str)), "")
            sample["text"] = sample["text"] or text
            sample["metadata"] = {key: value for key, value in values.items() if key not in TEXTS}
