"""One process writes a run folder at a time: a POSIX lock on its file .lock, which ends with the process that holds it.

The kernel drops the lock however the process ends, so none is ever left behind, and NFS servers keep it too. It belongs
to the process, not to a descriptor: opening and closing .lock again in the same process would drop it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

from qirl.errors import UserError

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: dict[tuple[int, Path], int] = {}  # (pid, folder): descriptor; a forked child holds no lock of its parent


def hold(folder: str | Path) -> None:
    """Locks an existing run folder for this process, until `release` or its end; again is nothing.

    .lock then says who: {"host", "pid", "since"}. Raises UserError if another process holds it. Warns, and goes on without
    a lock, where the file system has none.
    """
    key = _key(folder)
    if key in _held:
        return
    descriptor = os.open(key[1] / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, folder)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[key] = descriptor


def check_free(folder: str | Path) -> None:
    """Raises UserError if another process holds the run folder; creates nothing."""
    key = _key(folder)
    if key in _held or not (key[1] / NAME).exists():
        return
    descriptor = os.open(key[1] / NAME, os.O_RDWR | os.O_CLOEXEC)
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def release(folder: str | Path) -> None:
    """Gives the folder up, if this process holds it, and empties .lock."""
    descriptor = _held.pop(_key(folder), None)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _key(folder: str | Path) -> tuple[int, Path]:
    return os.getpid(), Path(folder).resolve()


def _lock(descriptor: int, folder: str | Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise UserError(
                f"{folder} is in use by {_owner(descriptor)}; wait for it or stop it, or choose another run.out"
            ) from None
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}): nothing stops a second process from writing there",
            stacklevel=3,
        )


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not signed yet
        return "another process"
