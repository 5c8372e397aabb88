"""The plot of the story: ask for recipes, train, judge, tell; then confirm the best on fresh seeds, and rank.

Not `search.py`, as the design has it: a submodule of that name would take the place of the function
`recipefuzz.search` as soon as anything imports it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recipefuzz import evidence
from recipefuzz.checks.every import findings
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.diagnosing import as_patient, diagnose_stored
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Engine, Job, Outcome
from recipefuzz.engines.rehearse import rehearse
from recipefuzz.engines.select import ask_ahead, open_engine, pick_device
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.finding import Level
from recipefuzz.peak import Peak, megabytes
from recipefuzz.ranking import Ranked, candidates
from recipefuzz.recipe import Recipe
from recipefuzz.report.failures import buckets
from recipefuzz.report.ranked import rank_run
from recipefuzz.report.tables import ranking_frame, trials_frame
from recipefuzz.report.write import write_reports
from recipefuzz.result import ERROR, Phase, TrialResult, result_of
from recipefuzz.run_folder import RunFolder, fingerprints, identity
from recipefuzz.sampling import total
from recipefuzz.source import numbers_as_meant
from recipefuzz.store import Store, StudySearch
from recipefuzz.targets.resolve import resolve, user_files
from recipefuzz.targets.task import Task
from recipefuzz.verdict import Budget

if TYPE_CHECKING:
    import pandas as pd


class Listener(Protocol):
    """Hears how the run goes."""

    def begin(self, phase: Phase, done: Iterable[TrialResult], total: int) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def say(self, line: str) -> None: ...


class Silent:
    """A listener for programs."""

    def begin(self, phase: Phase, done: Iterable[TrialResult], total: int) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def say(self, line: str) -> None: ...


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


def search(
    config: Config | dict[str, Any] | str | Path, *, fresh: bool = False, listener: Listener | None = None
) -> SearchResult:
    """Search a study's space, confirm and rank its safe recipes; resume the run if it exists.

    Args:
        config: a config file, its contents as a mapping, or a checked Config.
        fresh: put an existing run of this name aside instead of resuming it.

    Raises:
        InputError: what is wrong with the config or the user's code, before anything is trained.
        RunFailedError: the run could not go on; what was finished is kept.
    """
    config = as_config(config)
    listener = listener or Silent()
    pick_device(config)  # first of all: whether the device is there
    task = ready(config, listener)
    with _opened(config, task, fresh, listener) as (folder, study, engine):
        try:
            _explore(config, study, engine, listener)
            _confirm(config, study, engine, listener)
            _diagnose(config, task, folder, study, listener)
        except BaseException:
            with contextlib.suppress(RunFailedError):  # a full disk: the first error is the one to show
                _report(folder, config, study)
            raise
        return _report(folder, config, study)


def ready(config: Config, listener: Listener) -> Task:
    """What a search looks at before it trains.

    Raises:
        InputError: what is wrong with the config or the user's code.
    """
    if not config.space:
        raise InputError(
            "nothing to search: the config has no space",
            place=config.source.place("space"),
            expected="at least one axis, such as space: {lr: {low: 1e-5, high: 10, log: true}}",
        )
    total(config.search, config.axes)  # whether a grid is too large
    task = resolve(config)
    if abs(rehearse(task, config)) < evidence.TINY:
        raise InputError(
            "a constant prediction already has loss 0: skill, which counts from it, can't be measured",
            place=config.source.place("target", "loss"),
            fix="look whether all training targets are the same, or add a constant to the loss",
        )
    _check(config, task, listener)
    return task


def _check(config: Config, task: Task, listener: Listener) -> None:
    """Say what the cheap preflight checks have seen: the search goes on, and its trials have the last word."""
    with as_patient(config, task, config.default_recipe(), config.trial.seed) as patient:
        found = list(findings(patient, cheap=True))
    names = ", ".join(dict.fromkeys(finding.check for finding in found))
    wrong = [finding for finding in found if finding.level is not Level.PASS]
    listener.say(f"checked first: {names}: {'see below' if wrong else 'nothing wrong'}; recipefuzz check looks at more")
    for finding in wrong:
        listener.say(f"  {finding.level}: {finding.check}: {finding.seen}; {finding.todo}")


def _report(folder: RunFolder, config: Config, study: StudySearch) -> SearchResult:
    """Write the tables of all that is finished."""
    result = SearchResult(folder.path, config, tuple(study.results), folder.diagnoses(), study.peak)
    write_reports(folder.path, config, result.results, result.ranked, result.winner, result.diagnoses)
    return result


def as_config(config: Config | dict[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return parse_config(numbers_as_meant(config)) if isinstance(config, dict) else load_config(config)


@contextmanager
def _opened(
    config: Config, task: Task, fresh: bool, listener: Listener
) -> Iterator[tuple[RunFolder, StudySearch, Engine]]:
    folder = RunFolder.of(config)
    code = fingerprints(user_files(config))
    with (
        contextlib.closing(folder.open(config, code, fresh=fresh)) as store,
        contextlib.closing(open_engine(config, task, listener.say, _ahead(config, store))) as engine,
    ):
        window = ask_ahead(config, engine)
        yield folder, store.begin(identity(config, code), config.axes, config.search, window), engine


def _ahead(config: Config, store: Store) -> Ahead:
    """The search, and its confirming runs."""
    confirm = config.search.confirm
    trials = total(config.search, config.axes) + confirm.top * confirm.seeds
    seconds = None if config.search.time is None else max(0.0, config.search.time - store.seconds())
    return Ahead(trials, done=len(store.results()), seconds=seconds)


def _explore(config: Config, study: StudySearch, engine: Engine, listener: Listener) -> None:
    """Ask, train, judge, tell until the budget of trials or of time is spent."""
    listener.begin(Phase.SEARCH, (r for r in study.results if r.phase is Phase.SEARCH), study.total)
    clock = _Clock(config.search.time, study.seconds)
    while True:
        for asked in study.refill(stop=clock.over):
            engine.submit(Job(asked.number, config.recipe_of(asked.values), config.trial.seed))
        outcomes = engine.collect()
        if not outcomes:
            return
        _record(config, study, outcomes, Phase.SEARCH, listener, clock.seconds)


def _record(
    config: Config,
    study: StudySearch,
    outcomes: Sequence[Outcome],
    phase: Phase,
    listener: Listener,
    elapsed: float = 0.0,
) -> None:
    """Keep what finished together in one write."""
    results = [to_result(config, outcome, phase) for outcome in outcomes]
    study.record_all(results, elapsed, Peak(megabytes(), max(outcome.peak for outcome in outcomes)))
    for result in results:
        listener.finished(result)


def _confirm(config: Config, study: StudySearch, engine: Engine, listener: Listener) -> None:
    """Run the best candidates for the whole short budget on seeds that the search did not see."""
    first = config.trial.seed + 1
    jobs = [
        Job(candidate.trial, candidate.recipe, seed, whole=True)
        for candidate in candidates(study.results, config.search.confirm.top)
        for seed in range(first, first + config.search.confirm.seeds)
    ]
    done = study.confirmed()
    listener.begin(Phase.CONFIRM, (r for r in study.results if r.phase is Phase.CONFIRM), len(jobs))
    for job in jobs:
        if (job.key, job.seed) not in done:
            engine.submit(job)
    while outcomes := engine.collect():
        _record(config, study, outcomes, Phase.CONFIRM, listener)


def _diagnose(config: Config, task: Task, folder: RunFolder, study: StudySearch, listener: Listener) -> None:
    """Explain one representative of each of the most frequent kinds of failure."""
    failing = [b for b in buckets(study.results, config.axes) if b.verdict != ERROR][: config.search.diagnose]
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


class _Clock:
    """Time spent on the search, over all its restarts."""

    def __init__(self, limit: float | None, spent: float) -> None:
        self._limit, self._start = limit, time.monotonic() - spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self._limit is not None and self.seconds >= self._limit
