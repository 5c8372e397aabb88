"""A study that many workers share: whatever they do, and whenever they vanish, each trial counts once."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import recipefuzz
from recipefuzz import journal, sharing
from recipefuzz.board import Board, Item
from recipefuzz.config import parse_config
from recipefuzz.entry_log import Cursor, TurnLostError
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.journal import Journal
from recipefuzz.leases import Watch
from recipefuzz.locks import Lock, _mount_options, is_held
from recipefuzz.ranking import confirming_runs
from recipefuzz.report.status import status_lines
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder
from recipefuzz.sampling import distribution, objective
from recipefuzz.sharing import ALONE, SharedStudy
from recipefuzz.stopping import Stop
from recipefuzz.store import Store

META = {"study": "test"}


pytestmark = pytest.mark.usefixtures("no_fsync")

OPEN: list[Journal] = []


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Workers here vanish, and their logs with them."""
    yield
    while OPEN:
        OPEN.pop().close()


def shared(path: Path, lock: Lock = Lock.KERNEL) -> Journal:
    OPEN.append(Journal(path, write=True, shared=True, lock=lock))
    return OPEN[-1]


def key(item: Item) -> tuple[Phase, int, int]:
    return item.phase, item.trial, item.seed


def study_config(trials: int = 24, top: int = 2, seeds: int = 2, sampler: str = "random", retries: int = 3):
    return parse_config(
        {
            "target": {"data": "digits", "model": "mlp"},
            "space": {"lr": {"low": 1e-4, "high": 10, "log": True}, "clip_norm": [None, 1, 5]},
            "search": {"trials": trials, "sampler": sampler, "confirm": {"top": top, "seeds": seeds}},
            "run": {"storage": "file", "retries": retries},
        }
    )


def trained(config, item: Item) -> TrialResult:
    """A pure function of recipe and seed, as a trial is."""
    values = config.recipe_of(item.values).values()
    lr = math.log10(item.values["lr"])
    found: dict = {"verdict": "converging", "score": round(0.9 / (1 + (lr + 1) ** 2), 6), "steps": 50}
    if lr > 0:
        found = {"verdict": "nan", "score": 0.0, "first_bad": 3}
    elif item.values["clip_norm"] == 1 and lr < -3:
        found = {"error": "out of memory"}
    return TrialResult(item.trial, item.phase, item.seed, values, **found)


class Worker:
    """What `working` does, step by step."""

    def __init__(self, path: Path, config, name: str, most: int = 3) -> None:
        self.log, self.config, self.name, self.most = shared(path), config, name, most
        self.study = SharedStudy(self.log, config, META, name)
        self.held: list[Item] = []
        self.over = False

    def turn(self, finish: int, lapsed: set[str] = frozenset()) -> None:
        done = [trained(self.config, item) for item in self.held[:finish]]
        turn = self.study.turn(done, most=self.most, least=1, lapsed=lapsed)
        self.held = self.held[finish:] + [i for i in turn.taken if key(i) not in {key(h) for h in self.held}]
        self.over = turn.over

    def leave(self) -> None:
        self.study.give_back()
        self.held = []


def finish_all(path: Path, config, gone: set[str] = frozenset(), name: str = "last") -> Worker:
    worker = Worker(path, config, name)
    for _ in range(500):
        worker.turn(len(worker.held), gone)
        if worker.over:
            return worker
    raise AssertionError("the study does not end")


def check(path: Path, config, errors: int | None = 0) -> list[TrialResult]:
    """Every trial in exactly one state, counts add up, and Optuna sees the same."""
    results = Store(path, write=False).results()
    search = [r for r in results if r.phase is Phase.SEARCH]
    confirm = [r for r in results if r.phase is Phase.CONFIRM]
    assert [r.trial for r in search] == list(range(config.search.trials))
    assert set(Counter((r.trial, r.seed) for r in confirm).values()) <= {1}
    assert len(confirm) == config.search.confirm.top * config.search.confirm.seeds
    if errors is not None:
        assert sum(r.error.startswith("lost") for r in results) == errors
    storage = JournalStorage(JournalFileBackend(str(path)))
    for phase, found in ((Phase.SEARCH, search), (Phase.CONFIRM, confirm)):
        trials = optuna.load_study(study_name=phase, storage=storage).trials
        assert [t.state.name for t in trials] == ["FAIL" if r.error else "COMPLETE" for r in found]
    return results


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "grid"])
def test_workers_share_a_study(tmp_path, sampler):
    path, config = tmp_path / "study.journal", study_config(15, sampler=sampler)
    workers = [Worker(path, config, name) for name in "abc"]
    while not all(worker.over for worker in workers):
        for worker in workers:
            worker.turn(random.Random(len(worker.held)).randint(0, len(worker.held)))
            assert len({key(item) for w in workers for item in w.held}) == sum(len(w.held) for w in workers)
        for worker in workers:
            worker.turn(len(worker.held))
    check(path, config)


