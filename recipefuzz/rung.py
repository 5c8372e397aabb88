"""A rung of the ladder: a model with its own study, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipefuzz.config import Config
from recipefuzz.engines.predictions import Predictions
from recipefuzz.finding import Finding, Level, worst
from recipefuzz.ranking import Ranked
from recipefuzz.recipe import shown
from recipefuzz.result import Phase, TrialResult


@dataclass(frozen=True)
class Rung:
    """A model of the ladder.

    Attributes:
        number: from 1; `of` how many.
        config: its own study: the model, the narrowed space, its share of the trials, its run folder.
        results: of the search; none where a check failed before it.
        winner: the best safe recipe; None where there is none: the rung fails.
        shown: real predictions of the winner.
    """

    number: int
    of: int
    config: Config
    findings: tuple[Finding, ...]
    results: tuple[TrialResult, ...] = ()
    ranking: tuple[Ranked, ...] = ()
    winner: Ranked | None = None
    shown: Predictions | None = None

    @property
    def name(self) -> str:
        """The model with its arguments."""
        target = self.config.target
        return " ".join([target.model, *(f"{k}={v}" for k, v in target.model_args.items())])

    @property
    def trials(self) -> list[TrialResult]:
        return [r for r in self.results if r.phase is Phase.SEARCH]

    @property
    def converging(self) -> int:
        return sum(r.converging for r in self.trials)

    @property
    def checks(self) -> Level:
        return worst(self.findings)

    @property
    def failure(self) -> str:
        """Why it fails; empty where it does not."""
        if self.winner is not None:
            return ""
        for finding in self.findings:
            if finding.level is Level.FAIL:
                return f"the check {finding.check!r} fails: {finding.seen}"
        if not self.converging:
            return f"none of {len(self.trials)} trials converged"
        return f"{self.converging} of {len(self.trials)} trials converged, no recipe on every confirming seed"


def described(section: Mapping[str, Any]) -> str:
    """A config's space in one line."""
    return ", ".join(f"{name} {_axis(spec)}" for name, spec in section.items())


def _axis(spec: Any) -> str:
    if isinstance(spec, dict):
        return f"{spec['low']:.3g} to {spec['high']:.3g}"
    return "/".join(shown(option) for option in spec)
