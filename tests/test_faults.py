"""Real processes, servers and disks that fail while a run is shared: nothing is lost, nothing is done twice."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MEDICAL
from postgres import Server
from shared_runs import Process, SharedRun, key, kill_group, shared_run, until

from recipefuzz.config import parse_config
from recipefuzz.database import DatabaseLog
from recipefuzz.entry_log import Cursor, TurnLostError
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.journal import Journal
from recipefuzz.locks import Lock, is_held
from recipefuzz.result import TrialResult
from recipefuzz.sharing import SharedStudy

pytestmark = pytest.mark.slow

FUSED = f"study: faulty\n{MEDICAL}search: {{trials: 120, confirm: {{top: 3, seeds: 2}}}}\n"
SLOWED = """
study: faulty
target: {data: breast_cancer, model: "slowed:build", loss: "slowed:loss"}
space:
  lr: {low: 1e-3, high: 10, log: true}
  init_scale: {low: 0.5, high: 2, log: true}
recipe: {input_norm: standardize, optimizer: momentum}
trial: {steps: 20, extend: 1}
search: {trials: 24, sampler: random, confirm: {top: 3, seeds: 2}}
"""
CODE = """
import os, signal, time
from torch import nn

def loss(output, target):
    time.sleep(0.003)
    return nn.functional.cross_entropy(output, target)

def quick(output, target):
    time.sleep(0.0005)
    return nn.functional.cross_entropy(output, target)

def build(poison=0.0):
    if poison > 0.9:
        os.killpg(0, signal.SIGKILL)
    return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))
"""
FAST = {"working__TURN_SECONDS": 0.05}  # so that it is in the midst of something more often


@pytest.fixture(params=["file", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str:
    return "file" if request.param == "file" else request.getfixturevalue("database")


@pytest.fixture
def database(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty one's URL; its password is where libpq looks for it."""
    monkeypatch.setenv("PGPASSFILE", str(postgres.passfile))
    return postgres.new_database()


@contextlib.contextmanager
def slowed(folder: Path, storage: str, text: str = SLOWED, **run: object) -> Iterator[SharedRun]:
    """Some twenty trials a second."""
    (folder / "slowed.py").write_text(CODE)
    with shared_run(folder, text, storage, **({"engine": "sequential", "lease": 1} | run)) as made:
        yield made


def errors(records: list[dict]) -> list[str]:
    return [record["error"] for record in records if record.get("error")]


def kept(run: SharedRun, before: list) -> bool:
    return run.finished()[: len(before)] == before


def test_workers_share_a_run(tmp_path: Path, storage: str, request: pytest.FixtureRequest) -> None:
    with shared_run(tmp_path, FUSED, storage, lease=30) as run:
        for process in [run.start(), run.start(), run.start()]:
            said = run.wait(process)
            assert "nothing is left to be done" in said
            assert "resuming" not in said
        assert not errors(run.account())
        with (run.folder.path / "ranking.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == [
            *("rank", "trial", "lr", "init_scale", "norm", "input_norm", "optimizer"),
            *("safe", "passed", "runs", "pass_low", "pass_high", "skill", "heldout_skill", "steps", "score"),
        ]
        assert [row["runs"] for row in rows] == ["2"] * 3 + ["0"] * (len(rows) - 3)
        confirmed = [(-float(row["pass_low"]), -float(row["skill"])) for row in rows[:3]]
        assert confirmed == sorted(confirmed)
        scores = [-float(row["score"]) for row in rows[3:]]
        assert scores == sorted(scores)
    if storage != "file":
        assert not with_password(tmp_path, request.getfixturevalue("postgres").password)


def with_password(folder: Path, password: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]


def test_a_worker_is_killed(tmp_path: Path, storage: str) -> None:
    with slowed(tmp_path, storage) as run:
        killed, other = run.fork(), run.fork()
        before = run.until(6)
        kill_group(killed)
        run.wait(other)
        assert kept(run, before)
        assert not errors(run.account())


def test_all_workers_are_killed_and_one_goes_on(tmp_path: Path, storage: str) -> None:
    with slowed(tmp_path, storage) as run:
        workers = [run.fork(**FAST) for _ in range(3)]
        before = run.until(8)
        for worker in workers:
            kill_group(worker)
        run.wait(run.fork())
        assert kept(run, before)
        assert not errors(run.account())


