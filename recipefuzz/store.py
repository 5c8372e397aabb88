"""The study's store: ask, record, tell, resume. The only file that knows Optuna's storages.

The order of events is fixed. Recipes are asked for in blocks of a quarter of the window: the block that begins with
trial n is asked for when exactly the trials 0 .. n + block - window - 1 have been told, whatever finished meanwhile.
Results that come early are recorded at once (nothing finished is ever lost) but shown to the sampler in their turn.
The sampler's generator is seeded anew for every block (by samplers that know no blocks, for every trial). So the
trials of a study depend neither on the number of workers nor on how often it was killed and resumed. A block is one
batch of the journal or part of one, so a kill loses it whole or not at all; it is then asked for again, the same.

Fast engines finish hundreds of trials a second, so nothing here may take time in proportion to the trials that there
are: tpe and random learn from arrays that grow with the study, and entries are written past Optuna's storage, which
catches up with the journal when it is asked something. The samplers that keep their state in the storage (gp, cmaes,
qmc, grid) ask it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from recipefuzz.config import SearchConfig
from recipefuzz.entry_log import EntryLog, replayed
from recipefuzz.journal import Journal
from recipefuzz.peak import Peak
from recipefuzz.recipe import Scalar
from recipefuzz.records import read_plain
from recipefuzz.result import Phase, TrialResult, check_values
from recipefuzz.sampling import BlockTPE, Seen, ask, block_at_random, distribution, mixed_seed, total
from recipefuzz.space import Space
from recipefuzz.trial_log import ELAPSED, META, PEAK, RESULT, TrialLog, peak_of

WINDOW = "window"
FINISHED = (TrialState.COMPLETE, TrialState.FAIL)

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True)
class Asked:
    """A trial that is to be run: its number and the values of the searched axes."""

    number: int
    values: Mapping[str, Scalar]


class Store:
    """One run's trials on disk, read by anybody, or written by one process alone.

    Args:
        log: or the path of a journal.
        write: False to look only; nothing is changed and no lock is taken.

    Raises:
        InputError: a damaged journal, or one that another process is writing.
    """

    def __init__(self, log: EntryLog | Path, *, write: bool) -> None:
        self._journal = Journal(log, write=write) if isinstance(log, Path) else log
        try:
            with replayed(self._journal.name):
                self._journal.catch_up()
                self._storage = optuna.storages.JournalStorage(cast("BaseJournalBackend", self._journal))
                self._studies = {s.study_name: s for s in self._storage.get_all_studies()}
        except BaseException:
            self._journal.close()
            raise

    def meta(self) -> dict[str, Any]:
        """What `begin` was given when the run was new; empty for a run that has not begun."""
        study = self._studies.get(Phase.SEARCH)
        with replayed(self._journal.name):
            return dict(read_plain(study.user_attrs.get(META, {}))) if study else {}

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
        with replayed(self._journal.name):
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
                with replayed(self._journal.name):
                    found += _results(self._storage.get_all_trials(study_id, deepcopy=False), phase)
        return found

    def seconds(self) -> float:
        """Time that the search had taken when its last trial was recorded."""
        study = self._studies.get(Phase.SEARCH)
        with replayed(self._journal.name):
            return _elapsed(self._storage.get_all_trials(study._study_id, deepcopy=False)) if study else 0.0  # noqa: SLF001

    def peak(self) -> Peak:
        """Memory that the run took, over all its restarts."""
        study = self._studies.get(Phase.SEARCH)
        with replayed(self._journal.name):
            return peak_of(study.user_attrs) if study else Peak()

    def close(self) -> None:
        self._journal.close()


class StudySearch:
    """The ask-and-tell side of a store, for its one writer."""

    def __init__(
        self,
        study: optuna.Study,
        confirm: optuna.Study,
        journal: EntryLog,
        space: Space,
        search: SearchConfig,
    ) -> None:
        self._study, self._confirm_id, self._journal = study, confirm._study_id, journal  # noqa: SLF001 - entries name ids
        self._space, self._search = space, search
        self._window = max(1, int(study.user_attrs[WINDOW]))
        self._block = max(1, self._window // 4)
        self._distributions = {name: distribution(axis) for name, axis in space.axes}
        trials, confirming = study.get_trials(deepcopy=False), confirm.get_trials(deepcopy=False)
        self._log = TrialLog(journal, study._study_id, self._distributions, _count(study))  # noqa: SLF001
        self._ids = [t._trial_id for t in trials]  # noqa: SLF001
        self._told = next((t.number for t in trials if t.state not in FINISHED), len(trials))
        self._recorded = {t.number: r for t in trials if (r := _result(t, Phase.SEARCH)) is not None}
        self._confirmed = _results(confirming, Phase.CONFIRM)
        check_values(self.results, space)
        if lost := [t.number for t in trials if t.state.is_finished() and t.number not in self._recorded]:
            raise ValueError(f"trial {lost[0]} is finished, and has no result")
        self._seconds = _elapsed(trials)
        self._peak = peak_of(study.user_attrs)
        self._unfinished = [
            Asked(t.number, {name: t.params[name] for name in space.names})
            for t in trials[self._told :]
            if t.number not in self._recorded
        ]
        self._random, self._tpe = np.random.RandomState(), BlockTPE(self._distributions)
        self._seen = Seen(self._distributions)
        self._seen.ask([t.params for t in trials])
        for number in range(self._told):
            self._seen.tell(number, self._recorded[number])

    @property
    def total(self) -> int:
        return total(self._search, self._space)

    def refill(self, *, stop: bool = False) -> list[Asked]:
        """Tell what is due, ask what that frees; return the trials to run now.

        The first call also returns what an interrupted run had asked and not finished. With `stop` nothing
        new is asked. What this writes is not synced: all of it follows from what was recorded.
        """
        new, self._unfinished = self._unfinished, []
        end = len(self._ids) if stop else self.total
        while True:
            if len(self._ids) < end and len(self._ids) + self._block - self._told <= self._window:
                new += self._ask(min(self._block, end - len(self._ids)))
            elif self._told in self._recorded:
                self._tell(self._told)
            else:
                break
        self._journal.flush(sync=False)
        return new

    def _ask(self, size: int) -> list[Asked]:
        """The next block."""
        first = len(self._ids)
        if self._search.sampler not in ("tpe", "random"):
            return [self._ask_storage(number) for number in range(first, first + size)]
        if self._search.sampler == "tpe":
            recipes = self._tpe.block(self._seen, size, mixed_seed(self._search.seed, first))
        else:
            recipes = block_at_random(self._distributions, self._random, self._search, range(first, first + size))
        self._seen.ask(recipes)
        self._ids += [self._log.asked(recipe) for recipe in recipes]
        return [Asked(number, recipe) for number, recipe in enumerate(recipes, first)]

    def _ask_storage(self, number: int) -> Asked:
        with replayed(self._journal.name):
            trial = ask(self._study, self._search, self._space, number)
        self._ids.append(trial._trial_id)  # noqa: SLF001
        self._log.trials += 1
        self._seen.ask([trial.params])
        return Asked(number, {name: trial.params[name] for name in self._space.names})

    @property
    def seconds(self) -> float:
        """Time that the search had taken when its last trial was recorded."""
        return self._seconds

    @property
    def peak(self) -> Peak:
        """Memory that the run took, over all its restarts."""
        return self._peak

    def record(self, result: TrialResult, elapsed: float = 0.0) -> None:
        """Keep a finished trial, and the time that the search has taken by then. On return no kill can take it."""
        self.record_all((result,), elapsed)

    def record_all(self, results: Iterable[TrialResult], elapsed: float = 0.0, peak: Peak | None = None) -> None:
        """`record` for trials that finished together: one write, one sync; with the memory taken so far."""
        last = None
        for result in results:
            if result.phase is Phase.CONFIRM:
                self._log.confirmed(self._confirm_id, result)
                self._confirmed.append(result)
            elif result.trial not in self._recorded:
                last = self._ids[result.trial]
                self._log.attribute(last, RESULT, result.record())
                self._recorded[result.trial] = result
        if last is not None:
            self._seconds = max(self._seconds, round(elapsed, 3))
            self._log.attribute(last, ELAPSED, self._seconds)
        if peak is not None and (larger := self._peak.over(peak)) != self._peak:
            self._peak = larger
            self._log.study_attribute(PEAK, vars(larger))
        self._journal.flush()

    def _tell(self, number: int) -> None:
        result = self._recorded[number]
        self._seen.tell(number, result)
        self._log.told(self._ids[number], result, constraint=self._search.sampler != "cmaes")
        self._told += 1

    def confirmed(self) -> set[tuple[int, int]]:
        """(trial, seed) of the confirming runs that are done."""
        return {(r.trial, r.seed) for r in self._confirmed}

    @property
    def results(self) -> list[TrialResult]:
        """All finished trials, as in `Store.results`."""
        return [self._recorded[n] for n in sorted(self._recorded)] + self._confirmed


def _count(study: optuna.Study) -> int:
    """Trials of all studies of a journal, those that somebody has deleted too: they keep their ids."""
    return len(study._storage._replay_result._trials)  # type: ignore[attr-defined]  # noqa: SLF001 - JournalStorage's


def _result(trial: FrozenTrial, phase: Phase) -> TrialResult | None:
    record = trial.user_attrs.get(RESULT)
    if record is None:
        return None
    found = TrialResult.from_record(record)
    if found.phase is not phase or (phase is Phase.SEARCH and found.trial != trial.number):
        raise ValueError(f"trial {trial.number} has the result of another one")
    return found


def _elapsed(trials: Iterable[FrozenTrial]) -> float:
    found = [float(t.user_attrs.get(ELAPSED, 0.0)) for t in trials]
    if not all(map(math.isfinite, found)):
        raise ValueError("a time that is not finite")
    return max(found, default=0.0)


def _results(trials: Iterable[FrozenTrial], phase: Phase) -> list[TrialResult]:
    return [r for trial in trials if (r := _result(trial, phase)) is not None]
