"""The log of a study: entries in one order, the same for all who read it. Where it is kept is told by its subclasses.

Entries are those of Optuna's journal, and a log is a backend of Optuna's, so `optuna.storages.JournalStorage` works on
top of it and other programs of Optuna's can read the study. Optuna's own backends write and sync once for each
parameter of each trial; this one buffers until `flush`. A batch counts as a whole or not at all, so that what it holds
(a trial with all its values, say) is never half there.

A log belongs to one writer, or it is shared: then everybody reads and writes it in turn, in `exclusive`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from recipefuzz.errors import InputError, Place, RecipefuzzError, RunFailedError

ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # json.dumps makes one at every call
END = "end"  # the key that marks the last entry of a batch, for whoever finds the batch cut

Entry = dict[str, Any]


@dataclass
class Cursor:
    """How far somebody has read: so many entries, of them `stored` up to `position`, the others while they waited."""

    seen: int = 0
    stored: int = 0
    position: int = 0


@dataclass(frozen=True)
class Beat:
    """A worker's last sign of life.

    Attributes:
        mark: another one at each beat.
        about: host, process and what else the worker tells of itself.
        silent: seconds since then, where clocks agree: to be shown, and not to be relied on.
    """

    mark: str
    about: Mapping[str, Any]
    silent: float


class TurnLostError(Exception):
    """Another wrote in what was to be this one's turn: it is to be begun anew."""


@contextmanager
def replayed(name: str) -> Iterator[None]:
    """Entries that somebody else may have written: whatever Optuna or we find wrong with them is one plain error.

    Args:
        name: of the log.
    """
    try:
        yield
    except RecipefuzzError:
        raise
    except Exception as error:
        raise InputError(
            f"the run's journal can't be replayed ({type(error).__name__}: {error})",
            place=Place(name),
            fix="restore the file from a copy, or start again with --fresh (the old folder is kept)",
        ) from error


def was_put_aside(name: str, where: str) -> RunFailedError:
    return RunFailedError(
        "another run is there now: this worker's was put aside, perhaps by --fresh",
        place=Place(name),
        fix=f"what was recorded is {where}; start workers of the new run if it needs any",
    )


class EntryLog(ABC):
    """Entries on disk, those that wait to be written, and the signs of life of those who write.

    Args:
        name: where it is, for messages.
        write: to write it, too.
    """

    def __init__(self, name: str, *, write: bool) -> None:
        self.name, self._write = name, write
        self._pending: list[str] = []
        self._count, self._position = 0, 0  # entries that are stored, and where they end
        self._optunas = Cursor()

    def read(self, cursor: Cursor) -> list[Entry]:
        """Entries that the reader has not seen, the pending ones too. They are on disk alone: of a long study, many."""
        if cursor.seen < self._count:
            logs = self._load(cursor.position)[cursor.seen - cursor.stored :]
            cursor.seen = self._count
        else:
            logs = []
        if cursor.seen == self._count:
            cursor.stored, cursor.position = self._count, self._position
        logs += map(json.loads, self._pending[cursor.seen - self._count :])
        cursor.seen = self._count + len(self._pending)
        return logs

    def read_logs(self, log_number_from: int) -> list[Entry]:
        """Entries from that one on, for Optuna."""
        if log_number_from < self._optunas.seen:
            self._optunas = Cursor()
        skip = log_number_from - self._optunas.seen
        return self.read(self._optunas)[skip:]

    def append_logs(self, logs: Iterable[Entry]) -> None:
        """Add entries; the next `flush` writes them."""
        for log in logs:
            self._pending.append(ENCODER.encode(log))

    def flush(self, *, sync: bool = True) -> None:
        """Write all entries added since in one piece. On return no kill can take them.

        Raises:
            RunFailedError: the disk is full or gone. Nothing of the batch is left.
        """
        if self._pending and self._write:
            *rest, last = self._pending
            data = "\n".join([*rest, f'{last[:-1]},"{END}":true}}', ""])
            self._position = self._store(data, sync=sync)
            self._count += len(self._pending)
            self._pending.clear()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone with the log: what others wrote is there to read on entering; what is added is written on leaving.

        Raises:
            TurnLostError: another wrote meanwhile.
            RunFailedError: the log can't be reached or written.
            After an error nothing of what was added is left; who has read it, begins with a new cursor.
        """
        with self._alone():
            try:
                yield
                self.flush()
            except BaseException:
                self._pending.clear()
                raise

    @abstractmethod
    def _load(self, position: int) -> list[Entry]:
        """Stored entries from there to `_position`."""

    @abstractmethod
    def _store(self, data: str, *, sync: bool) -> int:
        """Write a batch of lines; return where it ends."""

    @abstractmethod
    def catch_up(self) -> None:
        """Look what others wrote, without waiting for any of them: set `_count` and `_position`."""

    @abstractmethod
    def _alone(self) -> Any:
        """A context manager, in which nobody else writes: what others wrote before is known on entering."""

    @abstractmethod
    def beat(self, worker: str, mark: str, about: Mapping[str, Any] | None) -> None:
        """Leave a sign of life; with None, take the worker off the list."""

    @abstractmethod
    def beats(self, workers: Iterable[str] | None = None) -> dict[str, Beat]:
        """The last sign of life of each worker that has not left, or of those of some."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the log. A sign of life opens it again, as does a turn at a shared one."""
