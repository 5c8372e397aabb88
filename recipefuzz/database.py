"""The log of a study in PostgreSQL: a row a batch.

Optuna's own `RDBStorage` makes some twenty statements of each trial and holds no batches together; as a log, with two
messages to the server a turn, a trial costs a fraction of that (`tests/bench/storages.py`), and the format stays the
one that `optuna.storages.JournalStorage` reads. Turns are kept apart by an advisory lock, which the server lets go of
when its holder's connection is gone.

libpq finds the password: in PGPASSWORD, in the file that PGPASSFILE names, in ~/.pgpass or in a service file. It is
never in the config, hence in none of the files that are written.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from recipefuzz.entry_log import Beat, Entry, EntryLog, TurnLostError, was_put_aside
from recipefuzz.errors import InputError, Place, RunFailedError

if TYPE_CHECKING:
    import psycopg

PATIENCE = 600.0  # seconds: a server that is restarted, or moved to another machine, is there again by then
BEAT_PATIENCE = 2.0  # a sign of life that comes late is worth nothing, and there will be others
TABLES = """
create table if not exists recipefuzz_batches (
    study text, number integer, entries text not null, count integer not null, token text not null,
    primary key (study, number));
create table if not exists recipefuzz_workers (
    study text, worker text, mark text not null, about text not null, seen timestamptz not null default now(),
    primary key (study, worker));
