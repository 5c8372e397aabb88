"""What a diagnosis says."""

from __future__ import annotations

import linecache
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from recipefuzz.finding import plain
from recipefuzz.recipe import Scalar
from recipefuzz.records import read_record

SEEDS = 3  # runs that a fix must pass: one may be luck


class Root(StrEnum):
    RECIPE = "recipe"
    CODE = "code"
    DATA = "data"


@dataclass(frozen=True)
class Fix:
    """A change of the recipe that was run.

    Attributes:
        change: in words, such as "lr 0.3 -> 0.1".
        values: the axes that were changed, with their new values.
        verdict: of the run with the trial's seed.
        skill: of that run; None where it has none.
        seeds, converged: runs in all, and how many of them converged.
    """

    change: str
    values: Mapping[str, Scalar]
    verdict: str
    skill: float | None = None
    seeds: int = 1
    converged: int = 0

    @property
    def works(self) -> bool:
        """Whether it passed on as many seeds as a fix must."""
        return self.converged == self.seeds >= SEEDS


@dataclass(frozen=True)
class Diagnosis:
    """Where and why one trial went wrong, and what was seen to mend it.

    Attributes:
        verdict: of the trial; empty where it could not be judged.
        root: "recipe", "code", "data"; empty where nothing is wrong.
        cause: one word of the design's section 6; empty where nothing is wrong.
        phase: data, forward, loss, backward or optimizer; empty for a trial that stalled.
        op: the operation that made the first value that is not finite; of a backward operation, its forward operation.
        module: qualified name of the module that it ran in.
        file, line: the user's line.
        step: counted from 1.
        explanation: what happened, in words, with the numbers that decided it.
        evidence: those numbers.
        chain: operations from the producer to the symptom.
        advice: what to change in code or data; empty for a recipe's failure.
        fixes: changes of the recipe that were run, the recommended one first.
    """

    verdict: str
    root: str = ""
    cause: str = ""
    phase: str = ""
    op: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    step: int = 0
    explanation: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    advice: str = ""
    fixes: tuple[Fix, ...] = ()

    @property
    def source(self) -> str:
        """The user's source line; empty where there is none."""
        return linecache.getline(self.file, self.line).strip() if _is_source(self.file) else ""

    @property
    def fix(self) -> Fix | None:
        """The smallest change that was seen to work on every seed it was run with."""
        return next((f for f in self.fixes if f.works), None)

    @property
    def where(self) -> str:
        """Such as "model.py:31"; the module's name where no line of the user's was being run."""
        return f"{Path(self.file).name}:{self.line}" if self.file else self.module

    def record(self, recipe: Mapping[str, Scalar]) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is null.

        Args:
            recipe: of the trial; each fix is given as a whole recipe.
        """
        fixes = [vars(f) | {"recipe": dict(recipe) | dict(f.values)} for f in self.fixes]
        return plain(vars(self) | {"source": self.source, "fixes": fixes})  # type: ignore[no-any-return]

    @classmethod
    def from_record(cls, record: object) -> Diagnosis:
        """The inverse of `record`.

        Raises:
            ValueError: the record is not one that `record` made.
        """
        found = read_record(cls, record)
        if found.root not in {*Root, ""}:
            raise ValueError(f"the root {found.root!r}")
        return found


def _is_source(file: str) -> bool:
    """Python, in a file or typed into a notebook: a record from elsewhere may name a device, or what is no code."""
    return file in linecache.cache or (file.endswith(".py") and os.path.isfile(file))  # noqa: PTH113 - no error for a bad name
