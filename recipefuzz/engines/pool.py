"""A pool of worker processes, each running one of the other engines on one thread.

A worker that dies (out of memory, a crash in native code) or hangs costs the trial that did it and nothing else: the
standard library's ProcessPoolExecutor would give up every trial under way. Where several were under way in lanes, each
is run again by itself, and the one that does it again is found. Workers leave by themselves when the parent is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recipefuzz.config import Config
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Job, Outcome, once, structure
from recipefuzz.engines.processes import SAFE_PATH, apart_from_users_code
from recipefuzz.errors import RecipefuzzError, RunFailedError
from recipefuzz.stopping import SIGNALS
from recipefuzz.trace import Trace
from recipefuzz.verdict import Budget

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)
START_SECONDS = 300.0  # importing torch from a busy network file system takes a minute or two
POLL_SECONDS = 5.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
SIGNAL_SECONDS = 1.0  # until a signal has reached all processes of a job
FORKSERVER_GONE = 255  # what multiprocessing gives for the exit code then
ENDED_BY_JOB = (*(-s for s in (*SIGNALS, signal.SIGINT)), FORKSERVER_GONE)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    jobs: dict[tuple[int, int], Job] = field(default_factory=dict)
    alone: bool = False  # with its one job
    since: float = 0.0  # when it was last handed a job, or gave an outcome


class PoolEngine:
    """Workers on one machine; jobs go to whichever is free, and jobs of one structure to the same worker.

    Args:
        config: every worker loads the target from it by itself.
        devices: one worker each; "cpu" as often as there are to be workers.
        timeout: seconds a trial may take before its worker is killed; None for no limit.
        lanes: of the fused engine in each worker; 0 for the sequential engine; None if `use` is to tell.
        say: gets what users are told of the training, a line for each reason; called in `collect`.
    """

    def __init__(
        self,
        config: Config,
        budget: Budget,
        devices: list[str],
        timeout: float | None,
        lanes: int | None = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config, self._budget, self._timeout = config, budget, timeout
        warm_up(config.folder)
        self._devices = devices
        self.lanes, self._ahead = lanes or 0, Ahead()
        self._told = lanes is not None
        self._note = once(say)
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._suspects: deque[Job] = deque()
        self._workers: dict[int, _Worker] = {}
        # multiprocessing waits at exit for processes that are not daemons: these would wait for jobs for ever. A plain
        # atexit or weakref.finalize may come after that wait
        util.Finalize(self, _end_all, args=(self._workers,), exitpriority=0)
        for slot in range(len(devices)):
            self._workers[slot] = self._start(slot)

    def use(self, lanes: int, ahead: Ahead) -> None:
        """Train with the fused engine in so many lanes a worker, or with the sequential engine (0).

        Workers start before it is known: they take as long to start as the measuring that tells it.
        """
        self.lanes, self._ahead, self._told = lanes, ahead, True
        for worker in self._workers.values():
            with contextlib.suppress(OSError):
                worker.pipe.send((lanes, ahead))

    @property
    def _room(self) -> int:
        """Jobs that a worker holds at most: with lanes, some that wait for the next that is free."""
        return self.lanes + max(1, self.lanes // 4)

    def _start(self, slot: int) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        gpu = own_gpu(self._devices[slot], os.environ.get(VISIBLE))
        arguments = (theirs, self._config, self._budget, *gpu, os.environ.get(SAFE_PATH))
        # not a daemon: those may have no children, and the user's DataLoader has
        process = _CONTEXT.Process(target=_enter, args=arguments, daemon=False)
        with apart_from_users_code(self._config.folder):
            process.start()
        theirs.close()
        if self._told:
            ours.send((self.lanes, self._ahead))
        return _Worker(process, ours, since=time.monotonic())

    def submit(self, job: Job) -> None:
        self._waiting.setdefault(self._key(job), deque()).append(job)

    def _key(self, job: Job) -> Hashable:
        """Jobs of one key keep their order; without lanes, all do."""
        return structure(job.recipe) if self.lanes else None

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if not worker.ready or worker.alone:
                continue
            if self._suspects and not worker.jobs:
                self._give(worker, [self._suspects.popleft()], alone=True)
            elif not self._suspects:
                self._fill(worker)

    def _fill(self, worker: _Worker) -> None:
        """As many jobs as it has room for, of the structures that it has in training first."""
        free = self._room - len(worker.jobs)
        if free < self.lanes // 4 and worker.jobs:
            return
        own = {self._key(job) for job in worker.jobs.values()}
        jobs: list[Job] = []
        for key in sorted(self._waiting, key=lambda k: (k not in own, -len(self._waiting[k]))):
            while self._waiting[key] and len(jobs) < free:
                jobs.append(self._waiting[key].popleft())
        if jobs:
            self._give(worker, jobs)

    def _give(self, worker: _Worker, jobs: list[Job], *, alone: bool = False) -> None:
        try:
            worker.pipe.send((jobs, alone))
        except OSError:  # it died between two trials: seen in collect, and costs none
            self._take_back(jobs, alone=alone)
            return
        worker.jobs |= {(job.key, job.seed): job for job in jobs}
        worker.alone, worker.since = alone, time.monotonic()

    def _take_back(self, jobs: Iterable[Job], *, alone: bool) -> None:
        if alone:
            self._suspects.extendleft(jobs)
            return
        for job in jobs:
            self._waiting.setdefault(self._key(job), deque()).appendleft(job)

    def collect(self) -> list[Outcome]:
        """Wait for outcomes.

        Raises:
            RunFailedError: a worker can't be started.
        """
        self._hand_out()
        while self._suspects or any(self._waiting.values()) or any(w.jobs for w in self._workers.values()):
            # a pipe tells of no death while a process that the user's code forked holds its other end
            ends = [end for w in self._workers.values() for end in (w.pipe, w.process.sentinel)]
            ready = wait(ends, timeout=POLL_SECONDS)
            outcomes = [outcome for slot in list(self._workers) for outcome in self._check(slot, ready)]
            self._hand_out()  # before the caller sees to the outcomes: no worker waits for that
            if outcomes:
                return outcomes
        return []

    def _check(self, slot: int, ready: Sequence[object]) -> list[Outcome]:
        worker = self._workers[slot]
        if worker.pipe in ready:
            try:
                return self._receive(slot)
            except (EOFError, OSError):
                worker.process.join(timeout=POLL_SECONDS)
                return self._replace(slot, _death(worker.process))
        if worker.process.exitcode is not None:
            # what it sent just before it ended is read in the next round
            return [] if worker.pipe.poll() else self._replace(slot, _death(worker.process))
        if worker.jobs and self._timeout and time.monotonic() - worker.since > self._timeout:
            return self._replace(slot, f"timeout: not done after {self._timeout:g} s (trial.timeout)")
        if not worker.ready and time.monotonic() - worker.since > START_SECONDS:
            raise RunFailedError(f"a worker process did not start within {START_SECONDS:g} s")
        return []

    def _receive(self, slot: int) -> list[Outcome]:
        worker = self._workers[slot]
        message = worker.pipe.recv()
        if isinstance(message, RecipefuzzError):
            raise message
        if not worker.ready:
            worker.ready = True
            return []
        outcomes, leaves, notes = message
        for reason, line in notes:
            self._note(reason, line)
        if not (outcomes or leaves):
            return []
        for outcome in outcomes:
            del worker.jobs[outcome.job.key, outcome.job.seed]
        worker.alone, worker.since = False, time.monotonic()
        if leaves:  # at once, before it is handed a job that it won't read
            outcomes = [*outcomes, *self._replace(slot, "")]
        return list(outcomes)

    def _replace(self, slot: int, reason: str) -> list[Outcome]:
        """Start another worker. Of one job it is known that it was that one; of several, each is tried by itself."""
        worker = self._workers[slot]
        _end(worker)
        if not worker.ready:
            raise RunFailedError(f"a worker process ended while starting: {reason}")
        self._workers[slot] = self._start(slot)
        if len(worker.jobs) == 1 and (worker.alone or not self.lanes):
            (job,) = worker.jobs.values()
            return [Outcome(job, Trace(), None, error=reason, seconds=time.monotonic() - worker.since)]
        self._suspects.extend(worker.jobs.values())
        return []

    def close(self) -> None:
        _end_all(self._workers)
        self._waiting.clear()
        self._suspects.clear()


def _death(process: BaseProcess) -> str:
    """Why it ended; after a moment where that was a signal which a scheduler sends to all processes of a job.

    Then it is on its way to this one, too, which is to stop: the trial is not to blame.
    """
    if process.exitcode in ENDED_BY_JOB:
        time.sleep(SIGNAL_SECONDS)
    return died(process.exitcode)


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


def _enter(
    pipe: Connection, config: Config, budget: Budget, device: str, visible: str | None, safe_path: str | None
) -> None:
    if safe_path is None:  # ours, for starting: not for the scripts that the user's code may start
        os.environ.pop(SAFE_PATH, None)
    if visible is not None:
        os.environ[VISIBLE] = visible
    from recipefuzz.engines import worker

    worker.serve(pipe, config, budget, device)


def own_gpu(device: str, visible: str | None) -> tuple[str, str | None]:
    """A worker sees its own GPU alone: what users' code sends to "cuda" goes there, not all to the first.

    Args:
        device: "cuda:1" is the second of those that are visible here,
        visible: of which CUDA_VISIBLE_DEVICES says which they are, by numbers or names, where it is set.

    Returns:
        The device's name there, and CUDA_VISIBLE_DEVICES for it; None to leave that as it is.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return device, None
    here = [name.strip() for name in visible.split(",")] if visible else []
    return "cuda:0", here[int(index)] if here else index


def warm_up(folder: Path | None = None) -> None:
    """Start importing torch in the process that workers are forked from, while this one imports it too.

    Args:
        folder: the config's, if it may be on `sys.path` already.
    """
    if _METHOD == "forkserver":
        _CONTEXT.set_forkserver_preload(["recipefuzz.engines.preload"])
        with apart_from_users_code(folder):
            forkserver.ensure_running()


def cores() -> int:
    """Cores this process may use: fewer than the machine's under taskset, in a container or in a job of SLURM's.

    Not every cluster binds a job to its cores, but SLURM says how many they are.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(there, max(1, int(given))) if re.fullmatch("[0-9]{1,6}", given) else there