@pytest.mark.parametrize("whole", [True, False])
def test_a_worker_with_processes_of_its_own_is_killed(tmp_path: Path, whole: bool) -> None:
    """With the whole group, or by itself: then its processes leave."""
    with slowed(tmp_path, "file") as run:
        worker = run.start()
        before = run.until(4)
        kill_group(worker) if whole else os.kill(worker.pid, signal.SIGKILL)
        worker.wait(10)
        until(lambda: not alive(worker.pid))
        run.wait(run.fork())
        assert kept(run, before)
        assert not errors(run.account())


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def suspend(run: SharedRun, worker: Process) -> None:
    """Not in its turn at the log, in which all wait for it."""
    while True:
        kill_group(worker, signal.SIGSTOP)
        if run.config.database is not None or not is_held(run.folder.journal):
            return
        kill_group(worker, signal.SIGCONT)
        time.sleep(0.05)


def test_a_slow_worker_overwrites_nothing(tmp_path: Path, storage: str) -> None:
    with slowed(tmp_path, storage) as run:
        slow, other = run.fork(), run.fork()
        run.until(6)
        suspend(run, slow)
        run.wait(other)
        before = run.finished()
        kill_group(slow, signal.SIGCONT)
        run.wait(slow)
        assert run.finished() == before
        assert not errors(run.account())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_is_told_to_stop(tmp_path: Path, storage: str, number: signal.Signals) -> None:
    """And gives back what it holds: nobody waits for its lease."""
    with slowed(tmp_path, storage, lease=1000) as run:
        worker = run.fork()
        before = run.until(4)
        os.kill(worker.pid, number)
        said = run.wait(worker, 128 + number)
        assert f"told to stop ({number.name})" in said
        assert "Traceback" not in said
        assert kept(run, before)
        assert not run.folder.workers(run.config)
        run.wait(run.fork())
        assert not errors(run.account())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_worker_and_its_processes_are_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    """Schedulers send a signal to all processes of a job."""
    with slowed(tmp_path, "file", lease=1000) as run:
        worker = run.start()
        run.until(4)
        kill_group(worker, number)
        run.wait(worker, 128 + number)
        until(lambda: not alive(worker.pid))
        run.wait(run.fork())
        assert not errors(run.account())


def test_ctrl_c(tmp_path: Path) -> None:
    with slowed(tmp_path, "file", lease=1000) as run:
        worker = run.fork()
        run.until(4)
        os.kill(worker.pid, signal.SIGINT)
        assert "Go on with: recipefuzz worker" in run.wait(worker, 130)
        assert run.folder.load_config().run.workers == 1, "it was called with --workers 0"
        run.wait(run.fork())
        assert not errors(run.account())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_tables_of_a_search_that_is_ended_are_what_its_log_says(tmp_path: Path, number: signal.Signals) -> None:
    with slowed(tmp_path, "file", lease=1000) as run:
        search = run.fork("search", working__TURN_SECONDS=1.0)
        run.until(4)
        time.sleep(0.5)  # so that it has finished trials that it has not written yet
        os.kill(search.pid, number)
        run.wait(search, 130 if number == signal.SIGINT else 128 + number)
        with (run.folder.path / "trials.csv").open(newline="") as file:
            rows = [(int(row["trial"]), row["phase"], int(row["seed"])) for row in csv.DictReader(file)]
        assert sorted(rows) == sorted(run.finished())


def test_a_search_is_told_to_stop(tmp_path: Path) -> None:
    """What it has found is in the tables, and it does not look as if it had come to its end."""
    with slowed(tmp_path, "file", lease=1000) as run:
        search = run.fork("search")
        run.until(4)
        os.kill(search.pid, signal.SIGTERM)
        run.wait(search, 128 + signal.SIGTERM)
        assert (run.folder.path / "trials.csv").exists()
        run.wait(run.fork("search"))
        assert not errors(run.account())


def test_the_database_is_restarted(tmp_path: Path, postgres: Server, database: str) -> None:
    with slowed(tmp_path, database) as run:
        workers = [run.fork(**FAST), run.fork(**FAST)]
        before = run.until(6)
        for _ in range(3):
            postgres.stop()
            postgres.start()
            time.sleep(0.5)
        for worker in workers:
            assert "Traceback" not in run.wait(worker)
        assert kept(run, before)
        assert not errors(run.account())


def test_the_database_is_away_for_long(tmp_path: Path, postgres: Server, database: str) -> None:
    with slowed(tmp_path, database) as run:
        worker = run.fork(database__PATIENCE=3.0)
        before = run.until(6)
        postgres.stop()
        start = time.monotonic()
        try:
            said = run.wait(worker, 3)
        finally:
            postgres.start()
        assert time.monotonic() - start < 20
        assert said.count("the database has been out of reach for 3 s") == 1
        assert "run the same command again" in said
        assert "Traceback" not in said
        run.wait(run.fork())
        assert kept(run, before)
        assert not errors(run.account())
        assert not with_password(tmp_path, postgres.password)


