"""Training state on disk: step_XXXXXX folders that are complete or absent, verified before a byte is loaded.

A checkpoint is what torch.distributed.checkpoint writes (each rank its shards, so it loads at another world
size), extra.json (counters and whatever else is JSON), and manifest.json with the size and CRC-32 of every
file and the dtype and shape of every tensor. It is written under step_XXXXXX.tmp and renamed, so a process
killed at any moment leaves the previous checkpoints usable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from qirl.errors import UserError
from qirl.run.folder import write_json

_NAME = re.compile(r"step_(\d+)(\.old)?")


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `folder`/step_XXXXXX and keeps the `keep` newest checkpoints (0: all). Called on every rank.

    tensors: names to Tensor or DTensor, nested mappings allowed, any dtype, kept bit for bit. A tensor that
    differs between ranks needs a name per rank. extra: JSON-able (NaN becomes null), stored from rank 0.
    Raises UserError, on every rank, if the disk is full or not writable.
    """
    folder = Path(folder)
    final, temporary = folder / f"step_{step:06d}", folder / f"step_{step:06d}.tmp"
    flat = flatten(tensors)
    fix = f"cannot write the checkpoint {final}; free disk space or choose another out folder"
    together(lambda: _clear(temporary) if _rank() == 0 else None, fix)
    together(lambda: _dcp(dcp.save, flat, temporary), fix)
    files = _exchange(sorted(os.listdir(temporary)) if _rank() == 0 else None)[0]
    sums = together(lambda: {name: _sum(temporary / name) for name in _share(files)}, fix)
    merged = {name: entry for part in sums for name, entry in part.items()}
    finish = partial(_finish, temporary, final, step, merged, extra or {}, keep)
    together(lambda: finish() if _rank() == 0 else None, fix)
    return final


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of `folder`, or None. Unfinished ones (.tmp) do not count."""
    found = _list(Path(folder))
    return found[-1] if found else None


def load(path: str | Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the checkpoint `path` into `tensors` in place and returns its `extra`. Called on every rank.

    tensors: as for `save`; any subset of the saved names, and another sharding than it was saved with.
    Raises UserError, on every rank and before any tensor changes, for a missing, truncated or altered file,
    an unknown name, another shape or dtype.
    """
    path = Path(path)
    flat = flatten(tensors)
    fix = f"cannot load the checkpoint {path}; {_remedy(path)}"
    found = []
    together(lambda: found.append(describe(path)), fix)
    together(lambda: _check(path, found[0], flat), fix)
    together(lambda: _dcp(dcp.load, flat, path), fix)
    return found[0]["extra"]


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: {"step", "extra", "files", "tensors": {name: {"dtype", "shape"}}}.

    Raises UserError if `path` is not a complete checkpoint.
    """
    path = Path(path)
    manifest = _read_json(path, "manifest.json")
    if not {"step", "files", "tensors"} <= manifest.keys():
        raise UserError(f"checkpoint {path}: manifest.json is not complete; {_remedy(path)}")
    if problem := _differs(path, "extra.json", manifest["files"].get("extra.json", {})):
        raise UserError(f"checkpoint {path}: {problem}; {_remedy(path)}")
    return {**manifest, "extra": _read_json(path, "extra.json")}


def adam_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, Any]:
    """The state of an Adam or AdamW as {parameter name: {"step", "exp_avg", "exp_avg_sq"}}, to save and load.

    Parameters that have no state yet get what their first step would start from, so that a new optimizer can
    be loaded into; one that never gets a gradient is not moved by that. Learning rates are not included.
    """
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                device = parameter.device if group.get("capturable") or group.get("fused") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                # torchao's has moments of its own kind, the first of them with a sign
                new = getattr(optimizer, "_new_buffer", lambda p, signed: torch.zeros_like(p))
                state["exp_avg"], state["exp_avg_sq"] = new(parameter, True), new(parameter, False)
                if group.get("amsgrad"):
                    state["max_exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            found[names[parameter]] = {part: own for name, value in state.items() for part, own in _inner(name, value)}
    return found


def _inner(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor by its name; one of torchao's, here or as the local part, by those that it is made of."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(local, "__tensor_flatten__"):
        return [(name, value)]
    return [(f"{name}.{part}", getattr(local, part)) for part in local.__tensor_flatten__()[0]]


def flatten(tensors: Mapping[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested mappings of tensors as one dict; levels are joined by "/"."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            part = flatten(value, f"{prefix}{key}/")
        else:
            assert isinstance(value, torch.Tensor), f"{prefix}{key} is a {type(value).__name__}, not a tensor"
            part = {f"{prefix}{key}": value}
        assert not flat.keys() & part.keys(), f"two tensors are called {sorted(flat.keys() & part.keys())}"
        flat.update(part)
    return flat


def _dcp(action: Callable[..., Any], flat: dict[str, torch.Tensor], path: Path) -> None:
    state = {name: tensor.detach() for name, tensor in flat.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")
        try:
            action(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(began := _began(cause), (KeyboardInterrupt, SystemExit)):  # Ctrl-C is no failure to write
                    raise began from None
            raise


def _finish(temporary: Path, final: Path, step: int, files: dict, extra: Mapping, keep: int) -> None:
    write_json(temporary / "extra.json", extra)
    files["extra.json"] = _sum(temporary / "extra.json")
    saved = dcp.FileSystemReader(temporary).read_metadata().state_dict_metadata
    tensors = {k: {"dtype": str(v.properties.dtype), "shape": list(v.size)} for k, v in saved.items()}
    write_json(temporary / "manifest.json", {"step": step, "files": files, "tensors": tensors})
    _sync(temporary)
    if final.exists():  # the same step again: at every moment one of the two stands
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    _sync(final.parent)
    found = _list(final.parent)
    for path in found[: max(0, len(found) - keep)] if keep > 0 else []:
        os.rename(path, path.with_name(path.name + ".tmp"))
    for path in [*final.parent.glob("step_*.tmp"), *final.parent.glob("step_*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _clear(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _list(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One set aside (.old) counts while its successor is not in place."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path  # reversed: "step_1" comes after "step_1.old" and wins
    return [found[step] for step in sorted(found)]


def _remedy(path: Path) -> str:
    found = _list(path.parent)
    names = [other.name for other in found[: found.index(path)]] if path in found else []
    return f"delete that folder to {f'resume from {names[-1]}' if names else 'start the run again'}"


def _check(path: Path, manifest: dict[str, Any], flat: Mapping[str, torch.Tensor]) -> None:
    files = manifest["files"]
    problems = [*_tensor_problems(manifest["tensors"], flat)]
    problems += [problem for name in _share(sorted(files)) if (problem := _differs(path, name, files[name]))]
    if problems:
        raise UserError(f"checkpoint {path}: {problems[0]}; {_remedy(path)}")


def _tensor_problems(saved: Mapping[str, Any], flat: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in flat.items():
        if name not in saved:
            yield f"no tensor is called '{name}' (it is of another model or config)"
        elif list(tensor.shape) != saved[name]["shape"]:
            yield f"'{name}' has shape {saved[name]['shape']}, the model needs {list(tensor.shape)}"
        elif str(tensor.dtype) != saved[name]["dtype"]:
            yield f"'{name}' is {saved[name]['dtype']}, the model needs {tensor.dtype}"


def _differs(path: Path, name: str, known: Mapping[str, int]) -> str | None:
    try:
        size = (path / name).stat().st_size
        if size != known.get("size"):
            return f"{name} has {size} bytes instead of {known.get('size')}"
        return f"{name} was altered (its checksum differs)" if _sum(path / name) != known else None
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problem = "is not a JSON object"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except ValueError:
        problem = "is truncated or not JSON"
    raise UserError(f"checkpoint {path}: {name} {problem}; {_remedy(path)}")


def _sum(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return {"size": file.tell(), "crc32": crc}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _share(names: list[str]) -> list[str]:
    """This rank's part of the files, so that no rank reads them all."""
    return names[_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _exchange(value: Any) -> list[Any]:
    """What every rank gave, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reason(error: BaseException) -> str:
    """What began it, in a line."""
    began = _began(error)
    return " ".join((str(began) or repr(began)).split())[:300]


def _began(error: BaseException) -> BaseException:
    """The first error: a full disk or Ctrl-C, where torch tells that its archive is not whole."""
    if isinstance(error, CheckpointException):
        error = next(cause for cause, _ in error.failures.values())
    while error.__context__ is not None:
        error = error.__context__
    return error


def together(action: Callable[[], Any], fix: str) -> list[Any]:
    """Runs `action` on every rank; if it fails on one, every rank raises the same error. A barrier too."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    except (OSError, CheckpointException) as error:
        problem = f"{fix} ({_reason(error)})"
    found = _exchange((result, problem))
    for _, problem in found:
        if problem:
            raise UserError(problem)
    return [result for result, _ in found]
