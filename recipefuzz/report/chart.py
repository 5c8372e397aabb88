"""Two loss curves in plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROWS, COLUMNS = 8, 60
TRAIN, HELDOUT, BOTH = "·", "o", "@"
LOG = 20.0  # highest loss over lowest from which on the scale is logarithmic: else all but the start is one line


def chart(train: Sequence[float], heldout: Sequence[tuple[int, float]]) -> list[str]:
    """Lines of a chart: `ROWS` by `COLUMNS`, with both scales and a legend.

    Args:
        train: loss of each step.
        heldout: (steps done, loss); drawn as points.
    """
    steps = len(train)
    line = _columns(train)
    points = {min(COLUMNS - 1, at * COLUMNS // max(steps, 1)): loss for at, loss in heldout if math.isfinite(loss)}
    seen = [*line.values(), *points.values()]
    if not seen:
        return []
    low, high = min(seen), max(seen)
    log = low > 0 and high / low > LOG
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    for mark, values in ((TRAIN, line), (HELDOUT, points)):
        for column, value in values.items():
            row = _row(value, low, high, log)
            grid[row][column] = mark if grid[row][column] == " " else BOTH
    labels = {0: f"{high:.3g}", ROWS - 1: f"{low:.3g}"}
    lines = [f"{labels.get(i, ''):>9} │{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    legend = f"{TRAIN} train   {HELDOUT} held-out   {BOTH} both" + ("   (log)" if log else "")
    end = f"step {steps}"
    return [*lines, f"{'':>9} └{'─' * COLUMNS}", f"{'':>11}{legend}{end:>{COLUMNS - len(legend)}}"]


def _columns(train: Sequence[float]) -> dict[int, float]:
    """Mean loss of the steps of each column that has finite ones."""
    inside: dict[int, list[float]] = {}
    for step, loss in enumerate(train):
        if math.isfinite(loss):
            inside.setdefault(step * COLUMNS // len(train), []).append(loss)
    return {column: math.fsum(losses) / len(losses) for column, losses in inside.items()}


def _row(value: float, low: float, high: float, log: bool) -> int:
    """0 is the top."""
    if high <= low:
        return ROWS - 1
    share = math.log(value / low) / math.log(high / low) if log else value / (high - low) - low / (high - low)
    return ROWS - 1 - round(min(max(share, 0.0), 1.0) * (ROWS - 1))
