"""A grid of two axes as a map: a sign for each recipe, its colour and shape the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from recipefuzz.recipe import Scalar, shown
from recipefuzz.report.picture import BINS, COLORS, column, edges, outcome
from recipefuzz.result import ERROR, TrialResult
from recipefuzz.space import Axis, Range, Space
from recipefuzz.verdict import Label

SIGNS = {Label.CONVERGING: "██", Label.STALLED: "░░", Label.NAN: "××", ERROR: "!!"}  # two characters are a square


def grid_map(trials: Sequence[TrialResult], space: Space, points: int) -> Group | None:
    """The map, the range with most values from left to right and the other axis upwards; None where it can't be drawn.

    Args:
        points: the grid's values per range.
    """
    sizes = {name: len(axis.grid(points)) for name, axis in space.axes}
    ranges = [name for name, axis in space.axes if isinstance(axis, Range)]
    if len(sizes) != 2 or not ranges or max(sizes.values()) > BINS:
        return None
    across = max(reversed(ranges), key=sizes.__getitem__)
    up = next(name for name in space.names if name != across)
    axis = space[across]
    assert isinstance(axis, Range)
    cuts = edges(axis, points)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_row(Text(up, style="bold"))
    for value in _upwards(space[up], points):
        cells = {column(t.values[across], axis, cuts): outcome(t) for t in trials if t.values[up] == value}
        table.add_row(shown(value), Text.assemble(*(_cell(cells.get(i)) for i in range(len(cuts) + 1))))
    ends = f"{axis.low:g} to {axis.high:g}"
    table.add_row(Text(across, style="bold"), Text(ends).append(" (log)" if axis.log else "", style="dim"))
    return Group(_legend(trials), table)


def _upwards(axis: Axis, points: int) -> tuple[Scalar, ...]:
    """Values of the rows: numbers rise from the bottom, choices stand as they were written."""
    return axis.grid(points)[::-1] if isinstance(axis, Range) else axis.grid(points)


def _cell(found: str | None) -> tuple[str, str]:
    return ("· ", "dim") if found is None else (SIGNS[found], COLORS[found])


def _legend(trials: Sequence[TrialResult]) -> Text:
    text = Text("every recipe of the grid   ", style="dim")
    present = {outcome(t) for t in trials}
    for label in (label for label in SIGNS if label in present):
        text.append(f"{SIGNS[label]} {label}  ", style=COLORS[label])
    return text
