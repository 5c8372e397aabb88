"""What runs in each process of the pool: jobs in by a pipe, outcomes out."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from recipefuzz.config import Config
from recipefuzz.engines.fused import FusedEngine
from recipefuzz.engines.memory import keep_freed_memory
from recipefuzz.engines.processes import leave_with_parent
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import RecipefuzzError
from recipefuzz.peak import megabytes
from recipefuzz.targets.resolve import resolve
from recipefuzz.verdict import Budget

# after a device-side assert, say, every call that follows fails: newer torch has a class for it, older only the message
DEVICE_LOST = ("AcceleratorError", "RuntimeError: CUDA error")


def serve(pipe: Connection, config: Config, budget: Budget, device: str) -> None:
    """Train what comes in until the pipe is closed. Ctrl-C is the parent's business.

    The parent sends a number of lanes (0: the sequential engine) and what is ahead; then lists of jobs, each with
    whether they are to be trained without lanes. With outcomes goes whether they are this process's last (after some
    errors a GPU is lost to the process), and what the user is to be told.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        task = resolve(config)
    except RecipefuzzError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        lanes, ahead = pipe.recv()
        on, notes = torch.device(device), list[tuple[str, str]]()
        alone = SequentialEngine(task, budget, on)
        engine = (
            FusedEngine(task, budget, on, alone, lanes, ahead, lambda *note: notes.append(note)) if lanes else alone
        )
        _serve(pipe, engine, alone, notes)


def _serve(
    pipe: Connection, engine: FusedEngine | SequentialEngine, alone: SequentialEngine, notes: list[tuple[str, str]]
) -> None:
    while True:
        while pipe.poll(None if engine.load == alone.load == 0 else 0):
            jobs, apart = pipe.recv()
            for job in jobs:
                (alone if apart else engine).submit(job)
        outcomes = (alone if alone.load else engine).advance()
        leaves = any(outcome.error.startswith(DEVICE_LOST) for outcome in outcomes)
        if outcomes or notes:
            peak = megabytes()
            pipe.send(([replace(outcome, peak=peak) for outcome in outcomes], leaves, notes))
            notes.clear()
        if leaves:
            return
