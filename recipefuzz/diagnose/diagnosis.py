"""What a diagnosis says."""

from __future__ import annotations

import linecache
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from recipefuzz.recipe import Scalar


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
        skill: of that run.
        seeds, converged: runs in all, and how many of them converged.
    """

    change: str
    values: Mapping[str, Scalar]
    verdict: str
    skill: float = math.nan
    seeds: int = 1
    converged: int = 0

    @property
    def works(self) -> bool:
        """Whether all its runs converged, and there were several."""
        return self.converged == self.seeds > 1


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
        return linecache.getline(self.file, self.line).strip() if self.file else ""

    @property
    def fix(self) -> Fix | None:
        """The smallest change that was seen to work on every seed it was run with."""
        return next((f for f in self.fixes if f.works), None)

    def as_json(self, recipe: Mapping[str, Scalar]) -> dict[str, Any]:
        """Plain values; what is not finite is null.

        Args:
            recipe: of the trial; each fix is given as a whole recipe.
        """
        plain = {k: v for k, v in vars(self).items() if k != "fixes"}
        plain["source"] = self.source
        plain["fixes"] = [
            {
                "change": f.change,
                "recipe": dict(recipe) | dict(f.values),
                "verdict": f.verdict,
                "skill": f.skill,
                "seeds": f.seeds,
                "converged": f.converged,
            }
            for f in self.fixes
        ]
        return _plain(plain)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
