"""The study's store: ask, record, tell, resume. The only file that knows Optuna's storages and samplers.

The order of events is fixed. The recipe of trial n is asked for when exactly the trials 0 .. n - window have been
told, whatever finished meanwhile: results that come early are recorded at once (nothing finished is ever lost) but
shown to the sampler in their turn. The sampler's generator is seeded anew for every trial. So the trials of a study
depend neither on the number of workers nor on how often it was killed and resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from recipefuzz.config import SearchConfig
from recipefuzz.errors import InputError, Place
from recipefuzz.journal import Journal
from recipefuzz.recipe import Scalar
from recipefuzz.result import Phase, TrialResult
from recipefuzz.space import Axis, Choice, Range, Space
from recipefuzz.verdict import Label

MOST_GRID_POINTS = 50_000  # Optuna lists them all at every ask
RESULT, ELAPSED, META, WINDOW = "result", "elapsed", "recipefuzz", "window"
FINISHED = (TrialState.COMPLETE, TrialState.FAIL)

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True)
class Asked:
    """A trial that is to be run: its number and the values of the searched axes."""

    number: int
    values: Mapping[str, Scalar]


class Store:
    """One run's trials on disk.

    Args:
        path: the journal file.
        write: False to look only; nothing is changed and no lock is taken.

    Raises:
        InputError: a damaged journal, or one that another process is writing.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self._journal = Journal(path, write=write)
        try:
            self._storage = optuna.storages.JournalStorage(cast("BaseJournalBackend", self._journal))
            self._studies = {s.study_name: s for s in self._storage.get_all_studies()}
        except Exception as error:
            self._journal.close()
            raise InputError(
                f"the run's journal can't be replayed ({type(error).__name__}: {error})",
                place=Place(str(path)),
                fix="restore the file from a copy, or start again with --fresh (the old folder is kept)",
            ) from error

    def meta(self) -> dict[str, Any]:
        """What `begin` was given when the run was new; empty for a run that has not begun."""
        study = self._studies.get(Phase.SEARCH)
        return dict(study.user_attrs.get(META, {})) if study else {}

    def begin(self, meta: Mapping[str, Any], space: Space, search: SearchConfig, window: int) -> StudySearch:
        """Start or resume the search.

        Args:
            meta: (JSON) kept with a new run.
            window: recipes that are asked for ahead of results. A run keeps the one that it began with, so that
                a machine with more workers goes on with the same trials.
        """
        studies = {phase: self._study(phase) for phase in Phase}
        if META not in studies[Phase.SEARCH].user_attrs:
            studies[Phase.SEARCH].set_user_attr(WINDOW, window)
            studies[Phase.SEARCH].set_user_attr(META, dict(meta))
        self._journal.flush()
        return StudySearch(studies[Phase.SEARCH], studies[Phase.CONFIRM], self._journal, space, search)

    def _study(self, phase: Phase) -> optuna.Study:
        """Loaded, or made: `create_study(load_if_exists=True)` would write an entry each time."""
        if phase in self._studies:
            return optuna.load_study(storage=self._storage, study_name=phase)
        return optuna.create_study(storage=self._storage, study_name=phase, direction="minimize")

    def results(self) -> list[TrialResult]:
        """All finished trials: those of the search by number, then the confirming runs in their order."""
        found = []
        for phase in Phase:
            if phase in self._studies:
                study_id = self._studies[phase]._study_id  # noqa: SLF001
                found += _results(self._storage.get_all_trials(study_id, deepcopy=False))
        return found

    def seconds(self) -> float:
        """Time that the search had taken when its last trial was recorded."""
        study = self._studies.get(Phase.SEARCH)
        return _elapsed(self._storage.get_all_trials(study._study_id, deepcopy=False)) if study else 0.0  # noqa: SLF001

    def close(self) -> None:
        self._journal.close()


