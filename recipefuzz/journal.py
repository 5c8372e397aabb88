"""An append-only file of JSON lines, written in batches, that survives a kill at any moment and a full disk.

It keeps Optuna's journal format, so `optuna.storages.JournalStorage` works on top of it and other programs of Optuna's
can read the file. Optuna's own file backend locks, writes and syncs once for each parameter of each trial, and appends
to a torn last line, which damages the file; this one buffers until `flush`, and cuts a torn batch off first. A batch
counts as a whole or not at all, so that what it holds (a trial with all its values, say) is never half there: the last
entry of each bears a mark, which Optuna ignores.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipefuzz.errors import InputError, Place, RunFailedError

try:
    import fcntl
except ImportError:  # Windows: no lock, so starting two searches in one folder is not noticed
    fcntl = None  # type: ignore[assignment]


LOCK_TRIES = 10
SYNC_SECONDS = 1.0  # of results that a power cut may take; a sync takes milliseconds, as long as some trials
ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # json.dumps makes one at every call
END = "end"  # the key that marks the last entry of a batch


class Journal:
    """The journal of one run, held by one writer at a time.

    Args:
        path: the file; made if it is to be written.
        write: take the lock and cut off a torn batch. Readers take no lock and skip it.

    Raises:
        InputError: another process writes it, or a line in the middle is no JSON.
        RunFailedError: the file can't be opened.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._pending: list[str] = []
        self._synced, self._unsynced = -math.inf, False
        self._file = self._open_locked() if write else None
        try:
            self._held, self._size = _read(path)
            self._read_to = 0, self._size  # the entries that were handed out, and the bytes that were read
            if self._file is not None:
                self._file.truncate(self._size)
        except BaseException:
            self.close()
            raise

    def _open_locked(self) -> Any:
        try:
            file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot("open", self.path, error) from error
        if fcntl is None:
            return file
        try:
            _lock(file)
        except BlockingIOError as error:
            file.close()
            raise at_work(self.path.parent) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise _cannot("lock", self.path, error) from error
        return file

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Entries from that one on, the pending ones too. They are on disk alone: of a long study they are many."""
        if log_number_from < self._read_to[0]:
            self._held, self._read_to = [], (0, 0)
        number, offset = self._read_to
        logs = self._held + self._written_since(offset)
        self._held, self._read_to = [], (number + len(logs), self._size)
        return [*logs, *map(json.loads, self._pending)][log_number_from - number :]

    def _written_since(self, offset: int) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(offset)
            lines = file.read(self._size - offset).splitlines(keepends=True)
        return _entries(lines) or []

    def append_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        """Add entries; the next `flush` writes them."""
        for log in logs:
            self._pending.append(ENCODER.encode(log))

    def flush(self, *, sync: bool = True) -> None:
        """Write all entries added since in one piece.

        No kill can take them then. A power cut can until they are synced: by `close`, or by this, with `sync`, if
        the last sync was SYNC_SECONDS ago; so fast trials share one, and of slow ones each has its own.

        Raises:
            RunFailedError: the disk is full or gone. Nothing of the batch is left in the file.
        """
        if not self._pending or self._file is None:
            return
        *rest, last = self._pending
        data = "\n".join([*rest, f'{last[:-1]},"{END}":true}}', ""]).encode()
        try:
            self._file.truncate(self._size)  # where that failed after a failed write
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            self._unsynced = True
            if sync and time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise _cannot("write", self.path, error) from error
        self._size += len(data)
        self._pending.clear()

    def _sync(self, file: Any) -> None:
        os.fsync(file.fileno())
        self._synced, self._unsynced = time.monotonic(), False

    def close(self) -> None:
        """Sync what was written, and let go of the file.

        Raises:
            RunFailedError: the disk is gone.
        """
        if self._file is None or self._file.closed:
            return
        with self._file as file:
            try:
                if self._unsynced:
                    self._sync(file)
            except OSError as error:
                raise _cannot("write", self.path, error) from error


def _lock(file: Any) -> None:
    """Take the lock; `status` holds it for an instant to see whether it is free, so once is not enough."""
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Whether a writer holds the journal."""
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


def at_work(folder: Path) -> InputError:
    return InputError(
        "another recipefuzz is at work in this run",
        place=Place(str(folder)),
        fix="wait for it (recipefuzz status shows it), stop it, or give this study another name",
    )


def _cannot(verb: str, path: Path, error: OSError) -> RunFailedError:
    kept = "everything finished before is kept; make room and run the same command again"
    fix = kept if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return RunFailedError(f"can't {verb} the run's journal: {error.strerror}", place=Place(str(path)), fix=fix)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Entries of the file, and the bytes that they take. A torn last batch is not counted."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise _cannot("read", path, error) from error
    if lines and _entry(lines[-1]) is None:
        lines.pop()
    logs = _entries(lines)
    if logs is None:
        number, line = next((n, line) for n, line in enumerate(lines, start=1) if _entry(line) is None)
        raise InputError(
            "the run's journal is damaged: this line is no entry",
            place=Place(str(path), number),
            found=line[:60],
            fix="restore the file from a copy, or start again with --fresh (the old folder is kept)",
        )
    ends = (n for n in range(len(logs), 0, -1) if END in logs[n - 1])
    whole = next(ends, len(logs))  # no marks: written by Optuna, or cut in its first batch
    return logs[:whole], sum(map(len, lines[:whole]))


def _entries(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """All lines parsed at once, which takes half the time; None if one of them is no entry."""
    try:
        logs = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):  # the latter where brackets are nested a thousand deep
        return None
    good = len(logs) == len(lines) and all(isinstance(log, dict) and "op_code" in log for log in logs)
    return logs if good else None


def _entry(line: bytes) -> dict[str, Any] | None:
    logs = _entries([line]) if line.endswith(b"\n") else None
    return logs[0] if logs else None