def test_a_file_lock_serves_too(tmp_path):
    path, config = tmp_path / "study.journal", study_config(4, top=1, seeds=1)
    log = shared(path, Lock.FILE)
    study = SharedStudy(log, config, META, "a")
    held: list[Item] = []
    while not (turn := study.turn([trained(config, i) for i in held], most=2, least=1)).over:
        held = turn.taken
    check(path, config)
    assert [p.name for p in tmp_path.iterdir()] == ["study.journal"]


def test_threads_and_their_turns(tmp_path):
    """Real contention: eight at a time, each with a log of its own."""
    path, config = tmp_path / "study.journal", study_config(120, top=3, seeds=3)

    def run(name: str) -> None:
        worker = Worker(path, config, name)
        while not worker.over:
            worker.turn(len(worker.held))

    threads = [threading.Thread(target=run, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    check(path, config)


def test_a_vanished_workers_trials_return(tmp_path):
    path, config = tmp_path / "study.journal", study_config(8)
    lost = Worker(path, config, "lost")
    lost.turn(0)
    assert lost.held
    other = Worker(path, config, "other", most=8)
    other.turn(0)
    assert not {key(i) for i in other.held} & {key(i) for i in lost.held}
    other.turn(0, {"lost"})
    assert {key(i) for i in lost.held} <= {key(i) for i in other.held}
    finish_all(path, config, {"lost", "other"})
    check(path, config)


def test_of_two_results_the_first_counts(tmp_path):
    path, config = tmp_path / "study.journal", study_config(4, top=0)
    slow, other = Worker(path, config, "slow", most=1), Worker(path, config, "other")
    slow.turn(0)
    item = slow.held[0]
    other.turn(0, {"slow"})
    other.turn(len(other.held))
    first = next(r for r in Store(path, write=False).results() if r.trial == item.trial)
    late = TrialResult(item.trial, item.phase, item.seed, dict(first.values), verdict="stalled", score=0.5)
    slow.study.turn([late])
    assert next(r for r in Store(path, write=False).results() if r.trial == item.trial) == first
    finish_all(path, config, {"slow", "other"})
    check(path, config)


def test_a_slow_workers_verdict_counts_where_none_has_come_and_its_error_does_not(tmp_path):
    path, config = tmp_path / "study.journal", study_config(2, top=0)
    slow, other = Worker(path, config, "slow", most=2), Worker(path, config, "other", most=2)
    slow.turn(0)
    slow.turn(0)
    assert len(slow.held) == 2
    other.turn(0, {"slow"})
    assert len(other.held) == 2
    good, bad = (trained(config, item) for item in slow.held)
    failed = TrialResult(bad.trial, bad.phase, bad.seed, dict(bad.values), error="killed: this machine is going down")
    slow.study.turn([good, failed])
    assert [r.trial for r in Store(path, write=False).results()] == [good.trial]
    other.turn(2)
    check(path, config)


@pytest.mark.parametrize("retries", [2, 3, 5])
def test_a_trial_that_takes_its_workers_along_is_an_error_and_its_neighbours_are_not(tmp_path, retries):
    path, config = tmp_path / "study.journal", study_config(6, top=0, retries=retries)
    poisoned, gone, beside = 2, set(), []
    for name in (f"w{n}" for n in range(100)):
        worker = Worker(path, config, name, most=3)
        for _ in range(100):
            worker.turn(0, gone)
            if any(item.trial == poisoned for item in worker.held):
                beside.append(len(worker.held) - 1)
                gone.add(name)  # it takes all that this worker holds along
                break
            worker.turn(len(worker.held), gone)
            if worker.over:
                break
        if worker.over:
            break
    results = check(path, config, errors=1)
    alone = min(ALONE, retries - 1)
    assert len(beside) == retries
    assert beside[alone:] == [0] * (retries - alone)
    error = results[poisoned].error
    assert error == f"lost: {retries} workers vanished while they trained it, the last one was {max(gone)}"


@pytest.mark.parametrize("retries", [1, 5])
def test_retries(tmp_path, retries):
    path, config = tmp_path / "study.journal", study_config(1, top=0, retries=retries)
    gone: set[str] = set()
    while not (worker := Worker(path, config, f"w{len(gone)}")).over:
        worker.turn(0, gone)
        if worker.over:
            break
        gone.add(worker.name)
    assert len(gone) == retries
    check(path, config, errors=1)


def test_what_is_given_back_is_taken_at_once_and_counts_as_no_loss(tmp_path):
    path, config = tmp_path / "study.journal", study_config(6, retries=1)
    leaving = Worker(path, config, "leaving")
    leaving.turn(0)
    numbers = {key(i) for i in leaving.held}
    leaving.leave()
    other = Worker(path, config, "other")
    other.turn(0)
    assert {key(i) for i in other.held} >= numbers
    while not other.over:
        other.turn(len(other.held))
    check(path, config)


def test_the_last_trials_are_shared_out(tmp_path):
    path, config = tmp_path / "study.journal", study_config(100)
    first, second = Worker(path, config, "a", most=1000), Worker(path, config, "b", most=1000)
    first.turn(0)
    second.turn(0)
    assert len(first.held) == 25  # the sampler is to see results before it is asked for more than a quarter
    assert len(second.held) == 1
    for _ in range(3):
        first.turn(len(first.held))
        second.turn(len(second.held))
    left = 100 - len(first.study.results) - len(first.held) - len(second.held)
    assert 0 < len(first.held) <= max(1, left) + 25


def test_without_time_nothing_new_is_asked_and_the_best_are_confirmed(tmp_path):
    path, config = tmp_path / "study.journal", study_config(100, top=1, seeds=2)
    worker = Worker(path, config, "a", most=10)
    worker.turn(0)
    held, over = worker.held, False
    for _ in range(10):
        turn = worker.study.turn([trained(config, i) for i in held], most=10, least=1, late=True, elapsed=12.5)
        held, over = turn.taken, turn.over
    assert over
    results = worker.study.results
    assert {r.phase for r in results[-2:]} == {Phase.CONFIRM}
    assert len(results) == 12
    assert SharedStudy(shared(path), config, META, "b").seconds == 12.5


def test_the_time_of_the_search_alone_is_kept_and_optuna_reads_it_too(tmp_path):
    path, config = tmp_path / "study.journal", study_config(4, top=1, seeds=2)
    study, held, elapsed = SharedStudy(shared(path), config, META, "a"), [], 0.0
    while True:
        elapsed += 10.0
        turn = study.turn([trained(config, i) for i in held], most=4, least=4, elapsed=elapsed)
        if turn.over:
            break
        if {item.phase for item in held} == {Phase.SEARCH}:
            searched = elapsed
        held = turn.taken
    assert elapsed > searched
    assert study.seconds == Store(path, write=False).seconds() == searched


def test_a_run_of_one_process_is_gone_on_with_by_many(tmp_path):
    path, config = tmp_path / "study.journal", study_config(12, top=1, seeds=2)
    with contextlib.closing(Store(path, write=True)) as store:
        study = store.begin(META, config.axes, config.search, 8)
        asked = study.refill()
        for trial in asked[3:6]:  # recorded, and not told: their turn had not come
            item = Item(0, Phase.SEARCH, trial.number, config.trial.seed, dict(trial.values))
            study.record(trained(config, item))
    finish_all(path, config)
    check(path, config)


def test_a_worker_waits_for_the_process_that_has_the_run_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("recipefuzz.journal.SHARED_LOCK_SECONDS", 0.2)
    path, config = tmp_path / "study.journal", study_config()
    with contextlib.closing(Store(path, write=True)), pytest.raises(InputError, match="another recipefuzz is at work"):
        Worker(path, config, "a")
    Worker(path, config, "a")


def test_a_turn_that_is_lost_is_begun_anew(tmp_path, monkeypatch):
    path, config = tmp_path / "study.journal", study_config(6)
    worker = Worker(path, config, "a")
    store, fails = Journal._store, [True, False, True, False]

    def losing(log, data, **options):
        if fails and fails.pop(0):
            raise TurnLostError
        return store(log, data, **options)

    monkeypatch.setattr(Journal, "_store", losing)
    while not worker.over:
        worker.turn(len(worker.held))
    assert not fails
    check(path, config)


def test_after_a_full_disk_the_worker_goes_on(tmp_path, monkeypatch):
    path, config = tmp_path / "study.journal", study_config(6)
    worker = Worker(path, config, "a")
    worker.turn(0)
    before, store = path.read_bytes(), Journal._store

    def full(*_, **__):
        raise RunFailedError("no space left on device")

    monkeypatch.setattr(Journal, "_store", full)
    held = list(worker.held)
    with pytest.raises(RunFailedError):
        worker.turn(len(worker.held))
    assert path.read_bytes() == before
    monkeypatch.setattr(Journal, "_store", store)
    worker.held = held
    while not worker.over:
        worker.turn(len(worker.held))
    check(path, config)


def test_tables_are_not_emptied_by_a_turn_that_fails(tmp_path, monkeypatch):
    config = {
        "target": {"data": "breast_cancer", "model": "mlp", "model_args": {"width": 4, "depth": 1}},
        "space": {"lr": {"low": 1e-3, "high": 1, "log": True}},
        "trial": {"steps": 20, "extend": 0},
        "search": {"trials": 2, "sampler": "random", "confirm": {"top": 0}, "diagnose": 0},
        "run": {"storage": "file", "workers": 0, "folder": str(tmp_path / "run"), "engine": "sequential"},
    }
    recipefuzz.search(config)
    before, store = (tmp_path / "run" / "trials.csv").read_bytes(), Journal._store

    def full(log, data, **options):
        if '"result"' in data:
            raise RunFailedError("no space left on device")
        return store(log, data, **options)

    monkeypatch.setattr(Journal, "_store", full)
    with pytest.raises(RunFailedError, match="no space left"):
        recipefuzz.search(config | {"search": config["search"] | {"trials": 4}})
    assert (tmp_path / "run" / "trials.csv").read_bytes() == before


def test_another_study_under_the_same_name_is_seen(tmp_path):
    path, config = tmp_path / "study.journal", study_config()
    Worker(path, config, "a")
    assert SharedStudy(shared(path), config, {"study": "other"}, "b").meta == META


@pytest.mark.parametrize(
    "entry",
    [
        '{"op_code":77}',
        '{"op_code":4,"study_id":9}',
        '{"op_code":8,"trial_id":99,"user_attr":{"holder":["a",0]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":7}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":[7,0]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":["../diagnoses",0]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":["/etc/passwd",0]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":["a\\u0000",0]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":["a",-1]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"holder":["a","many"]}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"elapsed":1e999}}',
        '{"op_code":2,"study_id":0,"user_attr":{"recipefuzz":[1]}}',
        '{"op_code":2,"study_id":0,"user_attr":{"peak_memory":{"search":"much"}}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"result":{"phase":"x"}}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"result":{"trial":1,"phase":"search","seed":0,"values":{},"error":"x"}}}',
        '{"op_code":8,"trial_id":0,"user_attr":{"result":{"trial":0,"phase":"search","seed":0,"values":{"lr":99},"error":"x"}}}',
        '{"op_code":5,"trial_id":0,"param_name":"no","param_value_internal":1}',
    ],
)
def test_entries_that_make_no_sense_are_one_plain_error(tmp_path, entry):
    path, config = tmp_path / "study.journal", study_config()
    Worker(path, config, "a").turn(0)
    with path.open("a") as file:
        file.write(f'{entry[:-1]},"end":true}}\n')
    with pytest.raises(InputError, match="the run's journal can't be replayed"):
        _ = (study := SharedStudy(shared(path), config, META, "b")).meta, study.peak


def test_optuna_reads_the_same_recipes_values_and_axes(tmp_path):
    path, space = (
        tmp_path / "study.journal",
        {
            "lr": {"low": 1e-4, "high": 10, "log": True},
            "clip_norm": [None, 1, 2.5],
            "warmup_steps": {"low": 0, "high": 100, "step": 10},
            "batch_size": {"low": 1, "high": 64, "log": True},
            "init_scale": {"low": 0.5, "high": 2.0, "step": 0.25},
            "optimizer": ["sgd", "adam"],
        },
    )
    config = parse_config(study_config(12, top=0, sampler="tpe").resolved() | {"space": space})
    finish_all(path, config)
    results = Store(path, write=False).results()
    trials = optuna.load_study(study_name=Phase.SEARCH, storage=JournalStorage(JournalFileBackend(str(path)))).trials
    assert len(trials) == len(results) == 12
    for trial, result in zip(trials, results, strict=True):
        assert trial.params == {name: result.values[name] for name in space}
        assert trial.distributions == {name: distribution(axis) for name, axis in config.axes.axes}
        assert trial.values == (None if result.error else [objective(result)[0]])


def test_those_who_ask_at_the_same_moment_get_different_recipes(tmp_path, monkeypatch):
    path, config = tmp_path / "study.journal", study_config(40, top=0, sampler="tpe")
    one, two = (Worker(path, config, name) for name in "ab")
    while len(one.study.results) < 15:
        one.turn(len(one.held))
        two.turn(len(two.held))
    alone, asked = one.log._alone, []

    def after_the_other():
        if not asked:  # the sampler has been asked already, and knows nothing of these
            asked.append(len(two.held))
            two.turn(len(two.held))
        return alone()

    monkeypatch.setattr(one.log, "_alone", after_the_other)
    one.turn(len(one.held))
    assert asked
    assert one.held
    assert two.held
    assert not {item.values["lr"] for item in one.held} & {item.values["lr"] for item in two.held}
    finish_all(path, config, {"a", "b"})
    check(path, config)


def test_nobody_waits_for_a_sync(tmp_path, monkeypatch):
    path, config, held = tmp_path / "study.journal", study_config(6, top=0), []
    monkeypatch.setattr(os, "fsync", lambda _: held.append(is_held(path)))
    monkeypatch.setattr("recipefuzz.journal.SYNC_SECONDS", 0.0)
    finish_all(path, config)
    assert held
    assert not any(held)


def test_what_others_wrote_is_parsed_once_and_what_one_wrote_oneself_never(tmp_path, monkeypatch):
    path, config = tmp_path / "study.journal", study_config(30, top=0)
    one, two = (Worker(path, config, name) for name in "ab")
    parse, parsed = journal._entries, []
    monkeypatch.setattr(journal, "_entries", lambda content: parsed.append(len(content)) or parse(content))
    begun = path.stat().st_size
    while not (one.over and two.over):
        one.turn(len(one.held))
        two.turn(len(two.held))
    written = path.stat().st_size - begun
    assert 0.5 * written < sum(parsed) <= written + begun


def test_candidates_are_looked_for_once(tmp_path, monkeypatch):
    path, config, looked = tmp_path / "study.journal", study_config(10, top=2, seeds=4), []
    monkeypatch.setattr(sharing, "confirming_runs", lambda *args: looked.append(args) or confirming_runs(*args))
    worker = finish_all(path, config)
    assert len(worker.study.results) == 18
    assert len(looked) == 1


# --- all of it, at random


class Crowd:
    """Workers that come, work, are slow, vanish, are killed in the midst of writing, and leave."""

    def __init__(self, path: Path, config, chance: random.Random) -> None:
        self.path, self.config, self.chance = path, config, chance
        self.workers: dict[str, Worker] = {}
        self.gone: set[str] = set()
        self.names = 0

    def come(self) -> None:
        name = f"w{self.names}"
        self.names += 1
        self.workers[name] = Worker(self.path, self.config, name, most=self.chance.randint(1, 5))

    def work(self) -> None:
        worker = self._any()
        worker.turn(self.chance.randint(0, len(worker.held)), self.gone)

    def vanish(self) -> None:
        worker = self._any()
        self.gone.add(worker.name)
        if self.chance.random() < 0.5:  # for good; else it is only slow, and comes back with what it has
            del self.workers[worker.name]

    def leave(self) -> None:
        worker = self._any()
        worker.leave()
        del self.workers[worker.name]

    def tear(self) -> None:
        """What a writer leaves behind that dies in its turn, or a disk that lost its power."""
        batch = (
            b'{"op_code":8,"trial_id":0,"user_attr":{"holder":["x",0]}}\n{"op_code":8,"trial_id":0,"user_attr":{}}\n'
        )
        if self.path.exists() and self.path.read_bytes().endswith(b',"end":true}\n'):
            with self.path.open("ab") as file:
                file.write(self.chance.choice([batch[: self.chance.randint(1, len(batch))], b"\0" * 100]))

    def lose_turn(self) -> None:
        worker, store = self._any(), Journal._store
        lost = self.chance.choice([TurnLostError, RunFailedError])
        with pytest.MonkeyPatch.context() as patch:
            kept = list(worker.held)

            def losing(*_, **__):
                patch.setattr(Journal, "_store", store)
                raise lost("x")

            patch.setattr(Journal, "_store", losing)
            try:
                worker.turn(len(worker.held), self.gone)
            except RunFailedError:
                worker.held = kept

    def _any(self) -> Worker:
        if not self.workers:
            self.come()
        return self.workers[self.chance.choice(sorted(self.workers))]


def check_counts(board: Board) -> None:
    left = [item for item in board.items.values() if item.result is None]
    assert board.held == {h: {i.id: i for i in left if i.holder == h} for h in {i.holder for i in left}}
    assert board.searching == len(left)
    assert board.searched == len(board.items) - len(left)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 10**6), sampler=st.sampled_from(["random", "tpe"]))
