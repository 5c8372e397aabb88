"""Who of a study's workers is still there.

Optuna's journal has no heartbeat (optuna 6615). Here each worker leaves a sign of life now and then, another mark each
time, and whoever looks judges by his own clock how long the mark has stayed the same. No clock is compared with another
one's, so one that is wrong by an hour does no harm. Who has left no sign at all is treated alike: on a network
filesystem a new file may show late.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from recipefuzz.entry_log import EntryLog
from recipefuzz.errors import RecipefuzzError

BEATS = 4  # signs of life in the time after which a silent worker counts as gone


class Watch:
    """Whose lease has lapsed.

    Args:
        lease: seconds.
        clock: seconds that have passed, from some moment on.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock = lease, clock
        self._since: dict[str, tuple[str, float]] = {}

    def lapsed(self, workers: Iterable[str], marks: Mapping[str, str]) -> set[str]:
        """Those of the workers whose mark has not changed for the length of a lease.

        Args:
            workers: who hold trials.
            marks: of the last sign of life of each; who is missing has left none.
        """
        now = self._clock()
        before, self._since = self._since, {}
        for worker in workers:
            mark = marks.get(worker, "")
            same = worker in before and before[worker][0] == mark
            self._since[worker] = before[worker] if same else (mark, now)
        return {worker for worker, (_, since) in self._since.items() if now - since >= self._lease}


class Heart:
    """Leaves signs of life from a thread of its own, until it is stopped.

    Args:
        log: a log of its own: a log is one thread's.
        about: told to whoever asks who is at work.
    """

    def __init__(self, log: EntryLog, worker: str, lease: float, about: Mapping[str, Any]) -> None:
        self._log, self._worker, self._pause = log, worker, lease / BEATS
        self._about = dict(about)
        self._stopped, self._arrived = threading.Event(), 0
        self._beat(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, **about: Any) -> None:
        """Say something else, from the next beat on."""
        self._about = self._about | about

    def clock(self) -> float:
        """Seconds in which signs of life have arrived: while a database is away, nobody's do, and no lease lapses."""
        return self._arrived * self._pause

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(self._pause):
            beats += 1
            # a disk that is full or a database that is away: it may be there again in time
            with contextlib.suppress(RecipefuzzError):
                self._beat(beats)

    def _beat(self, beats: int) -> None:
        self._log.beat(self._worker, str(beats), self._about)
        self._arrived += 1
        self._log.close()  # until the next one: connections to a database are few

    def stop(self) -> None:
        """Leave: others need not wait for the lease to lapse."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RecipefuzzError):
            self._log.beat(self._worker, "", None)
        self._log.close()


def new_worker() -> tuple[str, dict[str, Any]]:
    """A name that no other worker has, and what is to be known of this one."""
    about: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
    if job := os.environ.get("SLURM_JOB_ID"):
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        array = os.environ.get("SLURM_ARRAY_JOB_ID", job)
        about |= {"job": f"{array}_{task}" if task else job, "node": os.environ.get("SLURMD_NODENAME", "")}
    if gpus := os.environ.get("CUDA_VISIBLE_DEVICES"):
        about["gpus"] = gpus
    about["since"] = datetime.now(UTC).isoformat(timespec="seconds")
    host = "".join(c if c.isalnum() or c in "-_" else "-" for c in about["host"])[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}", about