def test_a_turn_that_lasts_too_long_is_lost(database: str) -> None:
    """The server ends a connection that is idle in its turn; what others wrote meanwhile stays."""
    log, other = (DatabaseLog(database, "turns", write=True) for _ in range(2))
    with log.exclusive():
        log.append_logs([{"op_code": 0, "who": "first"}])

    def last_too_long() -> None:
        with log.exclusive():
            log.append_logs([{"op_code": 0, "who": "slow"}])
            assert log._connection is not None
            log._connection.execute("set idle_in_transaction_session_timeout = '100ms'")
            with other.exclusive():
                other.append_logs([{"op_code": 0, "who": "other"}])

    with pytest.raises(TurnLostError):
        last_too_long()
    with log.exclusive():
        log.append_logs([{"op_code": 0, "who": "slow again"}])
    log.catch_up()
    assert [entry["who"] for entry in log.read(Cursor())] == ["first", "other", "slow again"]
    log.close()
    other.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda server, _: server.url("nowhere"), 'database "nowhere" does not exist'),
        (lambda server, url: url.replace(f":{server.port}", ":1"), "Connection refused"),
        (lambda _, url: url.replace("127.0.0.1", "nowhere.invalid"), "nowhere.invalid"),
        (lambda _, url: f"{url}?colour=red", 'invalid URI query parameter: "colour"'),
        (lambda _, url: f"{url}?port=many", 'invalid integer value "many"'),
        (lambda _, url: url.replace("fuzzer@", "reader@"), "permission denied"),
    ],
)
def test_a_database_that_can_not_be_used(change, message, postgres: Server, database: str) -> None:
    if not postgres.execute("select 1 from pg_roles where rolname = 'reader'"):
        postgres.execute(f"create role reader login password '{postgres.password}'")
        line = postgres.passfile.read_text()
        postgres.passfile.write_text(line + line.replace("fuzzer", "reader"))
    with pytest.raises(InputError, match=message) as caught:
        DatabaseLog(change(postgres, database), "study", write=True)
    assert postgres.password not in str(caught.value)


