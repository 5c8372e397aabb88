"""What a run still has to train, as far as that is known before it begins: how to train depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipefuzz.engines.job import structure
from recipefuzz.recipe import Recipe


@dataclass(frozen=True)
class Ahead:
    """What a run trains.

    Attributes:
        trials: in all, at most; 0 if nothing is known.
        done: how many of them an earlier process has done.
        structures: that they are of, see `job.structure`; None if it is not known. Of a search it is not guessed: the
            engine would hang on times that are close to each other, and a search that is resumed must not change it.
        processes: that share them.
        seconds: after which no more are begun; None if there is no such limit.
    """

    trials: int = 0
    structures: int | None = None
    processes: int = 1
    done: int = 0
    seconds: float | None = None

    def left(self, finished: int) -> int:
        """Trials that are to come when each process has finished so many."""
        return max(0, self.trials - self.done - finished * self.processes)


def of_recipes(recipes: Sequence[Recipe]) -> Ahead:
    return Ahead(len(recipes), len({structure(recipe) for recipe in recipes}))
