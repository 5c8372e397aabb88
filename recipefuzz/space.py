"""The space of recipes: for every searched axis a range or a set of choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from recipefuzz.recipe import Scalar


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included. `step` counts from `low`; `log` spaces them by ratio."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    step: float | None = None

    def contains(self, value: Scalar) -> bool:
        if value is None or isinstance(value, (bool, str)) or not self.low <= value <= self.high:
            return False
        if self.integer and value != int(value):
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def position(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`, by ratio where the range is logarithmic."""
        if self.high == self.low:
            return 0.0
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def distance(self, a: Scalar, b: Scalar) -> float:
        """Distance of two values as a share of the range: 0 to 1."""
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            return float(a != b)
        return abs(self.position(a) - self.position(b))

    def grid(self, points: int) -> tuple[Scalar, ...]:
        """Evenly spaced values, ends included; every value of a stepped range with no more than `points`."""
        at = [i / (points - 1) for i in range(points)] if points > 1 else [0.0]
        step = self.step or (1 if self.integer else None)
        if step is not None and not self.log:
            return self._stepped(at, step)
        values = [self._value(p) for p in at]
        return tuple(dict.fromkeys(round(v) if self.integer else float(v) for v in values))

    def _stepped(self, at: list[float], step: float) -> tuple[Scalar, ...]:
        """Counted in decimals, where 0.1 goes into 1 ten times (in floats: nine) and three of them are 0.3."""
        low, high, by = (Decimal(str(v)) for v in (self.low, self.high, step))
        last = int((high - low) // by)
        numbers = [round(p * last) for p in at] if last >= len(at) else range(last + 1)
        values = (low + by * n for n in numbers)
        return tuple(round(v) if self.integer else float(v) for v in values)

    def _value(self, position: float) -> float:
        if self.log:
            value = self.low * math.pow(self.high / self.low, position)
        else:
            value = self.low + position * (self.high - self.low)
        return min(self.high, value) if position < 1 else self.high  # rounding may lead past the end


@dataclass(frozen=True)
class Choice:
    """A set of values without an order; null is a value like any other."""

    options: tuple[Scalar, ...]

    def contains(self, value: Scalar) -> bool:
        return any(value == o and isinstance(value, bool) == isinstance(o, bool) for o in self.options)

    def distance(self, a: Scalar, b: Scalar) -> float:
        return float(a != b)

    def grid(self, points: int) -> tuple[Scalar, ...]:  # noqa: ARG002 - a choice has its own points
        return self.options


Axis = Range | Choice


@dataclass(frozen=True)
class Space:
    """Named axes, in the order in which the user wrote them."""

    axes: tuple[tuple[str, Axis], ...]

    def __getitem__(self, name: str) -> Axis:
        return dict(self.axes)[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def contains(self, values: Mapping[str, Scalar]) -> bool:
        return all(name in values and axis.contains(values[name]) for name, axis in self.axes)

    def distance(self, a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> float:
        """Euclidean distance, every axis scaled to 0..1 (a changed choice counts 1)."""
        return math.dist([0.0] * len(self.axes), [axis.distance(a[name], b[name]) for name, axis in self.axes])