def test_any_schedule_of_faults_ends_with_each_trial_once(tmp_path_factory, seed, sampler):
    path = tmp_path_factory.mktemp("run") / "study.journal"
    chance = random.Random(seed)
    config = study_config(chance.randint(1, 20), top=0, sampler=sampler, retries=chance.choice([1, 3, 50]))
    crowd = Crowd(path, config, chance)
    acts = [crowd.come, *4 * [crowd.work], crowd.vanish, crowd.leave, crowd.tear, crowd.lose_turn]
    known: dict[int, TrialResult] = {}
    for _ in range(40):
        chance.choice(acts)()
        for worker in crowd.workers.values():
            check_counts(worker.study._board)
        for result in Store(path, write=False).results() if path.exists() else ():
            assert known.setdefault(result.trial, result) == result, "a result was replaced"
    finish_all(path, config, crowd.gone | set(crowd.workers))
    results = check(path, config, errors=None)
    assert [known.get(r.trial, r) for r in results] == results, "a result was lost"


# --- the log, leases, locks, signals


def test_readers_see_each_entry_once_whoever_writes(tmp_path):
    one, two = (shared(tmp_path / "log") for _ in range(2))
    mine, theirs = Cursor(), Cursor()
    seen: list[list[int]] = [[], []]
    for number in range(12):
        log, other = (one, two) if number % 3 else (two, one)
        with log.exclusive():
            log.append_logs([{"op_code": 0, "number": number}])
            if number % 2:
                seen[log is two] += [e["number"] for e in log.read(theirs if log is two else mine)]
        other.catch_up()
        seen[other is two] += [e["number"] for e in other.read(theirs if other is two else mine)]
    for log, cursor, found in ((one, mine, seen[0]), (two, theirs, seen[1])):
        log.catch_up()
        found += [e["number"] for e in log.read(cursor)]
    assert seen == [list(range(12))] * 2


