"""What a run still has to train, as far as that is known before it begins: how to train depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recipefuzz.engines.job import FAMILIES, NUMBERS, structure
from recipefuzz.recipe import Recipe
from recipefuzz.space import Space


@dataclass(frozen=True)
class Ahead:
    """Trials to come.

    Attributes:
        trials: in all processes together, at most; 0 if nothing is known.
        structures: that they are of, see `job.structure`.
        processes: that share them.
        seconds: after which no more are begun; None if there is no such limit.
    """

    trials: int = 0
    structures: int = 1
    processes: int = 1
    seconds: float | None = None

    @property
    def each(self) -> float:
        """Trials of a structure, if they are spread evenly."""
        return self.trials / self.structures


def of_recipes(recipes: Sequence[Recipe]) -> Ahead:
    return Ahead(len(recipes), len({structure(recipe) for recipe in recipes}))


def of_search(space: Space, trials: int, seconds: float | None) -> Ahead:
    """Of a search: as many structures as the space has, or as there are trials."""
    counts = []
    for name, axis in space.axes:
        if name not in NUMBERS:
            values = axis.grid(max(1, trials))
            counts.append(len({FAMILIES[str(v)] for v in values} if name == "optimizer" else values))
    return Ahead(trials, max(1, min(trials, math.prod(counts))), seconds=seconds)
