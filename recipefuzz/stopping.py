"""How a worker is told to stop: by a signal, of which SLURM and others send several.

SIGTERM comes with preemption, `scancel` and the end of a time limit, SIGUSR1 or SIGUSR2 some time before where the job
asked for it. The work stops at the next moment at which nothing is half done; what else the signal was to do
(submitit's handler puts the job back into the queue) is done after that, by `pass_on`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Self, TypeVar

SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if name in signal.Signals.__members__]

T = TypeVar("T")


class StoppedError(BaseException):
    """In the midst of what a signal ended. No `Exception`: users' code must not catch it."""


class Stop:
    """Listens for the signals while it is entered; in threads other than the main one, Python allows no handlers.

    Attributes:
        signal: that has come.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._may_raise = False

    def __enter__(self) -> Self:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if self._may_raise:
            self._may_raise = False  # once: another signal must not end what the first has to be followed by
            raise StoppedError

    def unless_told(self, what: Callable[[], T]) -> T | None:
        """Do what can be left at any moment; a signal ends it, or keeps it from being begun: then None."""
        done = None
        with contextlib.suppress(StoppedError):
            try:
                self._may_raise = True
                if self.signal is None:
                    done = what()
            finally:  # within: a signal may come at its first instruction, too
                self._may_raise = False
        return done

    def sleep(self, seconds: float) -> None:
        """At most until a signal comes."""
        self.unless_told(partial(time.sleep, seconds))

    def pass_on(self) -> None:
        """Let whoever listened before hear the signal too. After the `with`."""
        if self.signal is not None and callable(before := self._before[self.signal]):
            before(self.signal, None)
