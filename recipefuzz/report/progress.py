"""A run's progress: a live bar in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from recipefuzz.recipe import shown
from recipefuzz.report.picture import COLORS, outcome
from recipefuzz.result import Phase, TrialResult

LOG_SECONDS = 10.0  # between lines where there is no terminal; longer as the run gets longer, see `_log`
TITLES = {Phase.SEARCH: "search", Phase.CONFIRM: "confirm"}


class Progress:
    """Counts by verdict, trials a second, time left, the best so far.

    Args:
        axes: names of the axes that are shown of the best recipe.
    """

    def __init__(self, console: Console, axes: Iterable[str]) -> None:
        self._console, self._axes = console, tuple(axes)
        self._live: Live | None = None
        self._best: TrialResult | None = None
        self._reset(Phase.SEARCH, 0)

    def _reset(self, phase: Phase, total: int) -> None:
        self._phase, self._total, self._done, self._new = phase, total, 0, 0
        self._counts: Counter[str] = Counter()
        self._start = self._last = time.monotonic()

    def begin(self, phase: Phase, done: Iterable[TrialResult], total: int) -> None:
        self._stop()
        self._reset(phase, total)
        if phase is Phase.SEARCH:  # the next of several searches
            self._best = None
        for result in done:
            self._count(result)
        if self._done:
            self._console.print(f"resuming: {self._done} of {total} {_runs(phase)} are done", style="dim")
        if total > self._done and self._console.is_terminal:
            # drawn by its own clock: at hundreds of trials a second most drawings would never be seen
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    def finished(self, result: TrialResult) -> None:
        self._count(result)
        self._new += 1
        if self._live is None:
            self._log()
        elif self._done >= self._total:
            self._stop()

    def say(self, line: str) -> None:
        self._console.print(line, style="dim")

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(self._line(), soft_wrap=True)

    def _count(self, result: TrialResult) -> None:
        self._done += 1
        self._counts[outcome(result)] += 1
        better = self._best is None or result.score > self._best.score
        if result.converging and result.phase is Phase.SEARCH and better:
            self._best = result

    def _log(self) -> None:
        """At the end, and after as long again as a tenth of the run so far: a night's log stays short."""
        now = time.monotonic()
        pause = max(LOG_SECONDS, (now - self._start) / 10)
        if self._done >= self._total or now - self._last >= pause:
            self._last = now
            self._console.print(self._line(), soft_wrap=True)

    def _line(self) -> str:
        counts = ", ".join(f"{self._counts[k]} {k}" for k in COLORS if self._counts[k])
        parts = [f"{TITLES[self._phase]} {self._done}/{self._total}", counts, *self._speed()]
        if self._best is not None and self._phase is Phase.SEARCH:
            parts.append(f"best {self._best_text()}")
        return "; ".join(p for p in parts if p)

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self._total), completed=self._done, width=30)
        counts = Text("  ").join(Text(f"{self._counts[k]} {k}", style=c) for k, c in COLORS.items() if self._counts[k])
        grid.add_row(TITLES[self._phase], bar, f"{self._done}/{self._total}", counts)
        outer = Table.grid()
        outer.add_row(grid)
        best = f"best {self._best_text()}" if self._best else ""
        outer.add_row(Text("  ".join([*self._speed(), best]), style="dim"))
        return outer

    def _speed(self) -> list[str]:
        if not self._new:
            return []
        rate = self._new / (time.monotonic() - self._start)
        left = max(0, self._total - self._done) / rate
        speed = f"{rate:.1f} trials/s" if rate >= 1 else f"{60 * rate:.1f} trials/min"
        return [speed] + ([f"{timedelta(seconds=round(left))} left"] if left else [])

    def _best_text(self) -> str:
        assert self._best is not None
        values = ", ".join(f"{n} {shown(self._best.values[n])}" for n in self._axes)
        return f"so far trial {self._best.trial}" + (f": {values}" if values else "")


def _runs(phase: Phase) -> str:
    return "trials" if phase is Phase.SEARCH else "confirming runs"
