"""What limits a study of 1,000 workers: the log's turns, the sampler, what everybody reads, or signs of life.

    python tests/bench/thousand_workers.py            # some minutes; needs Debian's postgresql
    python tests/bench/thousand_workers.py --quick    # a minute: up to 10,000 trials

Nothing is trained. A study is filled to so many trials; then workers take turns with one trial each, on the real file
and the real PostgreSQL, through the code that workers run: two alternate, so that each finds what the other wrote, and
act for all in turn; a third reads afterwards what came in a thousand turns. Of each turn is measured how long it had
the log for itself (`alone`: wall time, the lower quartile, which other work on the machine touches least), and what it
cost the worker beside that, while others had their turns (processor time; a sync of the file: wall time, the median).

How 1,000 workers with these times wait for each other is then simulated (`queueing`), with trials of 1, 10 and 60 s on
average. So it is the log that is real, and the crowd, its machines and its network that are not: a network adds so
many round trips to each turn as ROUND_TRIPS says, counted from the calls, not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import servers
from queueing import Service, least_mean, simulate
from rich.console import Console
from rich.table import Table
from row import seconds
from traffic import Open, made_up, study

from recipefuzz import journal, locks
from recipefuzz.board import Item
from recipefuzz.config import Config
from recipefuzz.database import DatabaseLog
from recipefuzz.entry_log import EntryLog
from recipefuzz.journal import Journal
from recipefuzz.leases import BEATS
from recipefuzz.locks import Lock
from recipefuzz.sharing import SharedStudy
from recipefuzz.working import WATCHED

WORKERS = (10, 100, 1000)
MEANS = (1.0, 10.0, 60.0)
NETWORKS = (0.0, 0.0005)  # seconds of a round trip: none but the loopback, a cluster's Ethernet
BUSY = 0.9
FILL = 2000  # trials a turn while a study is filled
TURNS = 1000  # measured
POLLS = {
    "file": (locks.FIRST_PAUSE, locks.GROWTH, locks.LONGEST_PAUSE),
    "file lock": (0.001, 2.0, 1.0),  # Optuna's
    "database": None,
}
ROUND_TRIPS = {  # of a turn, alone with the log
    "file": 7,  # lock, open, read, open, write and commit, close, unlock
    "file lock": 9,  # made; open, read, open, write, commit, close; renamed, removed
    "database": 2,  # lock and news; batch and commit
}


@dataclass(frozen=True)
class Measured:
    """Of a study of so many trials; seconds, but for the bytes.

    Attributes:
        alone, beside: of a turn with one trial.
        each: more of `alone` for each further trial.
        news: to read the trial of one turn of another worker.
        sync: of the file, beside the log.
        ask: TPE's time for one recipe.
        join: until a worker that comes late has read the log.
        size: bytes of the log a trial.
    """

    trials: int
    alone: float
    beside: float
    each: float
    news: float
    sync: float
    ask: float
    join: float
    size: float


class Worker:
    """One of those who act for all, with a clock at its log."""

    def __init__(self, log: EntryLog, config: Config, name: str) -> None:
        self._log, self._config = log, config
        self.study = SharedStudy(log, config, {}, name)
        self.alone, self.inside, self.synced = list[float](), list[float](), list[float]()
        log._alone = self._clocked(log._alone)
        if isinstance(log, Journal):
            log._sync = self._clocked_sync(log._sync)

    def _clocked(self, alone):
        @contextmanager
        def clocked() -> Iterator[None]:
            start, own, before = time.perf_counter(), time.process_time(), sum(self.synced)
            with alone():
                yield
            self.alone.append(time.perf_counter() - start - (sum(self.synced) - before))
            self.inside.append(time.process_time() - own)

        return clocked

    def _clocked_sync(self, sync):
        def clocked() -> None:
            start = time.perf_counter()
            sync()
            self.synced.append(time.perf_counter() - start)

        return clocked

    def turn(self, held: list, most: int) -> tuple[list, float]:
        """Results of what is held, for others; seconds of the turn that are the worker's own."""
        done, taken = [made_up(self._config, item) for item in held], list[Item]()
        self.synced.clear()
        if isinstance(self._log, Journal):
            self._log._synced = -journal.SYNC_SECONDS  # of a worker with trials of seconds, each turn is synced
        own = _own(lambda: taken.extend(self.study.turn(done, most=most, least=most).taken))
        return taken, own - self.inside[-1]


def measure(open_log: Open, trials: int) -> Measured:
    config = study(10 * trials + 20 * TURNS, "tpe")
    with contextlib.ExitStack() as stack:

        def opened() -> EntryLog:
            return stack.enter_context(contextlib.closing(open_log()))

        one = Worker(opened(), config, "one")
        held: list = []
        while len(one.study._board.search) < trials:
            held, _ = one.turn(held, min(FILL, trials - len(one.study._board.search)))
        one.turn(held, 0)
        witnesses: list[Worker] = []
        join = _own(lambda: witnesses.append(Worker(opened(), config, "witness")))
        witness = witnesses[0]
        two = Worker(opened(), config, "two")
        size = _bytes(open_log) / trials
        alone, beside, synced = _alternate(one, two, TURNS, 1)
        news = _own(witness.study.look) / TURNS
        ask = _own(lambda: [witness.study._from_tpe(1) for _ in range(20)]) / 20
        many, _, _ = _alternate(one, two, 20, 21)
        return Measured(trials, alone, beside, max(0.0, many - alone) / 20, news, synced, ask, join, size)


