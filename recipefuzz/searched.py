"""What a search has found: results of its trials, why some fail, the ranking; and its tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from recipefuzz.config import Config
from recipefuzz.diagnosing import diagnose_stored
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.engines.job import Outcome
from recipefuzz.listening import Listener
from recipefuzz.peak import Peak
from recipefuzz.ranking import Ranked
from recipefuzz.recipe import Recipe
from recipefuzz.report.failures import buckets
from recipefuzz.report.ranked import rank_run
from recipefuzz.report.tables import ranking_frame, trials_frame
from recipefuzz.report.write import write_reports
from recipefuzz.result import ERROR, Phase, TrialResult, result_of
from recipefuzz.run_folder import RunFolder
from recipefuzz.targets.task import Task
from recipefuzz.verdict import Budget

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SearchResult:
    """All finished trials of a run, the ranking of its recipes, and the memory that it took.

    Attributes:
        diagnoses: of the trials that represent the most frequent kinds of failure, by their numbers.
    """

    folder: Path
    config: Config
    results: tuple[TrialResult, ...]
    diagnoses: Mapping[int, Diagnosis]
    peak: Peak

    @cached_property
    def _ranked(self) -> tuple[list[Ranked], Ranked | None]:
        return rank_run(self.config, self.results)

    @property
    def ranked(self) -> list[Ranked]:
        return self._ranked[0]

    @property
    def trials(self) -> pd.DataFrame:
        """trials.csv as a DataFrame."""
        return trials_frame(self.results, self.config.axis_names)

    @property
    def ranking(self) -> pd.DataFrame:
        """ranking.csv as a DataFrame."""
        return ranking_frame(self.ranked, self.config.axis_names)

    @property
    def winner(self) -> Ranked | None:
        return self._ranked[1]

    @property
    def best(self) -> Recipe | None:
        """The safe recipe at the top of the ranking; None if there is none."""
        return self.winner.trial.recipe if self.winner else None


def report(folder: RunFolder, config: Config, results: Sequence[TrialResult], peak: Peak) -> SearchResult:
    """Write the tables of all that is finished."""
    result = SearchResult(folder.path, config, tuple(results), folder.diagnoses(), peak)
    write_reports(folder.path, config, result.results, result.ranked, result.winner, result.diagnoses)
    return result


def explain(config: Config, task: Task, folder: RunFolder, results: Sequence[TrialResult], listener: Listener) -> None:
    """Explain one representative of each of the most frequent kinds of failure."""
    failing = [b for b in buckets(results, config.axes) if b.verdict != ERROR][: config.search.diagnose]
    known = folder.diagnoses()
    examples = [b.example for b in failing if b.example.trial not in known]
    if not examples:
        return
    what = f"{len(examples)} kinds of failure" if len(examples) > 1 else "the failures"
    listener.say(f"explaining {what}: one trial of each is replayed, and changes of its recipe are run")
    for example, found in diagnose_stored(config, task, examples):
        listener.say(f"  trial {example.trial}: {found.cause or found.verdict}")
        known[example.trial] = found
        folder.keep(known)


def to_result(config: Config, outcome: Outcome, phase: Phase) -> TrialResult:
    return result_of(
        outcome.trace,
        outcome.verdict,
        outcome.baseline,
        Budget(config.trial.steps, config.trial.extend),
        trial=outcome.job.key,
        phase=phase,
        seed=outcome.job.seed,
        recipe=outcome.job.recipe,
        error=outcome.error,
        seconds=outcome.seconds,
    )


class Clock:
    """Time spent on the search, over all its restarts."""

    def __init__(self, limit: float | None, spent: float) -> None:
        self._limit, self._start = limit, time.monotonic() - spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self._limit is not None and self.seconds >= self._limit
