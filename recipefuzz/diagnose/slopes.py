"""The slope of a function of one number, by differences, with how far it can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SAFETY = 10.0  # roundings that add up in a value of many sums, in units of the last place
ENOUGH = 1e-5  # error relative to the slope, with which no further step is tried


@dataclass(frozen=True)
class Precision:
    """What differences can show in arithmetic of some precision.

    The error of a central difference is h²f'''/6 by truncation and eps·f/h by rounding, least at h = eps**(1/3) (Press
    et al., Numerical Recipes, section 5.7); each kink that lies closer than h adds its own.

    Attributes:
        eps: distance from 1 to the next number.
        steps: to try, from the largest, relative to the size of what is moved; they lie about the best one.
        tolerance: relative difference of two slopes that is no bug: far above rounding, far below 1 %.
        negligible: slopes that small relative to the others, or to the function itself, are rounding.
    """

    name: str
    eps: float
    steps: tuple[float, ...]
    tolerance: float
    negligible: float


DOUBLE = Precision("float64", 2.0**-52, (1e-4, 1e-5, 1e-6), 1e-3, 1e-8)
SINGLE = Precision("float32", 2.0**-23, (1e-1, 3e-2, 1e-2, 3e-3, 1e-3), 5e-3, 1e-3)


@dataclass(frozen=True)
class Slope:
    """A slope by differences.

    Attributes:
        error: how far the value may be off, by truncation, rounding and kinks together.
        flat: whether the function is the same number at every point that was tried.
    """

    value: float
    error: float
    flat: bool


def slope(function: Callable[[float], float], scale: float, precision: Precision) -> Slope:
    """The slope at 0, by central differences with the steps of a precision times a scale.

    The error of a difference is read from the one before, with a larger step (twice what they are apart), from the last
    place of the values, and from the kink that the two one-sided differences show: theirs is h·f'' apart where
    the function is smooth, and does not shrink with h where it is not. The difference with the least error counts.
    """
    middle = function(0.0)
    best, earlier, values = Slope(0.0, float("inf"), flat=False), None, [middle]
    for step in precision.steps:
        h = step * scale
        up, down = function(h), function(-h)
        values += [up, down]
        central, apart = (up - down) / (2 * h), (up - 2 * middle + down) / h
        if earlier is not None:
            before, apart_before, h_before = earlier
            kink = abs(apart - apart_before * h / h_before)
            rounding = SAFETY * precision.eps * max(map(abs, (up, down, middle))) / h
            error = 2 * abs(central - before) + kink + rounding
            if error < best.error:
                best = Slope(central, error, flat=False)
            if best.error < ENOUGH * abs(best.value):
                break
        earlier = central, apart, h
    return Slope(best.value, best.error, flat=len(set(values)) == 1)
