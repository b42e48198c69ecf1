"""Which files of a diffusers folder hold the weights: one file or the shards of an index, and their variants.

    diffusion_pytorch_model.safetensors                   one file
    diffusion_pytorch_model.safetensors.index.json        shards: the index names their files, nothing else is read
    diffusion_pytorch_model.fp16.safetensors              the variant fp16 in one file
    diffusion_pytorch_model.safetensors.index.fp16.json   its shards (older files: ....fp16.safetensors.index.json)

Source: `ModelMixin.save_pretrained(variant=...)` of diffusers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from qirl.errors import UserError

NAME = "diffusion_pytorch_model"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(rf"{NAME}(\.[\w-]+?)?-\d{{5}}-of-\d{{5}}(\.[\w-]+)?\.safetensors")
_SINGLE = re.compile(rf"{NAME}(?:\.(?P<variant>[\w-]+))?\.safetensors")
_INDEX = re.compile(
    rf"{NAME}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json|{NAME}\.(?P<old>[\w-]+)\.safetensors\.index\.json"
)


def weight_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """The files that hold the weights of `variant`; None: those without a variant, else the only one that there is.

    An index goes before a single file, as in diffusers. Raises UserError for a variant that is not there, several
    without a choice, a damaged index, a file that is missing, and weights that are pickles.
    """
    entry = entry_file(Path(folder), variant)
    files = _named(entry) if is_index(entry) else [entry]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} does not exist; copy the model folder again, or give one saved by diffusers")
    return files


def saved_files(folder: Path) -> list[Path]:
    """Every weight file and index in `folder`, whole or not, of any variant: what a new save replaces."""
    patterns = (_SINGLE, _SHARD, _INDEX)
    return [path for path in sorted(folder.iterdir()) if any(p.fullmatch(path.name) for p in patterns)]


def is_index(path: Path) -> bool:
    """Whether a file is called like an index of shards."""
    return _INDEX.fullmatch(path.name) is not None


def _variants(folder: Path) -> dict[str, Path]:
    """The index or else the single file of every variant; "" is the one without a name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := _SINGLE.fullmatch(path.name)) and not _SHARD.fullmatch(path.name):
            found.setdefault(match["variant"] or "", path)
        elif match := _INDEX.fullmatch(path.name):
            found[match["variant"] or match["old"] or ""] = path
    return found


def entry_file(folder: Path, variant: str | None = None) -> Path:
    """The index or single file of what `weight_files` reads; it may be missing. Raises its UserErrors of a choice."""
    found = _variants(folder)
    if variant is not None and variant in found:
        return found[variant]
    there = " and ".join(sorted(found) if "" not in found else ["no variant", *sorted(found.keys() - {""})])
    if variant is not None and found:
        raise UserError(f"{folder} has no weights of model.variant={variant}, it has {there}; choose one of those")
    if variant is None and "" in found:
        return found[""]
    if len(found) > 1:
        raise UserError(f"{folder} has the weights of several variants, {there}; choose one with model.variant")
    if found:
        return next(iter(found.values()))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise UserError(
            f"{folder} has its weights as pickles only ({pickles[0]}), which are never read because a pickle can run "
            "any code; if you trust it, convert it: diffusers.QwenImage21Transformer2DModel.from_pretrained("
            f"'{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')"
        )
    return folder / f"{NAME}.safetensors"


def _named(index: Path) -> list[Path]:
    """The files that an index names, all beside it."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        weight_map = None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is truncated or no index of shards; copy it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map gives '{tensor}' the file {json.dumps(file)}, which is no name of a safetensors "
                "file beside it; copy it again"
            )
    return [index.parent / file for file in sorted(set(weight_map.values()))]
