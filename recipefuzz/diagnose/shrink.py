"""A failing recipe made small: which of its values is to blame, and from where on.

The values in which it differs from a recipe that converges are put back one by one as long as it still fails (delta
debugging: Zeller and Hildebrandt, IEEE TSE 28(2), 2002), and the threshold of what is left is bracketed by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from recipefuzz.recipe import Recipe, Scalar, shown

POINTS = 7  # between the two ends in each round: as lanes they cost little more than one
# an eighth of the way, twice: the bracket is then a 64th of the way, on a log scale where both ends allow it
ROUNDS = 2
FailsAt = Callable[[Sequence[Recipe]], Sequence[bool]]


@dataclass(frozen=True)
class Shrunk:
    """The smallest difference from a converging recipe that still fails.

    Attributes:
        blamed: the values of the failing recipe that are needed for it to fail; put into the safe one they break it.
        safe: those of the safe recipe in their place.
        axis: the one whose threshold was sought; "" where none is a number.
        converges_at, fails_at: the ends of the bracket.
    """

    blamed: Mapping[str, Scalar]
    safe: Mapping[str, Scalar]
    axis: str = ""
    converges_at: float = math.nan
    fails_at: float = math.nan

    def __str__(self) -> str:
        """Such as "fails for lr >= 0.43 (converges at 0.41) when init_scale = 3"."""
        others = [f"{name} = {shown(value)}" for name, value in self.blamed.items() if name != self.axis]
        if not self.axis:
            return f"fails for {' and '.join(others)}"
        sign = ">=" if self.fails_at > self.converges_at else "<="
        text = f"fails for {self.axis} {sign} {self.fails_at:.3g} (converges at {self.converges_at:.3g})"
        return text + (f" when {' and '.join(others)}" if others else "")


def shrink(failing: Recipe, safe: Recipe, fails: FailsAt, choices: Collection[str] = ()) -> Shrunk | None:
    """Which values of `failing` make `safe` fail, and the threshold of the first of them that is a number.

    Args:
        fails: whether each of some recipes fails; they are run side by side.
        choices: axes that don't take the numbers between two of their values.

    Returns:
        None if the two differ in nothing.
    """
    bad, good = failing.values(), safe.values()
    blamed = {name: value for name, value in bad.items() if good.get(name) != value}
    if not blamed:
        return None
    blamed = _minimal(blamed, safe, fails)
    kept = {name: good.get(name) for name in blamed}
    numbers = (n for n in blamed if n not in choices and _is_number(blamed[n]) and _is_number(kept[n]))
    axis = next(numbers, "")
    if not axis:
        return Shrunk(blamed, kept)
    low, high = _bracket(axis, blamed, safe, fails)
    return Shrunk(blamed, kept, axis, low, high)


def _minimal(blamed: dict[str, Scalar], safe: Recipe, fails: FailsAt) -> dict[str, Scalar]:
    """One value that fails alone, else values that all are needed."""
    alone = fails([safe.but(**{name: value}) for name, value in blamed.items()])
    for (name, value), failed in zip(blamed.items(), alone, strict=True):
        if failed:
            return {name: value}
    while len(blamed) > 1:
        without = [{k: v for k, v in blamed.items() if k != name} for name in blamed]
        still = [rest for rest, failed in zip(without, fails([safe.but(**w) for w in without]), strict=True) if failed]
        if not still:
            break
        blamed = still[0]
    return blamed


def _bracket(axis: str, blamed: Mapping[str, Scalar], safe: Recipe, fails: FailsAt) -> tuple[float, float]:
    """The nearest values on the way from the safe one to the failing one that converge and fail."""
    low, high = float(safe.values()[axis] or 0.0), float(blamed[axis] or 0.0)
    whole = all(isinstance(value, int) for value in (safe.values()[axis], blamed[axis]))
    for _ in range(ROUNDS):
        points = _between(low, high, whole=whole)
        if not points:
            break
        failed = fails([safe.but(**{**blamed, axis: round(p) if whole else p}) for p in points])
        first = next((i for i, f in enumerate(failed) if f), len(points))
        ends = [low, *points, high]
        low, high = ends[first], ends[first + 1]
    return low, high


def _between(low: float, high: float, *, whole: bool) -> list[float]:
    """Values between two, evenly spaced: by ratio where both are positive."""
    shares = [i / (POINTS + 1) for i in range(1, POINTS + 1)]
    if low > 0 and high > 0:
        values = [low * math.pow(high / low, s) for s in shares]
    else:
        values = [low + (high - low) * s for s in shares]
    if whole:
        values = list(dict.fromkeys(float(round(v)) for v in values))
    return [v for v in values if v not in (low, high)]


def _is_number(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