def test_a_lease_lapses_by_the_watchers_clock_alone():
    now = 0.0
    watch = Watch(10.0, clock=lambda: now)
    assert watch.lapsed(["a", "b", "c"], {"a": "1", "b": "7"}) == set()
    now = 9.0
    assert watch.lapsed(["a", "b", "c"], {"a": "2", "b": "7"}) == set()
    now = 10.0
    assert watch.lapsed(["a", "b", "c"], {"a": "2", "b": "7"}) == {"b", "c"}
    now = 12.0
    assert watch.lapsed(["a", "b", "c"], {"a": "2", "b": "8", "c": "0"}) == set()
    now = 19.0
    assert watch.lapsed(["a", "b"], {"a": "2", "b": "8"}) == {"a"}
    assert watch.lapsed(["b"], {"b": "8"}) == set()
    now = 25.0
    assert watch.lapsed(["a", "b"], {"a": "2", "b": "8"}) == {"b"}  # a is looked at anew


def test_signs_of_life(tmp_path):
    log = shared(tmp_path / "study.journal")
    assert log.beats() == {}
    log.beat("a", "0", {"host": "x", "holds": 12345})
    log.beat("b", "0", {"host": "y"})
    log.beat("a", "1", {"host": "x"})
    assert {n: (b.mark, b.about) for n, b in log.beats().items()} == {
        "a": ("1", {"host": "x"}),
        "b": ("0", {"host": "y"}),
    }
    assert list(log.beats(["b", "c"])) == ["b"]
    (tmp_path / "workers" / "b.json").write_text('{"mark": "1", "ab')
    assert log.beats()["b"].mark != "0"
    log.beat("a", "", None)
    log.beat("a", "", None)
    assert list(log.beats()) == ["b"]


