"""What runs in each process of the pool: jobs in by a pipe, outcomes out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

import torch

from recipefuzz.config import Config
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import RecipefuzzError
from recipefuzz.targets.resolve import resolve
from recipefuzz.verdict import Budget

# after a device-side assert, say, every call that follows fails: newer torch has a class for it, older only the message
DEVICE_LOST = ("AcceleratorError", "RuntimeError: CUDA error")


def serve(pipe: Connection, config: Config, budget: Budget, device: str) -> None:
    """Train what comes in until the pipe is closed. Ctrl-C is the parent's business.

    With each outcome goes whether it is this process's last: after some errors a GPU is lost to the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        engine = SequentialEngine(resolve(config), budget, torch.device(device))
    except RecipefuzzError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    while True:
        try:
            outcome = engine.train(pipe.recv())
            leaves = outcome.error.startswith(DEVICE_LOST)
            pipe.send((outcome, leaves))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        if leaves:
            return


def _leave_with_parent() -> None:
    """End this process when its parent has ended: in the midst of a trial, too, and of one that hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