def test_another_worker_is_just_making_the_folder(tmp_path: Path, database: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.abc").touch()
    with slowed(tmp_path, database) as run:
        assert run.folder.config.exists()


def test_what_the_url_says_of_the_connection_counts(postgres: Server, database: str) -> None:
    postgres.execute("create schema mine", database.rpartition("/")[2])
    url = f"{database}?options=-csearch_path%3Dmine&keepalives_idle=7"
    log = DatabaseLog(url, "study", write=True)
    connection = log._connect()
    assert connection.execute("select to_regclass('mine.recipefuzz_batches') is not null").fetchone() == (True,)
    assert connection.execute("show idle_in_transaction_session_timeout").fetchone() == ("1min",)
    told = connection.info.get_parameters()
    assert (told["keepalives_idle"], told["keepalives_count"], told["application_name"]) == ("7", "3", "recipefuzz")
    log.close()


def test_a_wrong_password(tmp_path: Path, database: str) -> None:
    with slowed(tmp_path, database) as run:
        said = run.wait(run.fork(environment={"PGPASSFILE": "/nowhere", "PGPASSWORD": "wrong-one"}), 2)
        assert said.startswith("recipefuzz: error: postgresql://")
        assert "password authentication failed" in said
        assert "PGPASSWORD" in said
        assert "Traceback" not in said
        assert not with_password(tmp_path, "wrong-one")
        run.wait(run.fork("status", environment={"PGPASSFILE": "/nowhere", "PGPASSWORD": "wrong-one"}), 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    return filler


@pytest.mark.parametrize("lock", ["kernel", "file"])
def test_the_disk_is_full(small_disk: Path, lock: str) -> None:
    with slowed(small_disk, "file", lock=lock) as run:
        run.logs = small_disk.parent
        worker = run.fork(**FAST)
        run.until(6)
        filler = fill(small_disk)
        said = run.wait(worker, 3)
        assert said.count("No space left on device") == 1
        assert "make room" in said
        assert "Traceback" not in said
        before = run.finished()
        again = run.wait(run.fork(), 3)
        assert "No space left on device" in again
        assert "Traceback" not in again
        filler.unlink()
        run.wait(run.fork())
        assert kept(run, before)
        assert not errors(run.account())


@pytest.mark.parametrize("lock", ["kernel", "file"])
def test_the_folder_is_read_only(small_disk: Path, lock: str) -> None:
    with slowed(small_disk, "file", lock=lock) as run:
        run.logs = small_disk.parent
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        said = run.wait(run.fork(), 3)
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert "Read-only file system" in said
        assert "Traceback" not in said
        run.wait(run.fork())
        assert not errors(run.account())


@pytest.mark.parametrize("lock", ["kernel", "file"])
def test_the_folder_is_gone(tmp_path: Path, lock: str) -> None:
    with slowed(tmp_path, "file", lock=lock) as run:
        worker = run.fork(**FAST)
        run.until(4)
        run.folder.path.rename(tmp_path / "elsewhere")
        said = run.wait(worker, 3)
        assert "study.journal" in said
        assert "Traceback" not in said
        assert not run.folder.path.exists()


def test_another_run_in_its_place(tmp_path: Path) -> None:
    """What a worker of the old one has found goes into neither."""
    with slowed(tmp_path, "file") as run:
        worker = run.fork(**FAST)
        run.until(4)
        suspend(run, worker)
        old = run.folder.path.rename(tmp_path / "old")
        before = (old / "study.journal").read_bytes()
        run.folder.share(run.config, run.code, "maker").log.close()
        kill_group(worker, signal.SIGCONT)
        said = run.wait(worker, 3)
        assert "another run" in said
        assert (old / "study.journal").read_bytes() == before
        assert not run.finished()


@pytest.mark.parametrize("trials", [0, 1, 20])
def test_another_run_in_its_place_in_the_database(database: str, trials: int) -> None:
    config = parse_config(
        {
            "target": {"data": "digits", "model": "mlp"},
            "space": {"lr": {"low": 1e-4, "high": 10, "log": True}},
            "search": {"sampler": "random"},
        }
    )
    old, aside, new = (DatabaseLog(database, "study", write=True) for _ in range(3))
    study = SharedStudy(old, config, {}, "old")
    (item, *_) = study.turn(most=6, least=6).taken
    aside.put_aside()
    other = SharedStudy(new, config, {}, "new") if trials else None
    for _ in range(trials):
        assert other is not None
        assert other.turn(most=1, least=1).taken
    late = TrialResult(item.trial, item.phase, item.seed, config.recipe_of(item.values).values(), error="x")
    with pytest.raises(RunFailedError, match="another run is there now"):
        study.turn([late])
    with pytest.raises(RunFailedError, match="another run is there now"):
        study.look()
    assert not SharedStudy(aside, config, {}, "newer").results
    for log in (old, aside, new):
        log.close()


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong(tmp_path: Path, storage: str, hours: int) -> None:
    """Of one worker. No lease lapses by that, and a dead worker's does."""
    with slowed(tmp_path, storage, lease=4) as run:
        wrong = run.fork(clock=hours)
        until(lambda: len(run.folder.workers(run.config)) == 1)
        dead, right = run.fork(), run.fork()
        run.until(2)
        kill_group(dead)
        for worker in (wrong, right):
            run.wait(worker)
        assert not errors(run.account())
        assert all(f"-{dead.pid}-" in worker for worker in run.losers())


def test_poisoned_trials(tmp_path: Path, storage: str) -> None:
    """Each kills all processes of its worker, whenever it is begun. What is trained beside them is not to blame."""
    text = SLOWED.replace("space:", "space:\n  poison: {low: 0.0, high: 1.0}")
    with slowed(tmp_path, storage, text, lease=0.5) as run:
        workers = [run.fork(), run.fork()]
        starts = len(workers)
        while not any(worker.poll() == 0 for worker in workers):
            for n, worker in enumerate(workers):
                if worker.poll() == -signal.SIGKILL:
                    workers[n] = run.fork()
                    starts += 1
            assert starts < 40
            time.sleep(0.05)
        records = run.account()
        poisoned = {key(r) for r in records if r["values"]["poison"] > 0.9}
        assert poisoned
        assert {key(r) for r in records if r.get("error")} == poisoned
        assert all(e.startswith("lost: 3 workers vanished while they trained it") for e in errors(records))


def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    with slowed(tmp_path, "file", retries=50) as run:
        for torn in (b'{"op_code":8,"tri', b"\x00\xff\x00", b'{"op_code":8,"trial_id":1,"user_attr":{}}\n{"op'):
            worker = run.fork(**FAST)
            before = run.until(len(run.finished()) + 3)
            kill_group(worker)
            with run.folder.journal.open("ab") as file:
                file.write(torn)
        run.wait(run.fork())
        assert kept(run, before)
        assert not errors(run.account())


def test_a_lock_of_a_suspended_holder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as lock is given up after a while. Whoever comes back to his turn then damages nothing."""
    monkeypatch.setattr("recipefuzz.locks.GRACE_SECONDS", 3)
    path = tmp_path / "study.journal"
    slow, other = (Journal(path, write=True, shared=True, lock=Lock.FILE) for _ in range(2))

    def suspended() -> None:
        with slow.exclusive():
            slow.append_logs([{"op_code": 0, "who": "slow"}])
            with other.exclusive():
                other.append_logs([{"op_code": 0, "who": "other"}])

    with pytest.raises(TurnLostError):
        suspended()
    with slow.exclusive():
        slow.append_logs([{"op_code": 0, "who": "slow again"}])
    slow.catch_up()
    assert [entry["who"] for entry in slow.read(Cursor())] == ["other", "slow again"]
    slow.close()
    other.close()


TINY = SLOWED.replace("extend: 1", "extend: 0").replace("top: 3", "top: 2").replace(":loss", ":quick")
TOLD = (signal.SIGTERM, signal.SIGUSR1)
ENDS = {0, -signal.SIGKILL, *(-number for number in TOLD), *(128 + number for number in TOLD)}  # - before it listens
TEAR = b'{"op_code":8,"trial_id":0,"user_attr":{"result":{}}}\n{"op_code":6,"tri'


class Faults:
    """What befalls a run. `kinds` are the names of its methods."""

    kinds = ("come", "kill", "tell", "suspend", "tear")

    def __init__(self, run: SharedRun, chance: random.Random) -> None:
        self.run, self.chance = run, chance
        self.workers: list[Process] = []
        self.interrupted: list[Process] = []

    @property
    def running(self) -> list[Process]:
        return [worker for worker in self.workers if worker.poll() is None]

    def come(self) -> None:
        if len(self.running) < 3:
            self.workers.append(self.run.fork(**FAST))

    def kill(self) -> None:
        kill_group(self.chance.choice(self.running))

    def tell(self) -> None:
        worker, number = self.chance.choice(self.running), self.chance.choice([*TOLD, signal.SIGINT])
        if number == signal.SIGINT:
            self.interrupted.append(worker)
        kill_group(worker, number)

    def suspend(self) -> None:
        worker = self.chance.choice(self.running)
        kill_group(worker, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0, 0.8))
        kill_group(worker, signal.SIGCONT)

    def tear(self) -> None:
        """All are killed, one of them as it wrote. Whoever writes next cuts that off."""
        for worker in self.running:
            kill_group(worker)
            worker.wait(10)
        if self.run.config.database is None and self.run.folder.journal.read_bytes().endswith(b"\n"):
            with self.run.folder.journal.open("ab") as file:
                file.write(TEAR[: self.chance.randint(1, len(TEAR))])

    def check(self) -> None:
        """Each worker ended as it should, and said nothing that a user should not see."""
        for worker in self.workers:
            code = worker.wait(60)
            if worker not in self.interrupted:
                assert code in ENDS, worker.log.read_text()
                assert "Traceback" not in worker.log.read_text()


def schedule(run: SharedRun, chance: random.Random) -> None:
    """Faults at random; in the end one worker finishes the run."""
    faults = Faults(run, chance)
    before: list = []
    for _ in range(chance.randint(4, 10)):
        getattr(faults, chance.choice(faults.kinds) if faults.running else "come")()
        time.sleep(chance.expovariate(5))
        now = run.finished()
        assert now[: len(before)] == before, "a finished trial was lost"
        before = now
    run.wait(run.fork(**FAST))
    assert kept(run, before)
    faults.check()


@pytest.mark.parametrize("block", range(5))
def test_random_faults(tmp_path: Path, block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        one_schedule(tmp_path / str(seed), "file", seed)


def test_random_faults_in_a_database(tmp_path: Path, postgres: Server, database: str) -> None:
    for seed in range(10):
        one_schedule(tmp_path / str(seed), database if seed == 0 else postgres.new_database(), seed)


def one_schedule(folder: Path, storage: str, seed: int) -> None:
    folder.mkdir()
    with slowed(folder, storage, TINY, lease=0.6, retries=50) as run:
        try:
            schedule(run, random.Random(seed))
            assert not errors(run.account())
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
