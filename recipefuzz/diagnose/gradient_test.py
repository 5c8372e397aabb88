"""The backward pass against differences: slopes along directions, for groups of the tensors a number rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipefuzz.diagnose.slopes import Precision, slope

DIRECTIONS = 3  # along which a group that does not agree at once is tried: two of them must disagree


@dataclass(frozen=True)
class Compared:
    """One group's slope along one direction.

    Attributes:
        analytic: by the backward pass.
        numeric: by differences.
        error: of the numeric one.
        size: length of the tensors: times a slope, the change for a change of them by their own size.
        value: of the function, at its middle.
        flat: whether the function did not change at all.
    """

    name: str
    analytic: float
    numeric: float
    error: float
    size: float
    value: float
    flat: bool

    @property
    def largest(self) -> float:
        return max(abs(self.analytic), abs(self.numeric))

    @property
    def apart(self) -> float:
        """Relative to the larger of the two; 0 where both are."""
        return abs(self.analytic - self.numeric) / self.largest if self.largest else 0.0

    def wrong(self, precision: Precision) -> bool:
        """Whether they differ by more than tolerance and error explain."""
        return abs(self.analytic - self.numeric) > precision.tolerance * self.largest + 3 * self.error

    def resolved(self, precision: Precision) -> bool:
        """Whether differences can tell: they can't at a kink, nor where rounding hides the slope."""
        return self.error <= precision.tolerance * self.largest

    def words(self) -> str:
        """By how much the backward pass is wrong."""
        if self.analytic == 0:
            return f"is missing (0, and the derivative is {self.numeric:.3g})"
        if self.numeric == 0:
            return f"is {self.analytic:.3g}, and the derivative is 0"
        ratio = self.analytic / self.numeric
        if abs(ratio + 1) < 0.001:
            return "has the wrong sign"
        if ratio < 0:
            return f"has the wrong sign and {-ratio:.3g} times the size"
        if ratio >= 2:
            return f"is {ratio:.3g} times too large"
        return f"is {abs(ratio - 1):.2%} too {'large' if ratio > 1 else 'small'}".replace("%", " %")


def compare(
    function: Callable[[], Tensor], groups: Mapping[str, Sequence[Tensor]], precision: Precision
) -> list[Compared]:
    """One result a group: the direction that counts against it, if it is wrong, else one that could be resolved.

    Args:
        function: of leaves that are moved in place, and are back when this ends. Must give the same for the same.
    """
    tensors = [t for group in groups.values() for t in group]
    loss = function()
    found: list[Tensor | None] = [None] * len(tensors)
    if loss.requires_grad and tensors:
        found = list(torch.autograd.grad(loss, tensors, allow_unused=True))
    gradients = {id(t): torch.zeros_like(t) if g is None else g.detach() for t, g in zip(tensors, found, strict=True)}
    middle = float(loss.detach())
    first = {name: _along(name, group, function, gradients, precision, middle, 0) for name, group in groups.items()}
    most = max((c.largest * c.size for c in first.values()), default=0.0)
    floor = precision.negligible * max(abs(middle), most)
    results = []
    for name, group in groups.items():
        tried = [first[name]]
        if not math.isfinite(tried[0].largest) or tried[0].largest * tried[0].size <= floor:
            continue
        while len(tried) < DIRECTIONS and (tried[-1].wrong(precision) or not tried[-1].resolved(precision)):
            tried.append(_along(name, group, function, gradients, precision, middle, len(tried)))
        wrong = [c for c in tried if c.wrong(precision)]
        results.append(wrong[0] if len(wrong) >= 2 else min(tried, key=lambda c: (c.wrong(precision), c.error)))
    return results


def _along(
    name: str,
    group: Sequence[Tensor],
    function: Callable[[], Tensor],
    gradients: Mapping[int, Tensor],
    precision: Precision,
    middle: float,
    number: int,
) -> Compared:
    """Along the gradient's direction and a random one, half and half.

    The first gives the slope its full size, so that rounding is small beside it; the second has a part of everything
    that the gradient leaves out.
    """
    slopes = [gradients[id(t)] for t in group]
    chance = torch.Generator().manual_seed(number)
    noise = [torch.randn(t.shape, generator=chance, dtype=torch.float64).to(t) for t in group]
    own, other = _length(slopes), _length(noise)
    way = [n / other + (g / own if own else 0) for g, n in zip(slopes, noise, strict=True)]
    analytic = float(sum((g * w).sum().double() for g, w in zip(slopes, way, strict=True)))
    bases = [t.detach().clone() for t in group]
    size = _length(bases) or 1.0

    def moved(distance: float) -> float:
        with torch.no_grad():
            for tensor, base, step in zip(group, bases, way, strict=True):
                tensor.copy_(base + distance * step)
        return float(function().detach())

    try:
        found = slope(moved, size, precision)
    finally:
        with torch.no_grad():
            for tensor, base in zip(group, bases, strict=True):
                tensor.copy_(base)
    return Compared(name, analytic, found.value, found.error, size, middle, found.flat)


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
