"""Trials a second of a study that several processes share, on each storage; and whether any is lost or run twice.

    python tests/bench/storages.py                    # about ten minutes; needs Debian's postgresql and redis-server
    python tests/bench/storages.py --quick            # two minutes
    python tests/bench/storages.py --only file,database --sampler tpe --workers 8

Nothing is trained: a trial sleeps, and its result is made up. Ours: the log in a file with the kernel's lock (`file`)
or with one that is a file (`file lock`), and in PostgreSQL (`database`); once with a turn for each trial, once with turns
as workers take them, one a second (`batches`). The peers are Optuna's storages with plain ask and tell: `rdb` on the
same PostgreSQL, `journal` on a file, `redis`. They keep four numbers of a trial; ours the whole result with its loss
curve, and it gives each trial to one worker and stops at the total, which theirs do not.

Trials that take no time show what the storage can do; those of 50 ms, how busy it keeps the workers: so many could
do 20 trials a second each. A dash: not measured. The machine's load before the run is printed: other work on it falsifies all this.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import servers
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from rich.console import Console
from rich.table import Table
from traffic import Done, optunas, ours, study, together

from recipefuzz.database import DatabaseLog
from recipefuzz.entry_log import EntryLog
from recipefuzz.journal import Journal
from recipefuzz.locks import Lock
from recipefuzz.result import Phase
from recipefuzz.store import Store

OURS = ("file", "file lock", "database")
PEERS = ("rdb", "journal", "redis")


@dataclass(frozen=True)
class Case:
    storage: str
    sampler: str
    workers: int
    duration: float
    batches: bool
    trials: int


@dataclass(frozen=True)
class Measured:
    seconds: float
    trials: int
    lost: int
    doubled: int
    turns: list[float]


@dataclass(frozen=True)
class Servers:
    folder: Path
    postgres: str
    redis: str


@contextmanager
def started() -> Iterator[Servers]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        servers.postgres() as database,
        servers.redis() as redis,
    ):
        yield Servers(Path(folder), database, redis)


def measure(case: Case, at: Servers, name: str) -> Measured:
    """Args: name: of a study that is not there yet."""
    return _ours(case, at, name) if case.storage in OURS else _optunas(case, at, name)


def _log(case: Case, at: Servers, name: str, *, write: bool) -> EntryLog:
    if case.storage == "database":
        return DatabaseLog(at.postgres, name, write=write)
    lock = Lock.FILE if case.storage == "file lock" else Lock.KERNEL
    return Journal(at.folder / f"{name}.journal", write=write, shared=True, lock=lock)


def _ours(case: Case, at: Servers, name: str) -> Measured:
    config = study(case.trials, case.sampler)
    work = functools.partial(ours, functools.partial(_log, case, at, name, write=True), config)
    jobs = [functools.partial(work, f"w{n}", case.duration, batches=case.batches) for n in range(case.workers)]
    seconds, done = together(jobs)
    with contextlib.closing(Store(_log(case, at, name, write=False), write=False)) as store:
        return _measured(seconds, done, {result.trial for result in store.results()}, case.trials)


def _optunas(case: Case, at: Servers, name: str) -> Measured:
    made: dict[str, Callable[[], Any]] = {
        "rdb": lambda: optuna.storages.RDBStorage(_database_of(at.postgres, name)),
        "journal": lambda: optuna.storages.JournalStorage(JournalFileBackend(str(at.folder / f"{name}.log"))),
        "redis": lambda: optuna.storages.JournalStorage(JournalRedisBackend(at.redis, prefix=name)),
    }
    open_storage = made[case.storage]
    optuna.create_study(study_name=Phase.SEARCH, storage=open_storage())
    each = case.trials // case.workers
    jobs = [
        functools.partial(optunas, open_storage, case.sampler, seed, each, case.duration)
        for seed in range(case.workers)
    ]
    seconds, done = together(jobs)
    trials = optuna.load_study(study_name=Phase.SEARCH, storage=open_storage()).trials
    return _measured(seconds, done, {t.number for t in trials if t.state.is_finished()}, each * case.workers)


def _database_of(url: str, name: str) -> str:
    """One of its own for each study: Optuna's tables hold all of a database's."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("select 1 from pg_database where datname = %s", (name,)).fetchone() is None:
            connection.execute(f'create database "{name}"')
    return url.rpartition("/")[0].replace("postgresql://", "postgresql+psycopg2://") + f"/{name}"


def _measured(seconds: float, done: list[Done], finished: set[int], trials: int) -> Measured:
    given = [number for worker in done for number in worker.given]
    turns = sorted(turn for worker in done for turn in worker.turns)
    return Measured(seconds, trials, trials - len(finished), len(given) - len(set(given)), turns)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Fewer trials of what is slow: each case is to take some seconds."""
    workers = [int(n) for n in args.workers.split(",")]
    scale = 1 if args.quick else 4
    for storage in args.only.split(","):
        for sampler in args.sampler.split(","):
            for count in workers:
                for duration in (0.0, 0.05):
                    for batches in (False, True) if storage in OURS else (False,):
                        fast = 2000 if batches and not duration else 250
                        trials = min(fast, 40 * count) if duration else 100 if storage in PEERS else fast
                        yield Case(storage, sampler, count, duration, batches, trials * scale)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*OURS, *PEERS)), help=f"some of {','.join((*OURS, *PEERS))}")
    parser.add_argument("--sampler", default="random,tpe", help="some of random,tpe")
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - {*OURS, *PEERS}:
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join((*OURS, *PEERS))}")
    return args


def main() -> None:
    args, load = arguments(), os.getloadavg()[0]
    rows: dict[tuple[str, str, str, str], dict[int, Measured]] = {}
    with started() as at:
        for number, case in enumerate(cases(args)):
            found = measure(case, at, f"study{number}")
            print(
                case,
                f"{found.trials / found.seconds:.1f} trials/s, lost {found.lost}, doubled {found.doubled}",
                file=sys.stderr,
            )
            turns = "batches" if case.batches else "one a trial"
            row = case.storage, case.sampler, turns, f"{1000 * case.duration:.0f} ms"
            rows.setdefault(row, {})[case.workers] = found
    counts = sorted({count for found in rows.values() for count in found})
    title = f"trials a second, by workers; {len(os.sched_getaffinity(0))} cores, load {load:.1f} before"
    columns = [f"{count}" for count in counts]
    table = Table(
        "storage", "sampler", "turns", "trial", *columns, "turn ms: half, 95 %", "lost", "doubled", title=title
    )
    for row, found in rows.items():
        most = found[max(found)]
        half, late = (1000 * most.turns[int(share * len(most.turns))] for share in (0.5, 0.95))
        speeds = [f"{found[n].trials / found[n].seconds:.1f}" if n in found else "-" for n in counts]
        lost, doubled = (str(sum(getattr(m, what) for m in found.values())) for what in ("lost", "doubled"))
        table.add_row(*row, *speeds, f"{half:.1f}, {late:.1f}", lost, doubled)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
