"""A space narrowed around the recipes that were safe in it: where the search of the next model starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from recipefuzz.ranking import Ranked
from recipefuzz.recipe import Scalar
from recipefuzz.result import Phase, TrialResult
from recipefuzz.space import Axis, Choice, Range, Space

MARGIN = 1 / 6  # of the range, on each side: a factor of ten of six decades, by which a deeper model may differ
FEW = 3  # trials of a choice of which none converged, before it is dropped


def safe_region(ranking: Iterable[Ranked]) -> list[Mapping[str, Scalar]]:
    """Recipes that converged, and in no confirming run failed to.

    Not the confirmed ones alone: those are the few fastest of them, at one end of what is safe.
    """
    return [row.trial.values for row in ranking if row.passed == row.runs]


def narrowed(
    section: Mapping[str, Any], space: Space, safe: Sequence[Mapping[str, Scalar]], results: Iterable[TrialResult]
) -> dict[str, Any]:
    """The `space:` section of a config around the safe recipes; as it was where there are none.

    Args:
        section: what the config says now; a range keeps its other keys.
        results: all trials: a choice that was hardly tried is kept.
    """
    if not safe:
        return dict(section)
    tried = [r.values for r in results if r.phase is Phase.SEARCH]
    return {name: _narrowed(axis, name, section[name], safe, tried) for name, axis in space.axes}


def _narrowed(
    axis: Axis, name: str, spec: Any, safe: Sequence[Mapping[str, Scalar]], tried: Sequence[Mapping[str, Scalar]]
) -> Any:
    inside = [recipe[name] for recipe in safe]
    if isinstance(axis, Choice):
        seen = [recipe[name] for recipe in tried]
        return [o for o in axis.options if _same(o, inside) or _same(o, seen) < FEW]
    low, high = ends(axis, [float(value) for value in inside if isinstance(value, (int, float))])
    return dict(spec) | {"low": low, "high": high}


def _same(option: Scalar, values: Sequence[Scalar]) -> int:
    """How many of the values are the option; 1 and true are two options."""
    return sum(value == option and isinstance(value, bool) == isinstance(option, bool) for value in values)


def ends(axis: Range, values: Sequence[float]) -> tuple[float, float]:
    """Of the part of a range that holds the values, and `MARGIN` more on each side; never beyond the range.

    Before that each end is moved out by what the extremes of n even draws fall short of it on average, their distance
    over n - 1.
    """
    at = sorted(axis.position(value) for value in values)
    short = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else 0.0
    low, high = max(0.0, at[0] - short - MARGIN), min(1.0, at[-1] + short + MARGIN)
    return _end(axis, low, math.floor), _end(axis, high, math.ceil)


def _end(axis: Range, position: float, outwards: Callable[[float], int]) -> float:
    """The value at a position: on the range's grid, or of three digits, and at the ends the ends themselves."""
    if position in (0.0, 1.0):
        return axis.low if position == 0.0 else axis.high
    if axis.log:
        value = axis.low * math.pow(axis.high / axis.low, position)
    else:
        value = axis.low + position * (axis.high - axis.low)
    if axis.step is not None:
        value = axis.low + axis.step * outwards((value - axis.low) / axis.step)
    digits = 3 if axis.step is None else 12  # of a grid, all that are not rounding
    value = outwards(value) if axis.integer else float(f"{value:.{digits}g}")
    return min(max(value, axis.low), axis.high)
