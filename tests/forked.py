"""Commands of recipefuzz, each in a process of its own that is forked from one that has imported torch: in an instant.

Otherwise they are what a shell would start: a process group of their own, signals, exit codes, a log of what they say.
"""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "sklearn.datasets",
        "torch._dynamo",
        "psycopg",
        *(f"recipefuzz.{name}" for name in ("cli", "working", "report.terminal", "report.status")),
    ]
)


class Forked:
    """A command under way.

    Args:
        constants: of modules, by their full names, to be others than they are: shorter times, say.
        clock: hours by which its clock is wrong.
    """

    def __init__(
        self, arguments: list[str], log: Path, environment: Mapping[str, str], constants: Any, clock: float
    ) -> None:
        self.log = log
        log.touch()
        everything = os.environ | environment
        told = (arguments, str(log), everything, constants, clock)
        self._process = CONTEXT.Process(target=_run, args=told, daemon=True)
        self._process.start()
        self.pid = int(self._process.pid)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def _run(arguments: list[str], log: str, environment: dict[str, str], constants: dict[str, Any], clock: float) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    multiprocessing.current_process()._config["daemon"] = False  # those may have no children
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from recipefuzz import cli
    from recipefuzz.engines import pool

    torch.set_num_threads(1)
    pool.warm_up = lambda *_: None  # it would start another such server
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(sys.modules[module], constant, value)
    if clock:
        _set_clock(clock)
    sys.argv = ["recipefuzz", *arguments]
    cli.main()


def _set_clock(hours: float) -> None:
    """Not by libfaketime: under it, `time.sleep` fails in a process whose monotonic clock stays right."""
    from recipefuzz import leases, trial_log

    class Wrong(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
            return dt.datetime.now(tz) + dt.timedelta(hours=hours)

    right = time.time
    time.time = lambda: right() + 3600 * hours
    leases.datetime = trial_log.datetime = Wrong
