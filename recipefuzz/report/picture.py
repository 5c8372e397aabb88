"""The picture that answers before a table does: what share of the recipes converges along each axis."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group
from rich.table import Table
from rich.text import Text

from recipefuzz.recipe import Scalar, shown
from recipefuzz.result import ERROR, Phase, TrialResult
from recipefuzz.space import Axis, Choice, Range, Space
from recipefuzz.verdict import Label

BLOCKS = " ▁▂▃▄▅▆▇█"
BINS = 24  # columns of a range at most
COLORS = {"converging": "green", "stalled": "yellow", "nan": "red", ERROR: "magenta"}


def picture(results: Sequence[TrialResult], space: Space, grid_points: int | None = None) -> Group:
    """A line per axis: height is the share of trials that converged, colour the most frequent outcome.

    Args:
        grid_points: values per range, where the trials lie on a grid.
    """
    trials = [r for r in results if r.phase is Phase.SEARCH]
    grid = Table.grid(padding=(0, 1))
    for column in ("right", "right", "left"):
        grid.add_column(justify=column)
    for name, axis in space.axes:
        grid.add_row(Text(name, style="bold"), *_line(name, axis, trials, grid_points))
    return Group(_legend(trials), grid)


def outcome(result: TrialResult) -> str:
    return result.verdict or ERROR


def _legend(trials: Sequence[TrialResult]) -> Text:
    text = Text("share of trials that converge along each axis   ", style="dim")
    for label in (Label.CONVERGING, Label.STALLED, Label.NAN, ERROR):
        count = sum(outcome(r) == label for r in trials)
        if count:
            text.append(f"■ {label} {count}  ", style=COLORS[label])
    return text


def edges(axis: Range, grid_points: int | None) -> list[float]:
    """Where a range is cut into columns, as positions of 0 to 1: between its values where they are few, else evenly."""
    values = axis.grid(grid_points or BINS + 1)
    if len(values) > BINS:
        return [i / BINS for i in range(1, BINS)]
    return [(a + b) / 2 for a, b in pairwise(_position(value, axis) for value in values)]


def column(value: Scalar, axis: Range, cuts: Sequence[float]) -> int:
    """Which of the columns between the cuts a value is in."""
    return bisect_right(cuts, _position(value, axis))


def _position(value: Scalar, axis: Range) -> float:
    assert isinstance(value, (int, float))
    return axis.position(value)


def _line(name: str, axis: Axis, trials: Sequence[TrialResult], grid_points: int | None) -> tuple[str, Text]:
    if isinstance(axis, Range):
        cuts = edges(axis, grid_points)
        bins: list[list[TrialResult]] = [[] for _ in range(len(cuts) + 1)]
        for trial in trials:
            bins[column(trial.values[name], axis, cuts)].append(trial)
        text = Text.assemble(*(_block(b) for b in bins))
        return f"{axis.low:g}", text.append(f" {axis.high:g}").append(" (log)" if axis.log else "", style="dim")
    return "", _choices(name, axis, trials)


def _choices(name: str, axis: Choice, trials: Sequence[TrialResult]) -> Text:
    text = Text()
    for option in axis.options:
        inside = [t for t in trials if t.values[name] == option]
        share = f" {sum(t.converging for t in inside) / len(inside):.0%}  " if inside else " -  "
        text.append(shown(option)).append(" ").append(*_block(inside)).append(share, style="dim")
    return text


def _block(trials: Sequence[TrialResult]) -> tuple[str, str]:
    """A block as high as the share that converged; a low one still shows its colour."""
    if not trials:
        return "·", "dim"
    outcomes = [outcome(t) for t in trials]
    share = outcomes.count(Label.CONVERGING) / len(trials)
    most = max(set(outcomes), key=lambda o: (outcomes.count(o), o))
    return BLOCKS[max(1, round(share * (len(BLOCKS) - 1)))], COLORS[most]


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A loss curve in one line of text, its own smallest value at the bottom."""
    if not values:
        return ""
    points = [values[i * len(values) // width] for i in range(width)] if len(values) > width else list(values)
    low, high = min(points), max(points)
    spread = (high - low) or 1.0
    return "".join(BLOCKS[1 + round((p - low) / spread * (len(BLOCKS) - 2))] for p in points)
