"""One worker of a shared study: takes trials and trains them, until nothing is left or it is told to stop."""

from __future__ import annotations

import contextlib
import time
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from recipefuzz.board import Item
from recipefuzz.config import Config
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Engine, Job, Outcome
from recipefuzz.engines.select import open_engine, pick_device, worker_devices
from recipefuzz.entry_log import EntryLog
from recipefuzz.errors import RecipefuzzError, RunFailedError
from recipefuzz.leases import BEATS, Heart, Watch, new_worker
from recipefuzz.listening import Listener
from recipefuzz.peak import Peak, megabytes
from recipefuzz.result import Phase
from recipefuzz.run_folder import RunFolder, fingerprints
from recipefuzz.searched import Clock, SearchResult, explain, report, to_result
from recipefuzz.sharing import SharedStudy, Turn
from recipefuzz.stopping import Stop
from recipefuzz.targets.resolve import resolve, user_files
from recipefuzz.targets.task import Task

TURN_SECONDS = 1.0  # between turns, at least, as long as there is something to train: fast trials share one
TURN_SHARE = 20  # and so many times what a turn takes: of a slow or busy log's workers, 5 % of the time goes to it
MOST = 4096  # trials that a worker holds
WATCHED = 8  # workers that each worker watches at first: all of a thousand, and they read a million signs of life
IDLE_SECONDS = (0.1, 5.0)  # between looks at the log, when the last trials are being run by others: first, and at most


def work(config: Config, folder: RunFolder, listener: Listener, stop: Stop) -> bool:
    """Train what the run has to train, beside its other workers.

    Args:
        config: that of the run, but for `run.workers` and the like.
        stop: listened to; what this worker has not finished by then, it gives back.

    Returns:
        Whether nothing is left to be done, by nobody.

    Raises:
        InputError: the user's code can't be run here, or it is not the code that the run was made with.
        RunFailedError: the log can't be reached or written; what was recorded is kept.
    """
    task = resolve(config)
    with shared(config, folder, task, listener, joins=True) as shift:
        return shift.work(stop)


def search_shared(config: Config, task: Task, folder: RunFolder, listener: Listener, *, fresh: bool) -> SearchResult:
    """A search that others may join: one more worker, and the tables once nothing is left to be done.

    Raises:
        SystemExit: it was told to stop, as by `Stop`.
    """
    with shared(config, folder, task, listener, fresh=fresh) as shift:
        try:
            with Stop() as stop:
                over = shift.work(stop)
                shift.leave()  # before the tables: what is finished is to be in them
            if over:
                explain(config, task, folder, shift.study.results, listener)
        except BaseException as error:
            with contextlib.suppress(RecipefuzzError):  # a full disk: the first error is the one to show
                if not isinstance(error, RunFailedError):
                    shift.leave()
                if shift.study.results:  # none are known after a turn that failed: the tables stay as they are
                    report(folder, config, shift.study.results, shift.study.peak)
            raise
        found = report(folder, config, shift.study.results, shift.study.peak)
    if not over and stop.signal is not None:
        stop.pass_on()
        raise SystemExit(128 + stop.signal)
    return found


def finish(config: Config, folder: RunFolder, listener: Listener) -> SearchResult:
    """Write the tables of a run when its workers are done; then explain its failures, and write them again.

    What was explained is kept, so a job whose time is up in the midst of it goes on from there.
    """
    results, _, peak = folder.read(config)
    found = report(folder, config, results, peak)
    if not folder.is_of(config, fingerprints(user_files(config))):
        listener.say("the config or the code has changed since the run was made: its failures are not explained")
        return found
    explain(config, resolve(config), folder, results, listener)
    return report(folder, config, results, peak)


@contextmanager
def shared(
    config: Config, folder: RunFolder, task: Task, listener: Listener, *, fresh: bool = False, joins: bool = False
) -> Iterator[Shift]:
    """As a worker of the run, whose signs of life the others see. Arguments as for `RunFolder.share`."""
    worker, about = new_worker()
    part = folder.share(config, fingerprints(user_files(config)), worker, fresh=fresh, joins=joins)
    with contextlib.closing(part.log):
        heart = Heart(folder.log(config, write=True), worker, config.run.lease, about)
        try:
            left = part.study.total + config.search.confirm.top * config.search.confirm.seeds
            ahead = Ahead(left, done=len(part.study.results))
            with contextlib.closing(open_engine(config, task, listener.say, ahead)) as engine:
                shift = Shift(config, part.log, part.study, engine, heart, listener)
                try:
                    yield shift
                except RunFailedError:  # the log is out of reach: what this worker holds is free when its lease lapses
                    raise
                except BaseException:
                    with contextlib.suppress(RecipefuzzError):  # the first error is the one to show
                        shift.leave()
                    raise
                shift.leave()
        finally:
            heart.stop()