def test_what_one_worker_does_otherwise_the_next_does_not(tmp_path):
    config = study_config().but(folder=tmp_path / "run", workers="auto")
    folder = RunFolder.of(config)
    folder.share(config, {}, "a").log.close()
    folder.share(folder.load_config().but(workers="1"), {}, "b", joins=True).log.close()
    assert folder.load_config().run.workers == "auto"
    folder.share(config.but(workers="2"), {}, "c").log.close()
    assert folder.load_config().run.workers == 2


@pytest.mark.parametrize("before", ["file", "postgresql://me@host/db"])
def test_a_run_does_not_begin_anew_where_its_storage_is_another_one(tmp_path, before):
    other = "file" if before != "file" else "postgresql://me@nowhere.invalid/db"
    old, new = (
        parse_config(study_config().resolved() | {"run": {"storage": storage, "folder": str(tmp_path / "run")}})
        for storage in (before, other)
    )
    folder = RunFolder.of(old)
    if before == "file":
        folder.share(old, {}, "a").log.close()
    else:
        folder._make(folder.path)
        folder._write_config(old)
    text = folder.config.read_text()
    for opened in (folder.share, folder.open):
        with pytest.raises(InputError, match=r"this run is kept in (its folder|a database), and is not moved"):
            opened(new, {}, **({"worker": "b"} if opened == folder.share else {"fresh": False}))
    assert folder.config.read_text() == text


