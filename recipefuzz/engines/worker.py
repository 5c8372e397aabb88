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


def serve(pipe: Connection, config: Config, budget: Budget, device: str) -> None:
    """Train what comes in until the pipe is closed. Ctrl-C is the parent's business."""
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
            job = pipe.recv()
            pipe.send(engine.train(job))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _leave_with_parent() -> None:
    """End this process when its parent has ended: in the midst of a trial, too, and of one that hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
