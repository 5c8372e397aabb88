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
from typing import IO, Any

from recipefuzz.entry_log import END, Beat, Entry, EntryLog, TurnLostError, was_put_aside
from recipefuzz.errors import InputError, Place, RunFailedError
from recipefuzz.locks import BusyError, Lock, hold

SYNC_SECONDS = 1.0  # of results that a power cut may take; a sync takes milliseconds, as long as some trials
LOCK_SECONDS = 0.5  # `status` holds the lock for an instant to see whether it is free
SHARED_LOCK_SECONDS = 600.0  # a turn takes milliseconds, but its holder may have been suspended in it
MARK = f',"{END}":true}}\n'.encode()  # with which a batch ends: within one, no key of a nested object ends a line
WORKERS = "workers"  # the folder of the workers' signs of life, beside the journal


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
        super().__init__(str(path), write=write)
        self._path, self._shared, self._lock = path, shared, lock
        self._synced, self._unsynced = -math.inf, False
        self._tail = 0, b""  # read and not parsed yet, and where it begins
        self._torn = False  # whether there is more, of a batch that is not whole
        self._inode: tuple[int, int] | None = None  # of the file in the first turn
        self._held = contextlib.ExitStack()
        try:
            if write:
                self._path.touch()
            if write and not shared:
                self._held.enter_context(self._locked(LOCK_SECONDS))
            if not shared:
                self.catch_up()
            if write and not shared:
                self._mend()
        except OSError as error:
            self._held.close()
            raise _cannot("open", self._path, error) from error
        except BaseException:
            self._held.close()
            raise

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(hold(self._path, self._lock, seconds))
            except BusyError as error:
                raise at_work(self._path.parent) from error
            except OSError as error:
                raise _cannot("lock", self._path, error) from error
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._shared:
            yield
            return
        with self._locked(SHARED_LOCK_SECONDS):
            self._stay()
            self.catch_up()
            self._mend()
            yield
        self._sync_in_time()  # others need not wait for it

    def _stay(self) -> None:
        """Refuse to go on where the run was put aside: what is at the path belongs to another one."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise _cannot("read", self._path, error) from error
        place = status.st_dev, status.st_ino
        self._inode = self._inode or place
        if place != self._inode or status.st_size < self._position:
            raise was_put_aside(self.name, "in the folder beside it")

    def catch_up(self) -> None:
        content = self._bytes(self._position)
        count, size = _whole(content, first=not self._position)
        if size:
            self._tail = self._position, content[:size]
        self._count, self._position = self._count + count, self._position + size
        self._torn = len(content) > size

    def _load(self, position: int) -> list[Entry]:
        (start, content), self._tail = self._tail, (0, b"")
        if start != position or start + len(content) < self._position:  # or something was written since
            content = self._bytes(position)
        logs = _entries(content[: self._position - position])
        if logs is None:
            raise self._damaged()
        return logs

    def _damaged(self) -> InputError:
        lines = enumerate(self._bytes(0).splitlines(keepends=True), start=1)
        number, line = next(((number, line) for number, line in lines if not _entries(line)), (0, b""))
        return InputError(
            "the run's journal is damaged: this line is no entry",
            place=Place(str(self._path), number),
            found=line[:60],
            fix="restore the file from a copy, or start again with --fresh (the old folder is kept)",
        )

    def _bytes(self, position: int) -> bytes:
        try:
            with self._path.open("rb") as file:  # opened anew: a network filesystem then asks the server
                file.seek(position)
                return file.read()
        except OSError as error:
            raise _cannot("read", self._path, error) from error

    def _opened(self) -> IO[bytes]:
        return self._path.open("r+b", buffering=0)

    def _mend(self) -> None:
        """Take a torn batch off: its writer is dead, or it would hold the lock."""
        if self._torn:
            try:
                with self._opened() as file:
                    self._cut(file)
            except OSError as error:
                raise _cannot("write", self._path, error) from error

    def _cut(self, file: IO[bytes]) -> None:
        if os.fstat(file.fileno()).st_size > self._position:
            file.truncate(self._position)

    def _store(self, data: str, *, sync: bool) -> int:
        """The file is opened anew: by closing it a network filesystem's server has it, before another has its turn.

        A worker that was suspended in its turn may have lost its lock meanwhile: what others wrote then is not cut.
        """
        content, written = data.encode(), 0
        try:
            with self._opened() as file:
                if self._shared and os.fstat(file.fileno()).st_size != self._position:
                    raise TurnLostError
                self._cut(file)
                file.seek(self._position)
                try:
                    while written < len(content):
                        written += file.write(content[written:])
                except OSError:
                    with contextlib.suppress(OSError):
                        self._cut(file)
                    raise
        except OSError as error:
            raise _cannot("write", self._path, error) from error
        self._unsynced = True
        if sync and not self._shared:
            self._sync_in_time()
        return self._position + written

    def _sync_in_time(self) -> None:
        """A power cut can take what is written until it is synced: here, if the last time was SYNC_SECONDS ago.

        So fast trials share one sync, and of slow ones each has its own.
        """
        if self._unsynced and time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        try:
            with self._path.open("rb") as file:  # a sync is of the file, whoever wrote
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot("write", self._path, error) from error
        self._synced, self._unsynced = time.monotonic(), False

    def close(self) -> None:
        """Sync what was written, and let go of the file.

        Raises:
            RunFailedError: the disk is gone.
        """
        with self._held:
            if self._unsynced:
                self._sync()

    def beat(self, worker: str, mark: str, about: Mapping[str, Any] | None) -> None:
        """In a file of the worker's own, written over in place: a file that is replaced, network filesystems show late.

        Readers may find it half written: then it is another one than before, which is all that they want to know.
        """
        path = self._path.parent / WORKERS / f"{worker}.json"
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
        folder, found = self._path.parent / WORKERS, {}
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


def _whole(content: bytes, *, first: bool) -> tuple[int, int]:
    """Entries of the whole batches in a part of the file, and the bytes that they take; nothing is parsed for that.

    Args:
        first: it is the part with which the file begins.
    """
    if (mark := content.rfind(MARK)) >= 0:
        size = mark + len(MARK)
    elif first:  # no marks at all: written by Optuna, or cut in its first batch
        size = content.rfind(b"\n") + 1
        last = content.rfind(b"\n", 0, max(0, size - 1)) + 1
        size = size if _entries(content[last:size]) else last
    else:
        size = 0
    return content.count(b"\n", 0, size), size


def _entries(content: bytes) -> list[Entry] | None:
    """All lines parsed at once, which takes half the time; None if one of them is no entry."""
    try:
        logs = json.loads(b"[" + content.removesuffix(b"\n").replace(b"\n", b",") + b"]")
    except (ValueError, RecursionError):  # the latter where brackets are nested a thousand deep
        return None
    good = len(logs) == content.count(b"\n") and all(isinstance(log, dict) and "op_code" in log for log in logs)
    return logs if good else None