def test_no_terminal_obeys_what_workers_tell_of_themselves(tmp_path):
    config = study_config().but(folder=tmp_path / "run")
    folder = RunFolder.of(config)
    folder.share(config, {}, "a").log.close()
    log, about = shared(folder.journal), {"node": "\x1b]0;n1\x07", "gpus": ["\x9b2J", 2], "since": None}
    log.beat("b\x1b[2J\n", "0", about)
    text = "".join(status_lines(folder))
    assert "n1" in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("mounts", "options"),
    [
        ("22 1 0:20 / / rw - ext4 /dev/sda rw\n", set()),
        (
            "22 1 0:20 / / rw - ext4 /dev/sda rw\n30 22 0:50 / /home rw - nfs4 s:/h rw,local_lock=none\n",
            {"local_lock=none"},
        ),
        ("30 22 0:50 / /home rw - nfs s:/h rw,nolock\n31 30 0:51 / /home/me rw - ext4 /dev/sdb rw\n", set()),
        ("30 22 0:50 / /home/me rw - nfs s:/h rw,local_lock=all\n", {"local_lock=all"}),
        ("30 22 0:50 / /home/you rw - nfs s:/h rw,nolock\n", set()),
    ],
)
def test_options_of_the_mount_that_holds_a_folder(mounts, options):
    assert _mount_options(Path("/home/me/runs"), mounts) - {"rw"} == options


