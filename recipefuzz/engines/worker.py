"""What runs in each process of the pool: jobs in by a pipe, outcomes out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

import torch

from recipefuzz.config import Config
from recipefuzz.engines.fused import FusedEngine
from recipefuzz.engines.memory import keep_freed_memory
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import RecipefuzzError
from recipefuzz.targets.resolve import resolve
from recipefuzz.verdict import Budget

# after a device-side assert, say, every call that follows fails: newer torch has a class for it, older only the message
DEVICE_LOST = ("AcceleratorError", "RuntimeError: CUDA error")


def serve(pipe: Connection, config: Config, budget: Budget, device: str) -> None:
    """Train what comes in until the pipe is closed. Ctrl-C is the parent's business.

    The parent sends a number of lanes (0: the sequential engine), then lists of jobs, each with whether they are to be
    trained without lanes. With outcomes goes whether they are this process's last: after some errors a GPU is lost to
    the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        task = resolve(config)
    except RecipefuzzError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        lanes = pipe.recv()
        alone = SequentialEngine(task, budget, torch.device(device))
        engine = FusedEngine(task, budget, torch.device(device), alone, lanes) if lanes else alone
        _serve(pipe, engine, alone)


def _serve(pipe: Connection, engine: FusedEngine | SequentialEngine, alone: SequentialEngine) -> None:
    while True:
        while pipe.poll(None if engine.load == alone.load == 0 else 0):
            jobs, apart = pipe.recv()
            for job in jobs:
                (alone if apart else engine).submit(job)
        outcomes = (alone if alone.load else engine).advance()
        leaves = any(outcome.error.startswith(DEVICE_LOST) for outcome in outcomes)
        if outcomes:
            pipe.send((outcomes, leaves))
        if leaves:
            return


def _leave_with_parent() -> None:
    """End this process when its parent has ended: in the midst of a trial, too, and of one that hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
