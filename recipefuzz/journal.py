"""The log of a study in a file: JSON lines, written in batches, that survive a kill at any moment and a full disk.

The format is that of Optuna's journal. Optuna's own file backend appends to a torn last line, which damages the file;
this one cuts a torn batch off first: the last entry of each bears a mark, which Optuna ignores. A batch is written at
an offset, so that a network filesystem that sends a write twice writes the same twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipefuzz.entry_log import END, Beat, Entry, EntryLog
from recipefuzz.errors import InputError, Place, RunFailedError
from recipefuzz.locks import BusyError, Lock, hold

SYNC_SECONDS = 1.0  # of results that a power cut may take; a sync takes milliseconds, as long as some trials
LOCK_SECONDS = 0.5  # `status` holds the lock for an instant to see whether it is free
SHARED_LOCK_SECONDS = 600.0  # a turn takes milliseconds, but its holder may have been suspended in it
BEATS = "workers"  # the folder of the workers' signs of life, beside the journal


class Journal(EntryLog):
    """The journal of one run.

    Args:
        path: the file; made if it is to be written.
        write: to write it, too. Unless it is shared, the lock is held until `close`. Readers take no lock.
        shared: with others who write in turn, each in `exclusive`.
        lock: how writers keep apart, see `locks`.

    Raises:
        InputError: another process writes it, or a line in the middle is no JSON.
        RunFailedError: the file can't be opened.
    """

    def __init__(self, path: Path, *, write: bool, shared: bool = False, lock: Lock = Lock.KERNEL) -> None:
        super().__init__()
        self.name = str(path)
        self._path, self._shared, self._lock = path, shared, lock
        self._synced, self._unsynced = -math.inf, False
        self._held = contextlib.ExitStack()
        self._file = self._open() if write else None
        try:
            if write and not shared:
                self._held.enter_context(self._locked(LOCK_SECONDS))
                self.catch_up()
                self._cut()
            elif not shared:
                self.catch_up()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        try:
            return os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise _cannot("open", self._path, error) from error

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        try:
            with hold(self._path, self._lock, seconds):
                yield
        except BusyError as error:
            raise at_work(self._path.parent) from error

    @property
    def _writes(self) -> bool:
        return self._file is not None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._shared:
            yield
            return
        with self._locked(SHARED_LOCK_SECONDS):
            self.catch_up()
            self._cut()
            yield

    def catch_up(self) -> None:
        logs, size = _whole(self._path, self._bytes(self._position), self._count, self._position)
        self._count, self._position = self._count + len(logs), self._position + size

    def _load(self, position: int) -> list[Entry]:
        lines = self._bytes(position)[: self._position - position].splitlines(keepends=True)
        return _entries(lines) or []

    def _bytes(self, position: int) -> bytes:
        try:
            with self._path.open("rb") as file:  # opened anew: a network filesystem then asks the server
                file.seek(position)
                return file.read()
        except OSError as error:
            raise _cannot("read", self._path, error) from error

    def _cut(self) -> None:
        """Take a torn batch off: its writer is dead, or it would hold the lock."""
        assert self._file is not None
        try:
            if os.fstat(self._file.fileno()).st_size > self._position:
                self._file.truncate(self._position)
        except OSError as error:
            raise _cannot("write", self._path, error) from error

    def _store(self, data: str, *, sync: bool) -> int:
        """A power cut can take it until it is synced: by `close`, or by this, if the last sync was SYNC_SECONDS ago.

        So fast trials share one sync, and of slow ones each has its own.
        """
        assert self._file is not None
        content, written = data.encode(), 0
        try:
            self._file.truncate(self._position)  # where that failed after a failed write
            self._file.seek(self._position)
            while written < len(content):
                written += self._file.write(content[written:])
            self._unsynced = True
            if sync and time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._position)
            raise _cannot("write", self._path, error) from error
        return self._position + written

    def _sync(self, file: Any) -> None:
        os.fsync(file.fileno())
        self._synced, self._unsynced = time.monotonic(), False

    def close(self) -> None:
        """Sync what was written, and let go of the file.

        Raises:
            RunFailedError: the disk is gone.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        with self._held, file:
            try:
                if self._unsynced:
                    self._sync(file)
            except OSError as error:
                raise _cannot("write", self._path, error) from error

    def beat(self, worker: str, mark: str, about: Mapping[str, Any] | None) -> None:
        """In a file of the worker's own, written over in place: a file that is replaced, network filesystems show late.

        Readers may find it half written: then it is another one than before, which is all that they want to know.
        """
        path = self._path.parent / BEATS / f"{worker}.json"
        try:
            if about is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(exist_ok=True)
                text = json.dumps({"mark": mark, "about": dict(about)}, indent=1)
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
                try:
                    os.ftruncate(file, os.pwrite(file, text.encode(), 0))
                finally:
                    os.close(file)
        except OSError as error:
            raise _cannot("write", path, error) from error

    def beats(self, workers: Iterable[str] | None = None) -> dict[str, Beat]:
        folder, found = self._path.parent / BEATS, {}
        for path in folder.glob("*.json") if workers is None else [folder / f"{worker}.json" for worker in workers]:
            with contextlib.suppress(OSError):  # it left meanwhile
                found[path.stem] = _beat(path.read_bytes(), max(0.0, time.time() - path.stat().st_mtime))
        return found


def _beat(content: bytes, silent: float) -> Beat:
    try:
        record = json.loads(content)
        return Beat(str(record["mark"]), dict(record["about"]), silent)
    except (ValueError, KeyError, TypeError, RecursionError):  # half written
        return Beat(content.decode(errors="replace"), {}, silent)


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


def _whole(path: Path, content: bytes, before: int, position: int) -> tuple[list[Entry], int]:
    """Entries of the whole batches that a part of the file holds, and the bytes that they take.

    Args:
        before: entries that precede the part, and
        position: the byte at which it begins.
    """
    lines = content.splitlines(keepends=True)
    if lines and _entry(lines[-1]) is None:
        lines.pop()
    logs = _entries(lines)
    if logs is None:
        number, line = next((n, line) for n, line in enumerate(lines, start=1) if _entry(line) is None)
        raise InputError(
            "the run's journal is damaged: this line is no entry",
            place=Place(str(path), before + number),
            found=line[:60],
            fix="restore the file from a copy, or start again with --fresh (the old folder is kept)",
        )
    ends = (n for n in range(len(logs), 0, -1) if END in logs[n - 1])
    unmarked = 0 if position else len(logs)  # no marks at all: written by Optuna, or cut in its first batch
    whole = next(ends, unmarked)
    return logs[:whole], sum(map(len, lines[:whole]))


def _entries(lines: list[bytes]) -> list[Entry] | None:
    """All lines parsed at once, which takes half the time; None if one of them is no entry."""
    try:
        logs = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        return None
    good = len(logs) == len(lines) and all(isinstance(log, dict) and "op_code" in log for log in logs)
    return logs if good else None


def _entry(line: bytes) -> Entry | None:
    logs = _entries([line]) if line.endswith(b"\n") else None
    return logs[0] if logs else None
