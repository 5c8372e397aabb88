"""What limits a study of 1,000 workers: the log's turns, the sampler, what everybody reads, or signs of life.

    python tests/bench/thousand_workers.py            # some minutes; needs Debian's postgresql
    python tests/bench/thousand_workers.py --quick    # a minute: up to 10,000 trials
    python tests/bench/thousand_workers.py --network 0.0005   # each message to the database takes half a millisecond

Nothing is trained. A study is filled to so many trials; then workers take turns with one trial each, on the real file
and the real PostgreSQL, through the code that workers run: two alternate, so that each finds what the other wrote, and
act for all in turn; a witness has one turn in a thousand, and reads what came since. Measured of each turn is how
long it had the log for itself, and how long it took beside that. How 1,000 workers with these times wait for each other
is then simulated (`queueing`), with trials of 1, 10 and 60 s on average. So it is the log that is real, and the
crowd, its machines and its network that are not: a network filesystem adds its round trips to each turn (some five),
PostgreSQL two. The machine's load before the run is printed: other work on it makes all times longer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import servers
from queueing import Service, least_mean, simulate
from rich.console import Console
from rich.table import Table
from traffic import Open, made_up, study

from recipefuzz import journal, locks
from recipefuzz.config import Config
from recipefuzz.database import DatabaseLog
from recipefuzz.entry_log import EntryLog
from recipefuzz.journal import Journal
from recipefuzz.leases import BEATS
from recipefuzz.sharing import SharedStudy
from recipefuzz.working import WATCHED

WORKERS = (10, 100, 1000)
MEANS = (1.0, 10.0, 60.0)
BUSY = 0.95
FILL = 2000  # trials a turn while a study is filled
TURNS = 1000  # measured
POLLS = {"file": (locks.FIRST_PAUSE, locks.GROWTH, locks.LONGEST_PAUSE), "database": None}
ROUND_TRIPS = {"file": 5, "database": 2}  # of a turn, alone with the log


@dataclass(frozen=True)
class Measured:
    """Of a study of so many trials; seconds, but for the bytes.

    Attributes:
        alone, beside: of a turn with one trial, by those who alternate.
        each: more of `alone` for each further trial.
        news: to read what 1,000 turns of others wrote.
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
        self.alone, self.synced = list[float](), list[float]()
        log._alone = self._clocked(log._alone)
        if isinstance(log, Journal):
            log._sync = self._clocked_sync(log._sync)

    def _clocked(self, alone):
        @contextmanager
        def clocked() -> Iterator[None]:
            start, before = time.perf_counter(), sum(self.synced)
            with alone():
                yield
            self.alone.append(time.perf_counter() - start - (sum(self.synced) - before))

        return clocked

    def _clocked_sync(self, sync):
        def clocked() -> None:
            start = time.perf_counter()
            sync()
            self.synced.append(time.perf_counter() - start)

        return clocked

    def turn(self, held: list, most: int) -> tuple[list, float]:
        """Results of what is held, for others; seconds of the turn that are the worker's own."""
        done = [made_up(self._config, item) for item in held]
        self.synced.clear()
        if isinstance(self._log, Journal):
            self._log._synced = -journal.SYNC_SECONDS  # of a worker with trials of seconds, each turn is synced
        start = time.perf_counter()
        taken = self.study.turn(done, most=most, least=most).taken
        return taken, time.perf_counter() - start - self.alone[-1]


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
        start = time.perf_counter()
        witness = Worker(opened(), config, "witness")
        join = time.perf_counter() - start
        two = Worker(opened(), config, "two")
        size = _bytes(open_log) / trials
        alone, beside, synced = _alternate(one, two, TURNS, 1)
        start = time.perf_counter()
        witness.study.look()
        news = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(10):
            witness.study._from_tpe(1)
        ask = (time.perf_counter() - start) / 10
        many, _, _ = _alternate(one, two, 20, 21)
        return Measured(trials, alone, beside, max(0.0, many - alone) / 20, news, synced, ask, join, size)


def _alternate(one: Worker, two: Worker, turns: int, size: int) -> tuple[float, float, float]:
    """Medians, of turns that end and begin so many trials: means would be those of the machine's other work."""
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
    first = turns // 10  # in which nothing ended
    alone = statistics.median([*one.alone[first:], *two.alone[first:]])
    return alone, statistics.median(beside[first:]), statistics.median(synced) if synced else 0.0


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
        writes = [_seconds(lambda name=name: log.beat(name, "0", {"host": "node17", "holds": 3})) for name in names]
        reads = [_seconds(lambda at=at: log.beats(names[at : at + WATCHED])) for at in range(0, 900, 9)]
    return Beats(statistics.median(writes), statistics.median(reads))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def service(storage: str, found: Measured, network: float) -> Service:
    """Of one of 1,000 workers: it reads what the others wrote, and syncs, beside the log."""
    alone = found.alone + network * ROUND_TRIPS[storage]
    return Service(alone, found.each, found.beside + found.news + found.sync, POLLS[storage])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="studies of up to 10,000 trials")
    parser.add_argument("--network", type=float, default=0.0, help="seconds of a round trip that the loopback does not have")
    return parser.parse_args()


def main() -> None:
    args, load = arguments(), os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 150)
    counts = (1000, 10_000) if args.quick else (1000, 10_000, 100_000)
    title = f"a turn, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before; ms unless told"
    costs = Table("storage", "trials", "alone", "a trial more", "beside", "sync", "1,000 turns' news", "TPE ask", "join s", "bytes a trial", title=title)
    waits = Table("storage", "trials", "workers", *(f"{mean:g} s: busy, trials/s, turns/s" for mean in MEANS), f"{BUSY:.0%} busy from", title=f"simulated, a network round trip of {1000 * args.network:g} ms")
    signs = Table("storage", "beat ms", f"look at {WATCHED} ms", "beats/s of 1,000", "looks/s of 1,000", title="signs of life")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, servers.postgres() as database:
        for storage in POLLS:
            for trials in counts:

                def open_log(storage: str = storage, trials: int = trials) -> EntryLog:
                    if storage == "database":
                        return DatabaseLog(database, f"s{trials}", write=True)
                    return Journal(Path(folder) / f"{trials}.journal", write=True, shared=True)

                found = measure(open_log, trials)
                times = (found.alone, found.each, found.beside, found.sync, found.news, found.ask)
                costs.add_row(storage, f"{trials:,}", *(f"{1000 * t:.2f}" for t in times), f"{found.join:.2f}", f"{found.size:.0f}")
                for workers in WORKERS:
                    turn = service(storage, found, args.network)
                    cells = [simulate(turn, workers, mean) for mean in MEANS]
                    least = least_mean(turn, workers, BUSY)
                    waits.add_row(storage, f"{trials:,}", f"{workers:,}", *(f"{c.busy:.1%}, {c.trials:.0f}, {c.turns:.0f}" for c in cells), f"{least:.2g} s")
                print(storage, found, file=sys.stderr)
            sign, pause = beats(open_log), study(1, "tpe").run.lease / BEATS
            signs.add_row(storage, f"{1000 * sign.write:.2f}", f"{1000 * sign.read:.2f}", f"{1000 / pause:.0f}", f"{1000 / pause:.0f}")
    for table in (costs, waits, signs):
        console.print(table)


if __name__ == "__main__":
    main()
