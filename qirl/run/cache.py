"""Things that are built once and kept by content: a trained base, a reward classifier."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qirl.errors import UserError
from qirl.run.logs import plain

try:
    import fcntl
except ImportError:  # no POSIX locks: two builders at once both build, the first rename wins
    fcntl = None


def folder() -> Path:
    """Where cached things lie: the environment variable QIRL_CACHE, or ~/.cache/qirl. Not created here."""
    return Path(os.environ.get("QIRL_CACHE") or Path.home() / ".cache" / "qirl").expanduser()


def content_key(*parts: Any) -> str:
    """sha256 (hex) of JSON-able `parts`; of a module, its source; of a package, every .py file in it.

    Mappings count by content, not by the order of their keys.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, ModuleType):
            for name, source in _sources(part):
                digest.update(f"module {name} {len(source)}\n".encode() + source)
        else:
            text = json.dumps(plain(part), sort_keys=True).encode()
            digest.update(f"json {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _sources(module: ModuleType) -> Iterator[tuple[str, bytes]]:
    if hasattr(module, "__path__"):
        for root in sorted(module.__path__):
            for path in sorted(Path(root).rglob("*.py")):
                yield path.relative_to(root).as_posix(), path.read_bytes()
    else:
        yield module.__name__, Path(module.__file__).read_bytes()


def _path(name: str, key: str) -> Path:
    return folder() / f"{name}-{key[:16]}"


def find(name: str, key: str) -> Path | None:
    """The folder `name`-`key` of the cache, None where there is none."""
    return own if (own := _path(name, key)).is_dir() else None


def cached_folder(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `name`-`key` of the cache; where there is none, `build(path)` fills an empty one first.

    Built under a temporary name and renamed, so what exists is complete. Of two processes that want the same
    thing, the second waits for the first. What `build` raises passes through and leaves nothing behind.
    Raises UserError if the cache cannot be written.
    """
    if there := find(name, key):
        return there
    final = _path(name, key)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = final.with_name(final.name + ".lock").open("a")
    except OSError as error:
        reason = f"cannot write the cache {folder()} ({error.strerror})"
        raise UserError(f"{reason}; set QIRL_CACHE to another folder") from None
    with lock, _locked(lock):
        if final.is_dir():
            return final
        if fcntl:  # what a killed builder left: nobody else builds while this process holds the lock
            for stale in final.parent.glob(final.name + ".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        temporary.mkdir()
        try:
            build(temporary)
            _rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _rename(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():  # another builder was first only where the target stands
            raise


@contextlib.contextmanager
def _locked(file) -> Iterator[None]:
    if fcntl:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
    yield
