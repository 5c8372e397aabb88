"""What runs in each process of the pool: jobs in by a pipe, outcomes out."""

from __future__ import annotations

import signal
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
    torch.set_num_threads(1)
    try:
        engine = SequentialEngine(resolve(config), budget, torch.device(device), lambda: _leave_if_abandoned(pipe))
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


def _leave_if_abandoned(pipe: Connection) -> None:
    """The parent sends nothing while a job is under way, so anything to read is the end of the pipe."""
    if pipe.poll():
        raise SystemExit
