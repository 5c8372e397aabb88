"""A pool of worker processes, each running the sequential engine on one thread.

A worker that dies (out of memory, a crash in native code) or hangs costs its own trial and nothing else: the standard
library's ProcessPoolExecutor would give up every trial under way. Workers leave by themselves when the parent is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recipefuzz.config import Config
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.errors import RecipefuzzError, RunFailedError
from recipefuzz.trace import Trace
from recipefuzz.verdict import Budget

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)
START_SECONDS = 300.0  # importing torch from a busy network file system takes a minute or two
POLL_SECONDS = 5.0
SAFE_PATH = "PYTHONSAFEPATH"


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    job: Job | None = None
    since: float = 0.0


class PoolEngine:
    """Workers on one machine; jobs go to whichever is free.

    Args:
        config: every worker loads the target from it by itself.
        devices: one worker each; "cpu" as often as there are to be workers.
        timeout: seconds a trial may take before its worker is killed; None for no limit.
    """

    def __init__(self, config: Config, budget: Budget, devices: list[str], timeout: float | None) -> None:
        self._config, self._budget, self._timeout = config, budget, timeout
        warm_up(config.folder)
        self._devices = devices
        self._waiting: deque[Job] = deque()
        self._workers: dict[int, _Worker] = {}
        # multiprocessing waits at exit for processes that are not daemons: these would wait for jobs for ever. A plain
        # atexit or weakref.finalize may come after that wait
        util.Finalize(self, _end_all, args=(self._workers,), exitpriority=0)
        for slot in range(len(devices)):
            self._workers[slot] = self._start(slot)

    def _start(self, slot: int) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        arguments = (theirs, self._config, self._budget, self._devices[slot], os.environ.get(SAFE_PATH))
        # not a daemon: those may have no children, and the user's DataLoader has
        process = _CONTEXT.Process(target=_enter, args=arguments, daemon=False)
        with _apart_from_users_code(self._config.folder):
            process.start()
        theirs.close()
        return _Worker(process, ours, since=time.monotonic())

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self._hand_out()

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if self._waiting and worker.ready and worker.job is None:
                with contextlib.suppress(OSError):  # it died between two trials: seen in collect, and costs none
                    worker.pipe.send(self._waiting[0])
                    worker.job, worker.since = self._waiting.popleft(), time.monotonic()

    def collect(self) -> list[Outcome]:
        """Wait for outcomes.

        Raises:
            RunFailedError: a worker can't be started.
        """
        while self._waiting or any(w.job for w in self._workers.values()):
            # a pipe tells of no death while a process that the user's code forked holds its other end
            ends = [end for w in self._workers.values() for end in (w.pipe, w.process.sentinel)]
            ready = wait(ends, timeout=POLL_SECONDS)
            outcomes = [o for slot in list(self._workers) if (o := self._check(slot, ready)) is not None]
            self._hand_out()
            if outcomes:
                return outcomes
        return []

    def _check(self, slot: int, ready: Sequence[object]) -> Outcome | None:
        worker = self._workers[slot]
        if worker.pipe in ready:
            try:
                return self._receive(slot)
            except (EOFError, OSError):
                worker.process.join(timeout=POLL_SECONDS)
                return self._replace(slot, died(worker.process.exitcode))
        if worker.process.exitcode is not None:
            # what it sent just before it ended is read in the next round
            return None if worker.pipe.poll() else self._replace(slot, died(worker.process.exitcode))
        if worker.job and self._timeout and time.monotonic() - worker.since > self._timeout:
            return self._replace(slot, f"timeout: not done after {self._timeout:g} s (trial.timeout)")
        if not worker.ready and time.monotonic() - worker.since > START_SECONDS:
            raise RunFailedError(f"a worker process did not start within {START_SECONDS:g} s")
        return None

    def _receive(self, slot: int) -> Outcome | None:
        worker = self._workers[slot]
        message = worker.pipe.recv()
        if isinstance(message, RecipefuzzError):
            raise message
        if not worker.ready:
            worker.ready = True
            return None
        worker.job = None
        outcome, leaves = message
        assert isinstance(outcome, Outcome)
        if leaves:  # at once, before it is handed a job that it won't read
            self._replace(slot, "")
        return outcome

    def _replace(self, slot: int, reason: str) -> Outcome | None:
        worker = self._workers[slot]
        _end(worker)
        if worker.job is None:
            if not worker.ready:
                raise RunFailedError(f"a worker process ended while starting: {reason}")
            self._workers[slot] = self._start(slot)
            return None
        self._workers[slot] = self._start(slot)
        return Outcome(worker.job, Trace(), None, error=reason, seconds=time.monotonic() - worker.since)

    def close(self) -> None:
        _end_all(self._workers)
        self._waiting.clear()


def died(exitcode: int | None) -> str:
    """Why a worker's process ended, from its exit code."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else str(-exitcode)
        hint = ": probably out of memory" if name == "SIGKILL" else ""
        return f"killed: the worker process got {name}{hint}"
    return f"killed: the worker process ended with exit code {exitcode}"


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _end_all(workers: dict[int, _Worker]) -> None:
    for worker in workers.values():
        _end(worker)
    workers.clear()


def _enter(pipe: Connection, config: Config, budget: Budget, device: str, safe_path: str | None) -> None:
    if safe_path is None:  # ours, for starting: not for the scripts that the user's code may start
        os.environ.pop(SAFE_PATH, None)
    from recipefuzz.engines import worker

    worker.serve(pipe, config, budget, device)


def warm_up(folder: Path | None = None) -> None:
    """Start importing torch in the process that workers are forked from, while this one imports it too.

    Args:
        folder: the config's, if it may be on `sys.path` already.
    """
    if _METHOD == "forkserver":
        # torch's optimizers import torch._dynamo at their first step: a second, once instead of in each worker
        _CONTEXT.set_forkserver_preload(["recipefuzz.engines.worker", "torch._dynamo"])
        with _apart_from_users_code(folder):
            forkserver.ensure_running()


@contextlib.contextmanager
def _apart_from_users_code(folder: Path | None) -> Iterator[None]:
    """Start processes without running the user's script again in each of them, or a `random.py` beside the config.

    Workers need nothing of `__main__`; multiprocessing would import it, and a script that calls
    `recipefuzz.search` without an `if __name__ == "__main__"` would search within its own workers. Of `sys.path` they
    get the config's folder last, and the working directory not at all, which `python -c` would put first: the folder
    comes first only when the target is imported.
    """
    path, safe = sys.path.copy(), os.environ.get(SAFE_PATH)
    main = sys.modules["__main__"]
    saved: dict[str, Any] = {n: main.__dict__.pop(n) for n in ("__file__", "__spec__") if n in main.__dict__}
    main.__spec__ = None
    sys.path.sort(key=lambda p: p == str(folder))
    os.environ[SAFE_PATH] = safe or "1"
    try:
        yield
    finally:
        sys.path[:] = path
        if safe is None:
            del os.environ[SAFE_PATH]
        main.__dict__.update(saved)


def cores() -> int:
    """Cores this process may use: fewer than the machine's under SLURM, taskset or a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
