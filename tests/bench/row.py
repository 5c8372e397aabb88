"""One row of the table: a figure of ours, the peer's, and the bar that their ratio is held to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Ours and the peer's with their unit as text; `ratio` is the better the larger, unless `at_most`.

    Attributes:
        ratio: None where it was not measured; `note` then says why.
        bar: None where the issue sets none.
    """

    work: str
    ours: str
    peer: str
    ratio: float | None
    bar: float | None = None
    at_most: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.ratio is None or self.bar is None:
            return None
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar

    def cells(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}{self.unit}"
        bar = "-" if self.bar is None else f"{sign} {self.bar:g}{self.unit}"
        met = {True: "[green]met[/]", False: "[red]NOT met[/]", None: "-"}[self.met]
        return [self.work, self.ours, self.peer, ratio, bar, met, self.note]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
