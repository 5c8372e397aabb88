"""How the writers of a file keep apart.

The kernel's lock is let go of when its holder dies, however it dies. On NFS it reaches other machines unless the mount
says otherwise; where it does not, `run.lock: file` takes one that is a file of its own: Optuna's, made with O_EXCL,
which NFS since version 3 does for all machines alike. A holder that was killed leaves that one behind: then all wait
until it has not changed for GRACE_SECONDS.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from recipefuzz.errors import InputError, Place

try:
    import fcntl
except ImportError:  # Windows: no lock, so starting two searches in one folder is not noticed
    fcntl = None  # type: ignore[assignment]

MOUNTS = Path("/proc/self/mountinfo")
GRACE_SECONDS = 30
FIRST_PAUSE, GROWTH, LONGEST_PAUSE = 0.0005, 1.5, 0.05  # seconds between looks whether a lock is free: a turn's length
LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock"}  # of an NFS mount: the lock reaches this machine alone
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock(StrEnum):
    KERNEL = "kernel"
    FILE = "file"


class BusyError(Exception):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, lock: Lock, seconds: float) -> Iterator[None]:
    """Hold a file's lock.

    Args:
        seconds: to wait for it.

    Raises:
        BusyError: another process holds it for longer.
        OSError: the disk is full, or the file is gone.
        InputError: the filesystem has no such lock.
    """
    if lock is Lock.FILE:
        with _by_file(path):
            yield
    elif fcntl is None:
        yield
    else:
        with path.open("rb+") as file:
            _take(file.fileno(), path, seconds)
            yield


def _take(file: int, path: Path, seconds: float) -> None:
    """Again and again: a lock that is waited for can't be given up."""
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise BusyError from error
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None if seconds < 1 else _refuse(path)
            raise
        time.sleep(pause)
        pause = min(pause * GROWTH, LONGEST_PAUSE)


def _refuse(path: Path) -> None:
    raise InputError(
        "the filesystem has no locks, which a run of several workers needs",
        place=Place(str(path)),
        fix="run: {lock: file} in the config",
    )


def require_reach(path: Path) -> None:
    """Refuse a kernel lock that other machines would not see.

    Raises:
        InputError: the mount says that its locks are local.
    """
    options = _mount_options(path.resolve(), MOUNTS.read_text() if MOUNTS.exists() else "")
    if local := LOCAL_OPTIONS & options:
        raise InputError(
            f"other machines don't see locks on this network filesystem: it is mounted with {', '.join(sorted(local))}",
            place=Place(str(path)),
            fix="run: {lock: file} in the config, or another folder",
        )


def _mount_options(path: Path, mounts: str) -> set[str]:
    """Of the NFS mount that holds the path; none for other filesystems. The format is in proc_pid_mountinfo(5)."""
    found: tuple[int, set[str]] = (-1, set())
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        at = mount.split()[4].replace("\\040", " ")
        kind, _, options = source.split()[:3]
        if path.is_relative_to(at) and len(at) >= found[0]:
            found = len(at), set(options.split(",")) if kind.startswith("nfs") else set()
    return found[1]


@contextmanager
def _by_file(path: Path) -> Iterator[None]:
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(path), grace_period=GRACE_SECONDS)
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # taken from us: we were away for longer than the grace
            lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the kernel's lock of a file."""
    if fcntl is None:
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
