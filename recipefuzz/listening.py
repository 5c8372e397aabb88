"""Who hears how a run goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from recipefuzz.result import Phase, TrialResult


class Listener(Protocol):
    """Hears how the run goes."""

    def begin(self, phase: Phase, done: Iterable[TrialResult], total: int) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def say(self, line: str) -> None: ...


class Silent:
    """A listener for programs."""

    def begin(self, phase: Phase, done: Iterable[TrialResult], total: int) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def say(self, line: str) -> None: ...