class StudySearch:
    """The ask-and-tell side of a store, for its one writer."""

    def __init__(
        self,
        study: optuna.Study,
        confirm: optuna.Study,
        journal: Journal,
        space: Space,
        search: SearchConfig,
    ) -> None:
        self._study, self._confirm, self._journal = study, confirm, journal
        self._space, self._search = space, search
        self._window = int(study.user_attrs[WINDOW])
        self._storage = study._storage  # noqa: SLF001 - its public methods take ids, which no public one gives
        self._distributions = {name: distribution(axis) for name, axis in space.axes}
        trials = study.get_trials(deepcopy=False)
        self._asked = len(trials)
        self._told = next((t.number for t in trials if t.state not in FINISHED), len(trials))
        self._recorded = {t.number: r for t in trials if (r := _result(t)) is not None}
        self._unfinished = [n for n in range(self._told, self._asked) if n not in self._recorded]

    @property
    def total(self) -> int:
        return total(self._search, self._space)

    def refill(self, *, stop: bool = False) -> list[Asked]:
        """Tell what is due, ask what that frees; return the trials to run now.

        The first call also returns what an interrupted run had asked and not finished. With `stop` nothing
        new is asked.
        """
        new = [self._asked_before(number) for number in self._unfinished]
        self._unfinished = []
        while True:
            wanted = not stop and self._asked < self.total
            if wanted and self._asked - self._told < self._window:
                new.append(self._ask())
            elif self._told in self._recorded:
                self._tell(self._told)
            else:
                break
        self._journal.flush()
        return new

    def _asked_before(self, number: int) -> Asked:
        """A trial that an earlier process asked for; asked to its end where that was cut short."""
        return self._suggest(number, lambda: optuna.Trial(self._study, self._trial_id(number)))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)  # noqa: SLF001

    def _ask(self) -> Asked:
        asked = self._suggest(self._asked, self._study.ask)
        self._asked += 1
        return asked

    def _suggest(self, number: int, trial_of: Callable[[], optuna.Trial]) -> Asked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental samplers, and samplers that take choices one by one
            self._study.sampler = sampler(self._search, self._space, number)
            trial = trial_of()
            for name, axis in self._distributions.items():
                trial._suggest(name, axis)  # noqa: SLF001 - what ask(fixed_distributions) does
        return Asked(number, {name: trial.params[name] for name in self._space.names})

    @property
    def seconds(self) -> float:
        """Time that the search had taken when its last trial was recorded."""
        return _elapsed(self._study.get_trials(deepcopy=False))

    def record(self, result: TrialResult, elapsed: float = 0.0) -> None:
        """Keep a finished trial, and the time that the search has taken by then. On return it is on disk."""
        if result.phase is Phase.CONFIRM:
            self._add_confirm(result)
        elif result.trial not in self._recorded:
            for key, value in ((RESULT, result.record()), (ELAPSED, round(elapsed, 3))):
                self._storage.set_trial_user_attr(self._trial_id(result.trial), key, value)
            self._recorded[result.trial] = result
        self._journal.flush()

    def _add_confirm(self, result: TrialResult) -> None:
        state = TrialState.FAIL if result.error else TrialState.COMPLETE
        value = None if result.error else objective(result)[0]
        self._confirm.add_trial(create_trial(state=state, value=value, user_attrs={RESULT: result.record()}))

    def _tell(self, number: int) -> None:
        """A failed recipe is a completed, infeasible observation: samplers ignore FAIL and go back there."""
        result = self._recorded[number]
        self._study.sampler = optuna.samplers.RandomSampler()  # after_trial of some stop a running `optimize`
        if result.error:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            value, violation = objective(result)
            if self._search.sampler != "cmaes":  # CMA-ES knows no constraints: the value alone ranks for it
                optuna.Trial(self._study, self._trial_id(number)).set_constraint("failed", violation)
            self._study.tell(number, value)
        self._told += 1

    def confirmed(self) -> set[tuple[int, int]]:
        """(trial, seed) of the confirming runs that are done."""
        return {(r.trial, r.seed) for r in _results(self._confirm.get_trials(deepcopy=False))}

    @property
    def results(self) -> list[TrialResult]:
        """All finished trials, as in `Store.results`."""
        search = [self._recorded[n] for n in sorted(self._recorded)]
        return search + _results(self._confirm.get_trials(deepcopy=False))


