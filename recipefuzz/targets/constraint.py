"""What a model's outputs obey whatever its weights: a constant prediction that does not is none that it could make.

Over all constants, the negative log-likelihood of log-probabilities has no lower bound. Over log-probabilities it has
one: the entropy of the label frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TOLERANCE = 1e-4  # of a sum of one: float32 rounds a softmax over 100,000 classes to 1e-5


@dataclass(frozen=True)
class Constraint:
    """A set in which each output lies.

    Attributes:
        kind: one of `TRANSFORMS`.
        dim: the dimension of a batch of outputs along which the numbers bind each other.
    """

    kind: str
    dim: int = 0

    def transform(self, free: Tensor, sizes: torch.Size) -> Tensor:
        """Any numbers -> a point of the set, and every point inside it comes of some; `sizes` are a batch's."""
        if self.dim:
            free = free.expand([n if d == self.dim else -1 for d, n in enumerate(sizes)])
        return TRANSFORMS[self.kind](free, self.dim)

    def start(self, shape: list[int], value: float) -> Tensor:
        """Free numbers to descend from: all the same, but on the sphere, where that may be the point farthest off."""
        start = torch.full(shape, value)
        if self.kind != "unit_vector":
            return start
        return start + torch.linspace(0.5, 1, start.numel()).view(shape)


TRANSFORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "log_simplex": lambda free, dim: free.log_softmax(dim),
    "simplex": lambda free, dim: free.softmax(dim),
    "unit_vector": lambda free, dim: functional.normalize(free, dim=dim),
    "unit_interval": lambda free, _: free.sigmoid(),
    "tanh_interval": lambda free, _: free.tanh(),
    "nonnegative": lambda free, _: functional.softplus(free),
}


def equality(output: Tensor) -> Constraint | None:
    """The equation that a batch of outputs fulfils along a dimension: numbers not made to do so never do."""
    for dim in range(1, output.dim()):
        if output.shape[dim] < 2:
            continue
        if _all_near(output.logsumexp(dim).exp(), 1.0):
            return Constraint("log_simplex", dim)
        if bool((output >= 0).all()) and _all_near(output.sum(dim), 1.0):
            return Constraint("simplex", dim)
        if _all_near(output.norm(dim=dim), 1.0):
            return Constraint("unit_vector", dim)
    return None


def interval(outputs: list[Tensor]) -> Constraint | None:
    """The narrowest interval that holds all outputs. Some numbers lie in one by chance: weigh that before use.

    Args:
        outputs: of one batch, under different weights.
    """
    low, high = min(float(o.min()) for o in outputs), max(float(o.max()) for o in outputs)
    if low >= 0 and high <= 1:
        # sums that are whole: several distributions side by side, say, for which we have no transform
        return None if _has_whole_sums(outputs[0]) else Constraint("unit_interval")
    if low >= -1 and high <= 1:
        return Constraint("tanh_interval")
    return Constraint("nonnegative") if low >= 0 else None


def _has_whole_sums(output: Tensor) -> bool:
    sums = [output.sum(dim) for dim in range(1, output.dim()) if output.shape[dim] > 1]
    return any(_all_near(s, s.round()) for s in sums)


def _all_near(values: Tensor, expected: Tensor | float) -> bool:
    return bool(((values - expected).abs() <= TOLERANCE).all())
