"""Results -> ranked recipes: safe first, then good."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from recipefuzz.config import Config
from recipefuzz.recipe import Recipe
from recipefuzz.result import Phase, TrialResult
from recipefuzz.verdict import Label


@dataclass(frozen=True)
class Ranked:
    """A recipe that converged in the search, with what the confirming runs said of it.

    Attributes:
        passed, runs: confirming runs that converged, of how many. A run that could not be made has not passed.
        wanted: confirming runs there were to be.
        low, high: 95 % Wilson interval of the pass rate.
        skill, heldout_skill: medians over the confirming runs that converged; of the search trial where there
            are none.
    """

    trial: TrialResult
    passed: int
    runs: int
    wanted: int
    low: float
    high: float
    skill: float
    heldout_skill: float
    steps: float

    @property
    def safe(self) -> bool:
        """All confirming runs were made and converged. Without confirming runs nothing is known to be safe."""
        return 0 < self.wanted <= self.runs == self.passed


def best(ranking: Sequence[Ranked], *, confirmed: bool) -> Ranked | None:
    """The winner: the first safe recipe; where nothing was to be `confirmed`, the first that converged."""
    return next((row for row in ranking if row.safe or not confirmed), None)


def wilson(passed: int, runs: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion (E. B. Wilson, JASA 22, 1927), 95 % by default.

    It stays inside [0, 1] and is honest for few runs: 5 of 5 gives 0.57 to 1, not 1 to 1.
    """
    if runs == 0:
        return 0.0, 1.0
    share, spread = passed / runs, z * z / runs
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / runs + spread / (4 * runs)) / (1 + spread)
    return middle - half if passed else 0.0, middle + half if passed < runs else 1.0  # the ends without rounding


def candidates(results: Iterable[TrialResult], top: int) -> list[TrialResult]:
    """The converging search trials worth confirming, best score first, each recipe once."""
    converging = (r for r in results if r.phase is Phase.SEARCH and r.converging)
    found: dict[Recipe, TrialResult] = {}
    for result in sorted(converging, key=lambda r: (_from_best(r.score), r.trial)):
        if len(found) == top:
            break
        found.setdefault(result.recipe, result)
    return list(found.values())


def confirming_runs(results: Iterable[TrialResult], config: Config) -> list[tuple[TrialResult, int]]:
    """The confirming runs that there are to be: the best candidates, each with seeds that the search did not see."""
    confirm, first = config.search.confirm, config.trial.seed + 1
    seeds = range(first, first + confirm.seeds)
    return [(candidate, seed) for candidate in candidates(results, confirm.top) for seed in seeds]


def rank(results: Sequence[TrialResult], rank_by: str = "skill", *, wanted: int = 1) -> list[Ranked]:
    """Every distinct recipe that converged in the search, best first.

    Order: confirmed recipes by the lower end of their pass rate's interval, then by median skill; then those
    that were not confirmed, by score: a lucky single run never outranks a recipe that passed on other seeds;
    last, those that failed every confirming run.

    Args:
        wanted: confirming runs that a recipe must have had to be called safe.
    """
    confirming: dict[int, list[TrialResult]] = {}
    for result in results:
        if result.phase is Phase.CONFIRM:
            confirming.setdefault(result.trial, []).append(result)
    rows = [_ranked(r, confirming.get(r.trial, []), wanted) for r in candidates(results, len(results))]
    return sorted(rows, key=lambda row: _order(row, rank_by))


def _ranked(trial: TrialResult, runs: list[TrialResult], wanted: int) -> Ranked:
    passed = [r for r in runs if r.verdict == Label.CONVERGING]
    low, high = wilson(len(passed), len(runs))
    measured = passed or [trial]
    return Ranked(
        trial=trial,
        passed=len(passed),
        runs=len(runs),
        wanted=wanted,
        low=low,
        high=high,
        skill=_median(r.skill for r in measured),
        heldout_skill=_median(r.heldout_skill for r in measured),
        steps=median(r.steps for r in measured),
    )


def _median(values: Iterable[float]) -> float:
    """Of those that were measured: one NaN would make it depend on the order."""
    return median([v for v in values if math.isfinite(v)] or [math.nan])


def _order(row: Ranked, rank_by: str) -> tuple[int, float, float, int]:
    tier = 1 if row.runs == 0 else 0 if row.passed else 2
    good = row.trial.score if tier == 1 else getattr(row, rank_by)
    return tier, -row.low if tier == 0 else 0.0, _from_best(good), row.trial.trial


def _from_best(value: float) -> float:
    """A key that sorts the largest first, and what was not measured last."""
    return -value if math.isfinite(value) else math.inf