def test_a_signal_ends_a_wait_and_nothing_else():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert stop.signal is signal.SIGUSR1
            assert stop.unless_told(lambda: "done") is None
        with Stop() as stop:

            def interrupted() -> str:
                signal.raise_signal(signal.SIGUSR1)
                return "done"

            assert stop.unless_told(lambda: "done") == "done"
            assert stop.unless_told(interrupted) is None
            assert heard == []
        stop.pass_on()
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("apart", [0, 1, 2, 3, 5, 8])
def test_signals_at_any_moment_end_a_wait_as_told(apart):
    """Two of them, so many instructions apart: a scheduler sends several."""
    for first in range(1, 60):
        with Stop() as stop:
            counted = 0

            def count(frame, event, _):
                nonlocal counted
                if frame.f_code is not Stop.unless_told.__code__:
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode":
                    counted += 1
                    if counted in (first, first + apart):  # noqa: B023 - used within its round
                        signal.raise_signal(signal.SIGTERM)
                return count

            before = sys.gettrace()
            sys.settrace(count)
            try:
                assert stop.unless_told(lambda: "done") in ("done", None)
            finally:
                sys.settrace(before)
            signal.raise_signal(signal.SIGTERM)  # after it, none raises
            assert stop.unless_told(lambda: "done") is None
    assert counted < 59  # all moments were tried