"""

NEWS = "select number, count, entries from recipefuzz_batches where study = %s and number > %s order by number"
TURN = "select pg_advisory_xact_lock(hashtext(%s))"
FIRST = "select token from recipefuzz_batches where study = %s and number = 1; "

# a worker that is suspended in its turn loses it, or all would wait for it
BEGIN = "set idle_in_transaction_session_timeout = '60s'; select to_regclass('recipefuzz_workers')"

# unless the URL says otherwise. A server whose machine is gone says nothing: a wait for it would end after two hours
# (tcp(7))
CONNECTION = {"connect_timeout": 10, "application_name": "recipefuzz", "tcp_user_timeout": 60_000}
CONNECTION |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

T = TypeVar("T")


class DatabaseLog(EntryLog):
    """The log of one study in a database.

    Args:
        url: `postgresql://user@host:port/database`, without a password.
        study: its name.
        write: to write it, too.

    Raises:
        InputError: there is no such server, or it refuses the user, or knows no such database.
        RunFailedError: later, it has been out of reach for PATIENCE seconds.
    """

    def __init__(self, url: str, study: str, *, write: bool) -> None:
        super().__init__(f"{url} ({study})", write=write)
        self._url, self._study = url, study
        self._token = f"{random.SystemRandom().getrandbits(64):x}"
        self._turns = 0
        self._first = ""  # token of the study's first batch, by which it is told from another one of its name
        self._tail: tuple[int, list[str]] = 0, []  # batches that are fetched and not parsed yet, and what precedes them
        self._psycopg = _driver()
        self._connection: psycopg.Connection[Any] | None = None
        try:
            self._connect()
        except self._psycopg.Error as error:
            self.close()
            raise InputError(
                f"can't open the database: {str(error).strip().splitlines()[0]}",
                place=Place(url),
                fix="is the server there, and the database, and the password in PGPASSWORD, PGPASSFILE or ~/.pgpass?",
            ) from error

    def _connect(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            theirs = self._psycopg.conninfo.conninfo_to_dict(self._url)
            self._connection = self._psycopg.connect(**CONNECTION | theirs, autocommit=True)
            cursor = self._connection.execute(BEGIN)
            cursor.nextset()
            row = cursor.fetchone()
            if row == (None,):
                with self._connection.transaction():  # two that make a table at the same moment disturb each other
                    self._connection.execute("select pg_advisory_xact_lock(hashtext('recipefuzz tables'))")
                    self._connection.execute(TABLES)
        return self._connection

    def _again(self, what: Callable[[], T], patience: float | None = None) -> T:
        """Do it, with a new connection where the old one is gone, until the patience is spent."""
        patience = PATIENCE if patience is None else patience
        end, pause = time.monotonic() + patience, 0.1
        while True:
            try:
                return what()
            except self._psycopg.Error as error:
                if not self._is_lost(error):
                    problem = f"the database refuses: {str(error).strip()}"
                    raise RunFailedError(problem, place=Place(self._url)) from error
                self.close()
                if time.monotonic() > end:
                    raise RunFailedError(
                        f"the database has been out of reach for {patience:.0f} s: {str(error).strip()}",
                        place=Place(self._url),
                        fix="everything recorded before is kept; run the same command again when it is back",
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - so that not all workers come back at once
            pause = min(2 * pause, 5.0)

    def _is_lost(self, error: psycopg.Error) -> bool:
        """Whether it lies with the connection: a server that ends one may give any reason for that."""
        of_connections = (self._psycopg.OperationalError, self._psycopg.InterfaceError)
        return isinstance(error, of_connections) or self._connection is None or self._connection.closed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """In a transaction with a lock. If the connection is lost in it, so is the lock: see `_store`."""
        try:
            self._again(lambda: self._look(f"begin; {TURN}; ", f"recipefuzz {self._study}"))
            yield
        finally:
            with contextlib.suppress(self._psycopg.Error):
                if self._connection is not None:
                    self._connection.rollback()

    def catch_up(self) -> None:
        self._again(self._look)

    def _look(self, before: str = "", *values: str) -> None:
        """In one message to the server and back, with what is to be done before."""
        with self._psycopg.ClientCursor(self._connect()) as cursor:
            cursor.execute(before + FIRST + NEWS, (*values, self._study, self._study, self._position))
            *_, first, rows = self._answers(cursor)
        self._stay(first)
        if rows:
            self._tail = self._position, [entries for _, _, entries in rows]
            self._position, self._count = rows[-1][0], self._count + sum(count for _, count, _ in rows)

    def _answers(self, cursor: psycopg.ClientCursor[Any]) -> Iterator[list[Any]]:
        """Rows of each statement of a message."""
        while True:
            yield cursor.fetchall() if cursor.description else []
            if not cursor.nextset():
                return

    def _stay(self, first: list[tuple[str]]) -> None:
        """Refuse to go on where the study was put aside: what has its name now is another one."""
        found = first[0][0] if first else ""
        if self._position and found != self._first:
            raise was_put_aside(self.name, "in the database under another name")
        self._first = found

    def _load(self, position: int) -> list[Entry]:
        (start, batches), self._tail = self._tail, (0, [])
        if not batches or start != position:
            batches = self._again(lambda: self._batches(position))
        logs: list[Entry] = json.loads("[" + ",".join(batch[:-1].replace("\n", ",") for batch in batches) + "]")
        return logs

    def _batches(self, position: int) -> list[str]:
        rows = self._connect().execute(NEWS, (self._study, position)).fetchall()
        return [entries for number, _, entries in rows if number <= self._position]

    def _store(self, data: str, *, sync: bool) -> int:  # noqa: ARG002 - the server's settings decide
        """Once, even where the connection was lost and it is not known whether the batch had arrived.

        Another may have had a turn meanwhile: then the number is taken by a batch that is not ours.
        """
        self._turns += 1
        number, token = self._position + 1, f"{self._token}-{self._turns}"
        values = (self._study, number, data, data.count("\n"), token)
        insert = "insert into recipefuzz_batches (study, number, entries, count, token) values (%s, %s, %s, %s, %s)"
        select = "select token from recipefuzz_batches where study = %s and number = %s"

        def write() -> bool:
            with self._psycopg.ClientCursor(self._connect()) as cursor:
                cursor.execute(insert + " on conflict do nothing; commit", values)
                if cursor.rowcount == 1:
                    return True
                row: tuple[str] | None = cursor.execute(select, (self._study, number)).fetchone()
                return row == (token,)

        if not self._again(write):
            raise TurnLostError
        if number == 1:
            self._first = token
        return number

    def beat(self, worker: str, mark: str, about: Mapping[str, Any] | None) -> None:
        def write() -> None:
            if about is None:
                query = "delete from recipefuzz_workers where study = %s and worker = %s"
                self._connect().execute(query, (self._study, worker))
                return
            query = "insert into recipefuzz_workers (study, worker, mark, about) values (%s, %s, %s, %s) on conflict "
            query += "(study, worker) do update set mark = excluded.mark, about = excluded.about, seen = now()"
            self._connect().execute(query, (self._study, worker, mark, json.dumps(dict(about))))

        self._again(write, BEAT_PATIENCE)

    def beats(self, workers: Iterable[str] | None = None) -> dict[str, Beat]:
        def rows() -> list[tuple[str, str, str, float]]:
            query = "select worker, mark, about, extract(epoch from now() - seen) from recipefuzz_workers"
            query += " where study = %s and (%s::text[] is null or worker = any(%s))"
            wanted = None if workers is None else list(workers)
            return self._connect().execute(query, (self._study, wanted, wanted)).fetchall()

        return {worker: Beat(mark, _about(text), float(silent)) for worker, mark, text, silent in self._again(rows)}

    def put_aside(self) -> None:
        """Give the study another name, so that a new one can have this."""

        def rename() -> None:
            with (connection := self._connect()).transaction():
                connection.execute(TURN, (f"recipefuzz {self._study}",))
                names = connection.execute("select distinct study from recipefuzz_batches").fetchall()
                free = next(n for n in itertools.count(1) if (f"{self._study}.old-{n}",) not in names)
                connection.execute(
                    "update recipefuzz_batches set study = %s where study = %s",
                    (f"{self._study}.old-{free}", self._study),
                )
                connection.execute("delete from recipefuzz_workers where study = %s", (self._study,))

        self._again(rename)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(self._psycopg.Error):
                self._connection.close()


def _about(text: str) -> dict[str, Any]:
    """Somebody else may have written it: then nothing is known of that worker."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return {}


def _driver() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise InputError(
            "a study in PostgreSQL needs its driver",
            place=Place(key="run.storage"),
            fix="pip install 'recipefuzz[postgres]'",
        ) from error
    return psycopg