def total(search: SearchConfig, space: Space) -> int:
    """Trials that the search will have in all: fewer than asked for where a grid has no more points."""
    if search.sampler != "grid":
        return search.trials
    points = math.prod(len(axis.grid(search.grid_points)) for _, axis in space.axes)
    if points > MOST_GRID_POINTS:
        raise InputError(
            f"a grid of {points:,} points",
            place=Place(key="search.sampler"),
            expected=f"at most {MOST_GRID_POINTS:,}",
            fix="fewer search.grid_points, fewer axes, or sampler: qmc, which spreads any number of trials evenly",
        )
    return min(search.trials, points)


def objective(result: TrialResult) -> tuple[float, float]:
    """What the sampler is told: a value to minimize, and by how much the recipe failed (0 or less: it did not).

    A converging trial is worth 1 - score. A stall fails by up to 1, less the more it learned; a NaN by 1 to
    2, less the later it came: samplers that order infeasible points by violation are drawn to the border.
    """
    score = min(max(result.score, 0.0), 1.0) if math.isfinite(result.score) else 0.0
    if result.verdict == Label.CONVERGING:
        return 1.0 - score, 0.0
    violation = 1.0 - 0.9 * score if result.verdict == Label.STALLED else 1.0 + 1.0 / (result.first_bad or 1)
    return 1.0 + violation, violation


def distribution(axis: Axis) -> BaseDistribution:
    if isinstance(axis, Choice):
        return CategoricalDistribution(axis.options)
    if axis.integer:
        step = int(axis.step) if axis.step is not None else 1
        return IntDistribution(int(axis.low), int(_last(axis)), log=axis.log, step=step)
    return FloatDistribution(axis.low, _last(axis), log=axis.log, step=axis.step)


def _last(axis: Range) -> float:
    """The largest value: below `high` where the steps do not end there, of which Optuna would warn."""
    return axis.high if axis.step is None else float(axis.grid(2)[-1])  # type: ignore[arg-type]


class _KnownSpace(optuna.samplers.TPESampler):
    """TPE that is told its space. Optuna infers it from all trials at every ask, which takes half of the ask."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed=seed, multivariate=True, constant_liar=True)
        known = {name: distribution(axis) for name, axis in sorted(space.axes)}
        self._known = {name: axis for name, axis in known.items() if not axis.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._known


def sampler(search: SearchConfig, space: Space, number: int) -> BaseSampler:
    """A fresh sampler for one trial; all its state is in the store, its generator is of the trial's number."""
    seed = _mix(search.seed, number)
    plain = optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "random":
        return plain
    if search.sampler == "tpe":
        return _KnownSpace(space, seed)
    if search.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, independent_sampler=plain)
    if search.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, independent_sampler=plain, warn_independent_sampling=False)
    if search.sampler == "qmc":  # one sequence for the whole study; the store counts its points
        return optuna.samplers.QMCSampler(
            seed=search.seed, scramble=True, independent_sampler=plain, warn_independent_sampling=False
        )
    grid = {name: list(axis.grid(search.grid_points)) for name, axis in space.axes}
    return optuna.samplers.GridSampler(grid, seed=search.seed)  # it shuffles the grid: one order for all trials


def _mix(seed: int, number: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, number]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _result(trial: FrozenTrial) -> TrialResult | None:
    record = trial.user_attrs.get(RESULT)
    return TrialResult.from_record(record) if record is not None else None


def _elapsed(trials: Iterable[FrozenTrial]) -> float:
    return max((float(t.user_attrs.get(ELAPSED, 0.0)) for t in trials), default=0.0)


def _results(trials: Iterable[FrozenTrial]) -> list[TrialResult]:
    return [r for trial in trials if (r := _result(trial)) is not None]