def _alternate(one: Worker, two: Worker, turns: int, size: int) -> tuple[float, float, float]:
    """Of turns that each end and begin so many trials: alone, beside, synced."""
    held, beside, synced = {0: [], 1: []}, [], []
    for worker in (one, two):
        worker.alone.clear()
    for number in range(turns):
        worker = (one, two)[number % 2]
        held[number % 2], own = worker.turn(held[number % 2], size)
        beside.append(own)
        synced += worker.synced
    for number, worker in enumerate((one, two)):
        worker.turn(held[number], 0)
    alone = statistics.quantiles([*one.alone[1:-1], *two.alone[1:-1]], n=4)[0]  # in the first nothing ends
    return alone, statistics.median(beside[2:]), statistics.median(synced) if synced else 0.0


def _bytes(open_log: Open) -> int:
    """Of the whole log, as it is sent to those who read it."""
    with contextlib.closing(open_log()) as log:
        log.catch_up()
        if isinstance(log, Journal):
            return log._position
        return sum(map(len, log._batches(0)))


@dataclass(frozen=True)
class Beats:
    """Seconds of a sign of life, and of a look at those of WATCHED workers."""

    write: float
    read: float


def beats(open_log: Open) -> Beats:
    with contextlib.closing(open_log()) as log:
        names = [f"w{n}" for n in range(1000)]
        writes = [seconds(lambda name=name: log.beat(name, "0", {"host": "node17", "holds": 3})) for name in names]
        reads = [seconds(lambda at=at: log.beats(names[at : at + WATCHED])) for at in range(0, 900, 9)]
    return Beats(statistics.median(writes), statistics.median(reads))


def _own(call: Callable[[], object]) -> float:
    """Processor time: that of the machine's other work is not in it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def service(storage: str, found: Measured, workers: int, network: float) -> Service:
    """Of one of so many workers: beside the log it reads a trial of each other one, and syncs."""
    alone = found.alone + network * ROUND_TRIPS[storage]
    return Service(alone, found.each, found.beside + found.news * workers + found.sync, POLLS[storage])


def opener(storage: str, folder: Path, database: str, trials: int) -> Open:
    def open_log() -> EntryLog:
        if storage == "database":
            return DatabaseLog(database, f"s{trials}", write=True)
        lock = Lock.FILE if storage == "file lock" else Lock.KERNEL
        return Journal(folder / f"{storage}{trials}.journal", write=True, shared=True, lock=lock)

    return open_log


def tables(counts: tuple[int, ...]) -> Iterator[Table]:
    costs = Table(
        "storage",
        "trials",
        "alone",
        "a trial more",
        "beside",
        "sync",
        "TPE ask",
        "another's trial",
        "join, s",
        "bytes a trial",
    )
    costs.title = "a turn, in ms unless told"
    waits = Table(
        "storage",
        "round trip",
        "workers",
        *(f"trials of {mean:g} s" for mean in MEANS),
        f"{BUSY:.0%} busy, unbatched, from",
    )
    waits.title = (
        f"{counts[-1]:,} trials: share of time in which workers train, trials/s, turns/s, MB/s that are read by all"
    )
    signs = Table("storage", "beat, ms", f"look at {WATCHED}, ms", "beats/s of 1,000", title="signs of life")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, servers.postgres() as database:
        for storage in POLLS:
            for trials in counts:
                found = measure(opener(storage, Path(folder), database, trials), trials)
                print(storage, found, file=sys.stderr)
                times = (found.alone, found.each, found.beside, found.sync, found.ask, found.news)
                costs.add_row(
                    storage,
                    f"{trials:,}",
                    *(f"{1000 * t:.2f}" for t in times),
                    f"{found.join:.2f}",
                    f"{found.size:.0f}",
                )
            for network, workers in itertools.product(NETWORKS, WORKERS):
                turn = service(storage, found, workers, network)
                cells = [simulate(turn, workers, mean, batches=True) for mean in MEANS]
                shown = (
                    f"{c.busy:.0%}, {c.trials:.0f}, {c.turns:.0f}, {c.trials * found.size * workers / 1e6:.1f}"
                    for c in cells
                )
                least = f"{least_mean(turn, workers, BUSY):.2g} s"
                waits.add_row(storage, f"{1000 * network:g} ms", f"{workers:,}", *shown, least)
            sign, pause = beats(opener(storage, Path(folder), database, trials)), study(1, "tpe").run.lease / BEATS
            signs.add_row(storage, f"{1000 * sign.write:.2f}", f"{1000 * sign.read:.2f}", f"{1000 / pause:.0f}")
    yield from (costs, waits, signs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="studies of up to 10,000 trials")
    quick, load = parser.parse_args().quick, os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables((1000, 10_000) if quick else (1000, 10_000, 100_000)):
        console.print(table)
    console.print(f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} before")


if __name__ == "__main__":
    main()
