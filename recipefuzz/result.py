"""A finished trial: recipe and seed, verdict or error, and the numbers that tables and the sampler read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np

from recipefuzz.evidence import below, skill_at_end
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.records import read_record
from recipefuzz.space import Space
from recipefuzz.trace import Trace
from recipefuzz.verdict import Budget, Label, Verdict

ERROR = "error"  # in the place of a verdict, of a trial that could not be run; its reason says why
CURVE_POINTS = 32  # of the loss curve that is kept: enough for a sparkline


class Phase(StrEnum):
    SEARCH = "search"
    CONFIRM = "confirm"


@dataclass(frozen=True)
class TrialResult:
    """One row of trials.csv.

    Attributes:
        trial: number of the search trial; a confirming run bears the number of the one it repeats.
        verdict: "nan", "stalled" or "converging"; empty for an error.
        skill: 1 - loss / baseline at the end of the run, the loss averaged over its last steps; NaN if it has none.
        score: mean skill over the short budget, held at its last value where the run stopped before: learning
            fast and learning well both raise it, and runs that stopped at different steps compare.
        steps: optimizer steps paid for.
        heldout_skill: the same for the last evaluation on the held-out rows.
        curve: the loss, averaged over equal stretches.
    """

    trial: int
    phase: Phase
    seed: int
    values: Mapping[str, Scalar]
    verdict: str = ""
    cause: str = ""
    reason: str = ""
    error: str = ""
    skill: float = math.nan
    score: float = math.nan
    heldout_skill: float = math.nan
    loss: float = math.nan
    baseline: float = math.nan
    steps: int = 0
    first_bad: int | None = None
    seconds: float = 0.0
    curve: tuple[float, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return Recipe.of(self.values)

    @property
    def converging(self) -> bool:
        return self.verdict == Label.CONVERGING

    def record(self) -> dict[str, Any]:
        """Plain values for a JSON store; what is not finite, or what it is without being told, is left out."""
        found = {k: v for k, v in vars(self).items() if _is_told(k, v)}
        return found | {"values": dict(self.values)}  # asdict would copy the curve, number by number

    @classmethod
    def from_record(cls, record: object) -> TrialResult:
        """The inverse of `record`.

        Raises:
            ValueError: the record is not one that `record` made.
        """
        found = read_record(cls, record)
        if found.verdict not in {*Label, ""} or bool(found.verdict) == bool(found.error):
            raise ValueError(f"the verdict {found.verdict!r} with the error {found.error!r}")
        if min(found.trial, found.seed, found.steps, found.first_bad or 0) < 0:
            raise ValueError("a negative number of a trial, a seed or a step")
        Recipe.of(found.values)
        return found


def check_values(results: Iterable[TrialResult], space: Space) -> None:
    """Look whether trials lie in the space that they are said to be of.

    Raises:
        ValueError: one does not.
    """
    for result in results:
        if not space.contains(result.values):
            raise ValueError(f"trial {result.trial} does not lie in the config's space")


DEFAULTS = {field.name: field.default for field in fields(TrialResult)}


def _is_told(name: str, value: Any) -> bool:
    return not (isinstance(value, float) and not math.isfinite(value)) and value != DEFAULTS.get(name)


def result_of(
    trace: Trace,
    verdict: Verdict | None,
    baseline: float,
    budget: Budget,
    *,
    trial: int,
    phase: Phase,
    seed: int,
    recipe: Recipe,
    error: str = "",
    seconds: float = 0.0,
) -> TrialResult:
    """The row that a trace and its verdict make."""
    if verdict is None:
        return TrialResult(trial, phase, seed, recipe.values(), error=error or "no verdict", seconds=seconds)
    heldout = trace.heldout[-1][1] if trace.heldout else math.nan
    skill = skill_at_end(trace, baseline)
    return TrialResult(
        trial=trial,
        phase=phase,
        seed=seed,
        values=recipe.values(),
        verdict=verdict.label,
        cause=verdict.cause,
        reason=verdict.reason,
        skill=_round(skill),
        score=_round(score(trace, baseline, budget, skill)),
        heldout_skill=_round(below(baseline, heldout, baseline)),
        loss=_round(float(trace.loss[-1])) if trace.steps else math.nan,
        baseline=_round(baseline),
        steps=trace.steps_run,
        first_bad=trace.first_bad,
        seconds=round(seconds, 4),
        curve=tuple(trace.curve(CURVE_POINTS)),
    )


@np.errstate(all="ignore")
def score(trace: Trace, baseline: float, budget: Budget, skill: float) -> float:
    """Area under the skill curve over the short budget, in [0, 1]; see `TrialResult.score`.

    Args:
        skill: at the end of the run.
    """
    if trace.first_bad is not None or not trace.steps:
        return 0.0
    loss = trace.loss[: budget.steps]
    skills = np.clip(below(np.full(len(loss), baseline), loss, baseline), 0.0, 1.0)
    last = min(max(skill, 0.0), 1.0)
    return float((skills.sum() + last * (budget.steps - len(loss))) / budget.steps)


def _round(value: float) -> float:
    return float(f"{value:.6g}")
