"""A run is a folder: the resolved config, metrics, samples, checkpoints, summary and report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from qirl.errors import UserError, nearest
from qirl.run import lock
from qirl.run.logs import plain

_RESUME = ("auto", "never", "always")
_SHOWN = 4


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity become null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def check_writable(path: str | Path) -> None:
    """Raises UserError if `path` is no folder to write into and cannot become one; creates nothing."""
    path = Path(path)
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        reason = f"{existing} is not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission to write in {existing}"
    else:
        return
    raise UserError(f"cannot write the run folder {path} ({reason}); choose another out folder")


class RunFolder:
    """The paths of a run. `open` creates or re-opens one; the constructor only names the paths.

    Files: config.yaml, metrics.jsonl, scores.jsonl, samples/, checkpoints/, summary.json, report.html.
    """

    def __init__(self, path: str | Path, writer: bool = True):
        self.path = Path(path)
        self.writer = writer
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.scores = self.path / "scores.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.risen: dict[str, tuple[Any, Any]] = {}  # key: (there before, now); known on the writer

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        resume: str = "auto",
        free_keys: Iterable[str] = (),
        writer: bool = True,
        rising_keys: Iterable[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Creates the folder with its config.yaml, or re-opens one that was made with the same `config`.

        config: the resolved config, nested and JSON-able. resume: "auto" continues a run if there is one,
        "never" refuses an existing run, "always" refuses a new one. free_keys: dotted keys (prefixes such as
        "run", patterns such as "rewards.*.servers") that may differ from config.yaml, which stays as it was. rising_keys: dotted keys whose number may be
        higher than in config.yaml, which is then written anew with all of `config`. defaults: what an option was where
        config.yaml does not name it, being older than that option. writer: true on rank 0; other ranks
        touch and check nothing, so let them pass a barrier before they use the folder. The folder stays locked for
        this process until `lock.release`.
        Raises UserError for a folder in use by another process, of another config, of something else than a run, or not writable.
        """
        folder = cls(path, writer)
        if writer:
            check = partial(cls.check, path, config, free_keys, resume, rising_keys, defaults)
            check()
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                lock.hold(folder.path)
                check()  # what another wrote before it let go
                folder._prepare(plain(config), tuple(rising_keys))
            except OSError as error:
                raise UserError(
                    f"cannot write the run folder {folder.path} ({error.strerror}); choose another out folder"
                ) from None
        return folder

    @classmethod
    def check(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        free_keys: Iterable[str] = (),
        resume: str = "auto",
        rising_keys: Iterable[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises the UserErrors of `open` and touches nothing, so that what is slow can come between the two."""
        if resume not in _RESUME:
            raise UserError(f"resume='{resume}' is not a way to resume{nearest(resume, _RESUME)}")
        folder = cls(path)
        check_writable(path)
        lock.check_free(path)
        folder._refuse(plain(config), resume, tuple(free_keys), tuple(rising_keys), plain(defaults or {}))

    def _refuse(
        self, config: dict[str, Any], resume: str, free: tuple[str, ...], rising: tuple[str, ...], defaults: dict
    ) -> None:
        if self.config.exists():
            if resume == "never":
                raise UserError(f"{self.path} already holds a run; choose another out folder, or resume it")
            self._compare(config, (*free, *self._risen(config, rising)), defaults)
        elif resume == "always":
            raise UserError(f"{self.path} holds no run to resume (no config.yaml); check the path")
        elif self.path.is_dir() and any(not _ours(name) for name in os.listdir(self.path)):
            raise UserError(f"{self.path} has files but no config.yaml, so it is no run folder; choose another")

    def _risen(self, config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
        """{key: (number in config.yaml, number in `config`)} of those of `keys` where it is higher in `config`."""
        known, given = flatten(read_config(self.config)), flatten(config)
        number = lambda value: isinstance(value, int | float)  # noqa: E731
        pairs = {key: (known.get(key), given.get(key)) for key in keys}
        return {k: (old, new) for k, (old, new) in pairs.items() if number(old) and number(new) and new > old}

    def _prepare(self, config: dict[str, Any], rising: tuple[str, ...]) -> None:
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        if self.config.exists() and self.begun:
            self.risen = self._risen(config, rising)
        if not self.config.exists() or not self.begun or self.risen:
            write_bytes(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    @property
    def begun(self) -> bool:
        """Whether there is anything to lose: a run that stopped before its first step may change its config."""
        logs = [path for path in (self.metrics, self.scores) if path.exists() and path.stat().st_size]
        return bool(logs) or any(self.checkpoints.glob("step_*"))

    def _compare(self, config: dict[str, Any], free_keys: tuple[str, ...], defaults: dict[str, Any]) -> None:
        known, given = flatten(read_config(self.config)), flatten(config)
        known = {key: value for key, value in flatten(defaults).items() if key in given} | known
        differences = [
            f"{key} ({_show(known, key)} there, {_show(given, key)} now)"
            for key in dict.fromkeys([*known, *given])
            if not any(fnmatchcase(key, free) or key.startswith(free + ".") for free in free_keys)
            and (key not in known or key not in given or known[key] != given[key])
        ]
        if differences and self.begun:
            more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UserError(
                f"{self.path} holds a run of another config: {', '.join(differences[:_SHOWN])}{more}; "
                "choose another out folder, or delete that one"
            )


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a run's config.yaml. Raises UserError if it is missing or not a YAML mapping."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}); restore or delete it") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping of options; restore or delete it")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one dict with dotted keys; lists stay values, and so do empty mappings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    text = json.dumps(flat[key], ensure_ascii=False, default=str) if key in flat else "absent"
    return text if len(text) <= 60 else text[:57] + "..."


def _ours(name: str) -> bool:
    """What may lie in a folder that became a run folder only half way, or that the system put there."""
    return name.startswith(".") or name.endswith(".tmp") or name in ("samples", "checkpoints")
