"""A study that many workers share: each takes trials, and records what became of them.

All that is known is in the log, and every worker reads the same from it (`board`). What it adds it adds in its turn,
alone with the log, after having read what the others added: so no trial is given to two, and their number is exact.
The sampler learns from results in the order in which they come, and takes trials under way for bad ones until then
(Optuna's `constant_liar`), so that workers don't all ask for the same. It is asked before the turn, by what is known
then, and only what it says is written in the turn: of all that a worker does, this alone keeps the others waiting. So
it doesn't know of what others ask while this worker waits, as if they had asked at the same moment.

A worker whose lease has lapsed (`leases`) loses its trials to the others. If it was only slow, its result still counts
where none has come meanwhile: a trial is a pure function, whoever runs it; where one has, its own is dropped. A trial
that has lost two workers, or all but one of the `run.retries` after which it is an error, is run with nothing beside
it, so that it alone is to blame for what happens then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import optuna
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalOperation

from recipefuzz.board import CONFIRMS, HOLDER, Board, Item
from recipefuzz.config import Config
from recipefuzz.entry_log import Cursor, EntryLog, TurnLostError, replayed
from recipefuzz.peak import Peak
from recipefuzz.ranking import confirming_runs
from recipefuzz.recipe import Scalar
from recipefuzz.result import Phase, TrialResult, check_values
from recipefuzz.sampling import BlockTPE, Seen, ask, block_at_random, distribution, mixed_seed, total
from recipefuzz.trial_log import ELAPSED, META, PEAK, RESULT, TrialLog, peak_of

ALONE = 2  # workers that a trial has lost when it is run with nothing beside it; the last of its retries at the latest
SHARE = 2  # who asks gets one part in so many of an equal share of what is left: at the end nobody waits for long


T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """What a worker's turn at the log brought.

    Attributes:
        taken: trials that it is to run now.
        news: results that it had not seen, its own too.
        over: nothing is left to be done, by nobody.
    """

    taken: list[Item]
    news: list[TrialResult]
    over: bool


class SharedStudy:
    """One worker's side of a shared study.

    Args:
        meta: (JSON) what the study is; kept with a new one.
        worker: a name that no other worker has.

    Raises:
        InputError: the log holds what it should not.
        RunFailedError: the log can't be reached or written.
    """

    def __init__(self, log: EntryLog, config: Config, meta: Mapping[str, Any], worker: str) -> None:
        self._log, self._config, self.worker = log, config, worker
        self._axes = {name: distribution(axis) for name, axis in config.axes.axes}
        self._tpe, self._random = BlockTPE(self._axes), np.random.RandomState()
        self._own_seed = mixed_seed(config.search.seed, worker)
        self._known = 0  # results that the caller has been told of
        self._begin_reading()
        self._in_turn(lambda: self._begin(meta))

    def _begin_reading(self) -> None:
        self._board, self._cursor = Board(self._axes, self._config.trial.seed), Cursor()
        self._seen, self._asked, self._told = Seen(self._axes), 0, 0
        self._best: tuple[int, list[tuple[int, int]]] = (-1, [])
        self._study: optuna.Study | None = None  # for samplers that look into Optuna's storage

    def _in_turn(self, what: Callable[[], T]) -> T:
        """Do it alone with the log; again, if the turn is lost. After an error, all is read anew."""
        while True:
            try:
                with self._log.exclusive():
                    self._read()
                    done = what()
                self._read()
                return done
            except TurnLostError:
                self._begin_reading()
            except BaseException:
                self._begin_reading()
                raise

    def _begin(self, meta: Mapping[str, Any]) -> None:
        for phase in Phase:
            if phase not in self._board.studies:
                study = {"op_code": int(JournalOperation.CREATE_STUDY), "study_name": str(phase)}
                self._log.append_logs([study | {"worker_id": self.worker, "directions": [1]}])
        self._read()
        self._entries = TrialLog(self._log, self._board.studies[Phase.SEARCH], self._axes, 0)
        if META not in self._board.attributes:
            self._entries.study_attribute(META, dict(meta))
        for item in self._board.items.values():  # of a run that was one process's, and that was stopped
            if item.result is not None and not item.told:
                self._tell(item, item.result)

    @property
    def meta(self) -> dict[str, Any]:
        """What the study was made with."""
        with replayed(self._log.name):
            return dict(self._board.attributes[META])

    @property
    def total(self) -> int:
        return total(self._config.search, self._config.axes)

    @property
    def results(self) -> list[TrialResult]:
        """All finished trials: those of the search by number, then the confirming runs in their order."""
        return self._board.results

    @property
    def seconds(self) -> float:
        """Time that the search had taken when its last trial was recorded."""
        return self._board.seconds

    @property
    def peak(self) -> Peak:
        """Memory that the run took, over all its workers."""
        with replayed(self._log.name):
            return peak_of(self._board.attributes)

    @property
    def holders(self) -> set[str]:
        """The workers that hold trials."""
        return self._board.held.keys() - {""}

    def turn(
        self,
        results: Iterable[TrialResult] = (),
        *,
        most: int = 0,
        least: int = 0,
        lapsed: Collection[str] = (),
        elapsed: float = 0.0,
        late: bool = False,
        peak: Peak | None = None,
    ) -> Turn:
        """Record results, and take trials to run.

        Args:
            most: trials to take, and of them
            least: so many even where the sampler should rather see results first.
            lapsed: workers whose leases have lapsed.
            elapsed: seconds that the search has taken.
            late: whether its time is over, and no new recipes are tried.
            peak: memory taken so far.

        Raises:
            InputError: the log holds what it should not.
            RunFailedError: the log can't be reached or written. The results are not recorded.
        """
        done = list(results)
        self.look()
        drafts = self._draft(done, most, least, late) if self._config.search.sampler == "tpe" else []

        def act() -> list[Item]:
            self._record(done, elapsed, peak)
            self._take_from(lapsed)
            self._read()
            return self._take(most, least, late, drafts) if most else []

        taken = self._in_turn(act)
        news = self._board.finished[self._known :]
        self._known = len(self._board.finished)
        return Turn(taken, news, self._is_over(late))

    def look(self) -> bool:
        """Whether something has changed since the last turn, without waiting for one's own."""
        self._log.catch_up()
        before = self._cursor.seen
        self._read()
        return self._cursor.seen > before

    def give_back(self) -> None:
        """Let others have what this worker holds."""

        def act() -> None:
            for item in self._held():
                self._entries.attribute(item.id, HOLDER, ["", item.lost])

        self._in_turn(act)

    def _held(self) -> list[Item]:
        return list(self._board.held.get(self.worker, {}).values())

    def _read(self) -> None:
        with replayed(self._log.name):
            for entry in self._log.read(self._cursor):
                self._board.apply(entry)
            news = self._board.finished[self._told :]
            check_values(news, self._config.axes)
        self._told = len(self._board.finished)
        if self._config.search.sampler == "tpe":
            self._seen.ask([item.values for item in self._board.search[self._asked :]])
            self._asked = len(self._board.search)
            self._tell_tpe(news)

    def _tell_tpe(self, results: Iterable[TrialResult]) -> None:
        for result in results:
            if result.phase is Phase.SEARCH:
                self._seen.tell(result.trial, result)

    def _record(self, results: Iterable[TrialResult], elapsed: float, peak: Peak | None) -> None:
        of_items = [(self._board.of(result), result) for result in results]
        new = [(i, r) for i, r in of_items if i.result is None and (i.holder == self.worker or not r.error)]
        searched = [item for item, _ in new if item.phase is Phase.SEARCH]
        if searched and elapsed > self.seconds:  # before it is told: to a finished trial Optuna lets nobody add
            self._entries.attribute(searched[-1].id, ELAPSED, round(elapsed, 3))
        for item, result in new:
            self._finish(item, result)
        if peak is not None and (larger := self.peak.over(peak)) != self.peak:
            self._entries.study_attribute(PEAK, vars(larger))

    def _finish(self, item: Item, result: TrialResult) -> None:
        self._entries.attribute(item.id, RESULT, result.record())
        self._tell(item, result)

    def _tell(self, item: Item, result: TrialResult) -> None:
        self._entries.told(item.id, result, constraint=self._config.search.sampler != "cmaes")

    def _take_from(self, lapsed: Collection[str]) -> None:
        """Give back what vanished workers held; what has lost too many is an error."""
        held = (self._board.held.get(worker, {}) for worker in lapsed if worker != self.worker)
        for item in [item for items in held for item in items.values()]:
            lost, retries = item.lost + 1, self._config.run.retries
            self._entries.attribute(item.id, HOLDER, ["", lost])
            if lost >= retries:
                values = self._config.recipe_of(item.values).values()
                error = f"lost: {lost} workers vanished while they trained it, the last one was {item.holder}"
                self._finish(item, TrialResult(item.trial, item.phase, item.seed, values, error=error))

    def _draft(self, done: Iterable[TrialResult], most: int, least: int, late: bool) -> list[dict[str, Scalar]]:
        """Recipes to ask for in the turn, as far as can be told before it."""
        good = [result for result in done if not result.error]  # of a lapsed worker, errors don't count
        self._tell_tpe(good)
        size = 0 if late or "" in self._board.held else self._to_ask(most, least, ended=len(good))
        return self._from_tpe(size)

    def _take(self, most: int, least: int, late: bool, drafts: list[dict[str, Scalar]]) -> list[Item]:
        held = self._held()
        alone = max(1, min(ALONE, self._config.run.retries - 1))
        if any(item.lost >= alone for item in held):
            return []
        free = self._board.held.get("", {}).values()
        if not held and (suspect := next((item for item in free if item.lost >= alone), None)):
            return self._claim([suspect])
        taken = self._claim([item for item in free if item.lost < alone][:most])
        if not late and self._unasked > 0:
            taken += self._ask(self._to_ask(most - len(taken), least - len(taken)), drafts)
        elif len(taken) < most and self._is_searched(late):
            jobs = [job for job in self.wanted() if job not in self._board.confirm]
            taken += self._confirm(jobs[: min(most - len(taken), self._share(len(jobs)))])
        return taken

    @property
    def _unasked(self) -> int:
        return self.total - len(self._board.search)

    def _to_ask(self, most: int, least: int, ended: int = 0) -> int:
        """How many trials this worker may ask for.

        Args:
            ended: trials under way whose results are not recorded yet.
        """
        room = max(least, self.total // 4 - (self._board.searching - ended))
        return max(0, min(most, self._share(self._unasked), room))

    def _share(self, left: int) -> int:
        """Guided self-scheduling (Polychronopoulos and Kuck, IEEE Trans. Computers 36, 1987)."""
        return -(-left // (SHARE * len(self.holders | {self.worker})))

    def _claim(self, items: list[Item]) -> list[Item]:
        for item in items:
            self._entries.attribute(item.id, HOLDER, [self.worker, item.lost])
        return items

    def _ask(self, size: int, drafts: list[dict[str, Scalar]]) -> list[Item]:
        first = len(self._board.search)
        numbers, name = range(first, first + size), self._config.search.sampler
        if name in ("tpe", "random"):
            if name == "random":
                recipes = block_at_random(self._axes, self._random, self._config.search, numbers)
            else:
                recipes = drafts or self._from_tpe(size)
            for recipe in recipes[:size]:
                self._entries.asked(recipe, {HOLDER: [self.worker, 0]})
            self._read()
            return self._board.search[first:]
        for number in numbers:
            self._ask_storage(number)
        self._read()
        return self._claim(self._board.search[first:])

    def _from_tpe(self, size: int) -> list[dict[str, Scalar]]:
        """Others may ask at the same moment, knowing the same: the worker's name keeps their seeds apart."""
        if not size:
            return []
        return self._tpe.block(self._seen, size, mixed_seed(self._own_seed, len(self._board.search)))

    def _ask_storage(self, number: int) -> None:
        if self._study is None:
            storage = optuna.storages.JournalStorage(cast("BaseJournalBackend", self._log))
            self._study = optuna.load_study(storage=storage, study_name=Phase.SEARCH)
        with replayed(self._log.name):
            ask(self._study, self._config.search, self._config.axes, number)

    def _confirm(self, jobs: list[tuple[int, int]]) -> list[Item]:
        for trial, seed in jobs:
            attributes = {CONFIRMS: [trial, seed], HOLDER: [self.worker, 0]}
            self._entries.begun(self._board.studies[Phase.CONFIRM], attributes)
        self._read()
        return [self._board.confirm[job] for job in jobs]

    def wanted(self) -> list[tuple[int, int]]:
        """(trial, seed) of the confirming runs that there are to be."""
        if self._best[0] != self._board.searched:  # else nothing has come that could change it
            jobs = [(result.trial, seed) for result, seed in confirming_runs(self.results, self._config)]
            self._best = self._board.searched, jobs
        return self._best[1]

    def _is_searched(self, late: bool) -> bool:
        return not self._board.searching and (late or self._unasked <= 0)

    def _is_over(self, late: bool) -> bool:
        if self._board.held or not self._is_searched(late):
            return False
        return all(job in self._board.confirm for job in self.wanted())