@dataclass(frozen=True)
class Pace:
    """How many trials a worker holds, and how often it takes its turn.

    Attributes:
        busy: trials that keep all its processes and lanes busy.
        full: with those that wait beside the lanes.
    """

    busy: int
    full: int

    @classmethod
    def of(cls, config: Config, engine: Engine) -> Pace:
        processes = max(1, len(worker_devices(pick_device(config), config.run.workers)))
        lanes = engine.lanes
        return cls(processes * max(1, lanes - lanes // 4), processes * max(1, lanes + lanes // 4))

    def pause(self, turn: float) -> float:
        """Seconds from turn to turn.

        Args:
            turn: that the last one took.
        """
        return max(TURN_SECONDS, TURN_SHARE * turn)

    def room(self, rate: float, turn: float) -> int:
        """Trials to hold after a turn, so that there is enough to do until the next.

        Args:
            rate: trials that this worker finishes in a second.
        """
        return min(MOST, max(self.full, self.busy + round(rate * self.pause(turn))))


class Shift:
    """A worker's time at a study."""

    def __init__(
        self, config: Config, log: EntryLog, study: SharedStudy, engine: Engine, heart: Heart, listener: Listener
    ) -> None:
        self._config, self._log, self.study, self._engine = config, log, study, engine
        self._heart, self._listener = heart, listener
        self._watch, self._looked, self._gone = Watch(config.run.lease, heart.clock), 0.0, set[str]()
        self._breadth = WATCHED
        self._clock = Clock(config.search.time, study.seconds)
        self._pace = Pace.of(config, engine)
        self._held: dict[tuple[int, int], Item] = {}
        self._done: list[Outcome] = []
        self._began, self._finished = time.monotonic(), 0
        self._turn_took, self._last_turn = 0.0, 0.0
        self._phase: Phase | None = None

    def work(self, stop: Stop) -> bool:
        """Until nothing is left, or it is to stop; whether nothing is left."""
        pause = IDLE_SECONDS[0]
        while stop.signal is None:
            if self._turn().over:
                return True
            if self._held:
                pause = IDLE_SECONDS[0]
                self._train(stop)
            else:
                pause = self._wait(stop, pause)
        self._listener.say(f"told to stop ({stop.signal.name}): what is not finished is given back")
        return False

    def leave(self) -> None:
        """Record what is finished, and give back what is not."""
        self._turn(leaving=True)
        self.study.give_back()

    def _turn(self, *, leaving: bool = False) -> Turn:
        results = [to_result(self._config, o, self._held[o.job.key, o.job.seed].phase) for o in self._done]
        start, lapsed, under_way = time.monotonic(), self._lapsed(), len(self._held) - len(results)
        rate = (self._finished + len(results)) / max(start - self._began, 1.0)
        room = 0 if leaving else self._pace.room(rate, self._turn_took) - under_way
        peak = max((outcome.peak for outcome in self._done), default=0)
        turn = self.study.turn(
            results,
            most=max(0, room),
            least=max(0, self._pace.busy - under_way),
            lapsed=lapsed,
            elapsed=self._clock.seconds,
            late=self._clock.over,
            peak=Peak(megabytes(), peak),
        )
        with contextlib.suppress(RunFailedError):  # they are shown as gone, too, where this fails
            for worker in lapsed:
                self._log.beat(worker, "", None)
        for outcome in self._done:
            del self._held[outcome.job.key, outcome.job.seed]
        self._finished += len(results)
        self._done.clear()
        self._last_turn = time.monotonic()
        self._turn_took = self._last_turn - start
        self._tell(turn)
        for item in turn.taken:
            if (item.trial, item.seed) in self._held:
                continue  # lost to another, who was lost, and it is still being trained here
            self._held[item.trial, item.seed] = item
            recipe = self._config.recipe_of(item.values)
            self._engine.submit(Job(item.trial, recipe, item.seed, whole=item.phase is Phase.CONFIRM))
        self._heart.tell(holds=len(self._held))
        return turn

    def _train(self, stop: Stop) -> None:
        """Until it is time for another turn: too little is left to do, or enough time has passed."""
        while self._held:
            outcomes = stop.unless_told(self._engine.collect) or []
            self._done += outcomes
            under_way = len(self._held) - len(self._done)
            late = time.monotonic() - self._last_turn >= self._pace.pause(self._turn_took)
            if stop.signal is not None or not outcomes or under_way < self._pace.busy or late:
                return

    def _wait(self, stop: Stop, pause: float) -> float:
        """For others, who run the last trials; returns how long to wait the next time."""
        stop.sleep(pause)
        while stop.signal is None and not self.study.look() and not self._lapsed():
            pause = min(1.5 * pause, IDLE_SECONDS[1])
            stop.sleep(pause)
        return pause

    def _lapsed(self) -> set[str]:
        """Workers that hold trials and are gone, of those that follow this one in a ring of their names.

        Of WATCHED at first; who finds some gone watches twice as many from then on, so that of a thousand that are gone
        at once, the last are found after seven leases, not after a hundred.
        """
        if time.monotonic() - self._looked >= self._config.run.lease / BEATS:
            self._looked = time.monotonic()
            ring = sorted(self.study.holders - {self.study.worker})
            at = bisect(ring, self.study.worker)
            watched = [*ring[at:], *ring[:at]][: self._breadth]
            marks = {worker: beat.mark for worker, beat in self._log.beats(watched).items()}
            self._gone = self._watch.lapsed(watched, marks)
            self._breadth *= 2 if self._gone else 1
        return self._gone & self.study.holders

    def _tell(self, turn: Turn) -> None:
        """The listener hears of all trials, whoever ran them."""
        comes = self._phase is None
        for phase in Phase:
            news = [result for result in turn.news if result.phase is phase]
            if self._phase is None or (news and phase is not self._phase):
                total = self.study.total if phase is Phase.SEARCH else len(self.study.wanted())
                done = news if comes else []  # what there was before this worker came
                self._listener.begin(phase, done, total)
                self._phase, news = phase, news[len(done) :]
            for result in news:
                self._listener.finished(result)
