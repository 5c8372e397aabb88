"""The store: the same trials whatever the order, the kills and the full disks, and what the sampler is told."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot
from optuna.trial import TrialState

from recipefuzz import journal, sampling
from recipefuzz.config import SearchConfig, parse_config
from recipefuzz.entry_log import ENCODER
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.journal import SYNC_SECONDS, Journal
from recipefuzz.locks import is_held
from recipefuzz.peak import Peak
from recipefuzz.recipe import Recipe
from recipefuzz.result import Phase, TrialResult, result_of
from recipefuzz.run_folder import RunFolder, identity
from recipefuzz.sampling import BlockTPE, Seen, _Kernels, at_random, distribution, objective, thinned, total
from recipefuzz.space import Choice, Range, Space
from recipefuzz.store import Asked, Store, StudySearch
from recipefuzz.trace import COLUMNS, Trace
from recipefuzz.verdict import Budget, Label, Verdict

steady = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SPACE = Space(
    (
        ("lr", Range(1e-4, 10, log=True)),
        ("width", Range(16, 128, integer=True)),
        ("dropout", Range(0.0, 0.9, step=0.3)),
        ("clip_norm", Choice((None, 1, 5))),
    )
)
META = {"study": "test"}


pytestmark = pytest.mark.usefixtures("no_fsync")


def outcome(asked: Asked) -> TrialResult:
    """A pure function of the recipe, as a trial is: a NaN region, a stalled one, some errors, and a hill."""
    lr, width = math.log10(asked.values["lr"]), asked.values["width"]
    found: dict = {"verdict": "converging", "score": 0.9 / (1 + (lr + 1) ** 2), "steps": width}
    if lr > 0:
        found = {"verdict": "nan", "score": 0.0, "first_bad": 1 + width % 7, "loss": math.nan}
    elif lr < -3 or asked.values["clip_norm"] == 1:
        found = {"verdict": "stalled", "score": 0.1}
    elif width % 13 == 0:
        found = {"error": "out of memory"}
    return TrialResult(asked.number, Phase.SEARCH, 0, dict(asked.values), **found)


def config(trials: int, sampler: str = "random", **more) -> SearchConfig:
    return SearchConfig(trials=trials, sampler=sampler, **({"window": 4, "grid_points": 2} | more))


@contextmanager
def opened(path: Path, search: SearchConfig, space: Space = SPACE) -> Iterator[StudySearch]:
    store = Store(path, write=True)
    try:
        yield store.begin(META, space, search, search.window)
    finally:
        store.close()


def drive(path: Path, search: SearchConfig, space: Space = SPACE) -> list[TrialResult]:
    """The plain search: every trial is run as soon as it is asked for, and recorded in order."""
    with opened(path, search, space) as study:
        while asked := study.refill():
            for trial in asked:
                study.record(outcome(trial))
        return study.results


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[SearchConfig], list[TrialResult]]:
    """What the undisturbed search finds; one run for each config."""
    folder, known = tmp_path_factory.mktemp("plain"), {}

    def results(search: SearchConfig) -> list[TrialResult]:
        key = search.model_dump_json()
        if key not in known:
            known[key] = drive(folder / str(len(known)), search)
        return known[key]

    return results


def same(found: list[TrialResult], expected: list[TrialResult]) -> bool:
    return [r.record() for r in found] == [r.record() for r in expected]


# --- the order of events


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "grid", "cmaes"])
@settings(steady, max_examples=5)
@given(st.integers(1, 4), st.randoms(use_true_random=True))
def test_trials_do_not_depend_on_the_order_in_which_they_finish(plain, sampler, at_once, chance):
    """As with any number of workers: up to `at_once` trials run, any of them finishes next."""
    search = config(18, sampler)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "journal", search) as study:
        waiting, running, numbers = [], [], []
        while True:
            if chance.random() < 0.7 or not running:
                asked = study.refill()
                waiting += asked
                numbers += [trial.number for trial in asked]
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
            if not running:
                break
            study.record(outcome(running.pop(chance.randrange(len(running)))))
        assert numbers == list(range(18))
        assert same(study.results, plain(search))


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_no_more_trials_are_open_than_the_window_holds(tmp_path, window):
    with opened(tmp_path / "journal", config(20, window=window)) as study:
        asked = study.refill()
        assert len(asked) == min(window, 20)
        assert study.refill() == []
        study.record(outcome(asked[-1]))
        assert len(study.refill()) == (1 if window == 1 else 0)  # trial 0 is still out


@pytest.mark.parametrize(
    ("sampler", "trials", "window"),
    [("tpe", 200, 64), ("random", 200, 64), ("qmc", 40, 16), ("grid", 40, 16), ("cmaes", 40, 16)],
)
@settings(steady, max_examples=4)
@given(st.randoms(use_true_random=True))
def test_blocks_do_not_depend_on_the_order_in_which_results_come_nor_on_kills(plain, sampler, trials, window, chance):
    search = config(trials, sampler, window=window, grid_points=5)
    with tempfile.TemporaryDirectory() as folder:
        path, recorded, over = Path(folder) / "journal", set(), False
        while not over:
            with opened(path, search) as study:
                waiting = study.refill()
                while waiting and chance.random() < 0.8:
                    chance.shuffle(waiting)
                    size = chance.randint(1, len(waiting))
                    study.record_all([outcome(trial) for trial in waiting[:size]])
                    recorded |= {trial.number for trial in waiting[:size]}
                    waiting = waiting[size:] + study.refill()
                assert {r.trial for r in study.results} == recorded
                if over := not waiting:
                    assert same(study.results, plain(search))


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_block_is_asked_when_the_window_has_room_for_all_of_it(tmp_path, sampler):
    """Trial n first of a block of 16: when 0 .. n + 16 - 64 - 1 have been told, and not before."""
    with opened(tmp_path / "journal", config(90, sampler, window=64)) as study:
        asked = study.refill()
        assert [trial.number for trial in asked] == list(range(64))
        for trial in asked[1:40]:
            study.record(outcome(trial))
        assert study.refill() == []  # trial 0 is out
        study.record(outcome(asked[0]))
        assert [trial.number for trial in study.refill()] == list(range(64, 90))  # 40 told: 16, and the last 10
        for trial in asked[40:]:
            study.record(outcome(trial))
        assert study.refill() == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_file_cut_at_the_end_of_any_line_holds_whole_blocks(tmp_path, sampler):
    search, path = config(80, sampler, window=16), tmp_path / "journal"
    with opened(path, search) as study:
        waiting = study.refill()
        while waiting:
            study.record_all([outcome(trial) for trial in waiting[:5]])
            waiting = waiting[5:] + study.refill()
        expected = study.results
    whole = path.read_bytes()
    lines = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for size in random.Random(1).sample(lines, 30):
        path.write_bytes(whole[: size + 7])
        Store(path, write=True).close()  # cuts off the torn batch
        asked = path.read_bytes().count(b'"op_code":4')
        assert asked % 4 == 0
        if size == lines[-1] or asked % 16 == 0:
            assert same(drive(path, search), expected)


def test_with_stop_nothing_new_is_asked(tmp_path):
    with opened(tmp_path / "journal", config(20)) as study:
        for trial in study.refill():
            study.record(outcome(trial))
        assert study.refill(stop=True) == []
        assert len(study.results) == 4
        assert [trial.number for trial in study.refill()] == [4, 5, 6, 7]


def test_a_result_that_comes_twice_counts_once(tmp_path):
    with opened(tmp_path / "journal", config(4)) as study:
        (first, *_) = study.refill()
        study.record(outcome(first))
        study.record(TrialResult(0, Phase.SEARCH, 0, dict(first.values), error="came late"))
        assert same(study.results, [outcome(first)])
    with opened(tmp_path / "journal", config(4)) as study:
        study.record(TrialResult(0, Phase.SEARCH, 0, dict(first.values), error="came later"))
        assert same(study.results, [outcome(first)])
    assert same(Store(tmp_path / "journal", write=False).results(), [outcome(first)])


# --- every sampler


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "grid", "cmaes"])
def test_sampler_draws_from_the_space_and_differs_from_trial_to_trial(plain, sampler):
    results = plain(config(24, sampler))
    assert [r.trial for r in results] == list(range(24))
    assert all(SPACE.contains(r.values) for r in results)
    assert all(isinstance(r.values["width"], int) for r in results)
    assert len({json.dumps(r.values) for r in results}) == 24
    assert {r.values["clip_norm"] for r in results} == {None, 1, 5}
    assert {r.verdict for r in results} >= {"stalled", "nan"}


def test_gp_sampler(tmp_path):
    """Ten trials at random, as Optuna has it, and one by the model: it takes a second and needs torch."""
    with opened(tmp_path / "journal", config(11, "gp", window=1)) as study:
        while asked := study.refill():
            for trial in asked:
                verdict = outcome(trial).verdict or "stalled"  # the model wants ten that completed
                study.record(TrialResult(trial.number, Phase.SEARCH, 0, dict(trial.values), verdict, score=0.5))
    assert [r.trial for r in study.results] == list(range(11))
    assert all(SPACE.contains(r.values) for r in study.results)
    assert "optuna._gp.gp" in sys.modules


def test_samplers_and_seeds_differ(plain):
    found = [plain(config(24, s)) for s in ("tpe", "random", "qmc", "grid", "cmaes")] + [plain(config(24, seed=1))]
    assert len({json.dumps([r.values for r in results]) for results in found}) == 6


@pytest.mark.parametrize("trials", [5, 24, 100])
def test_grid_visits_every_point_once_and_stops(tmp_path, trials):
    search = config(trials, "grid")
    with opened(tmp_path / "journal", search) as study:
        assert study.total == min(trials, 24)
    results = drive(tmp_path / "journal", search)
    assert len({json.dumps(r.values) for r in results}) == len(results) == min(trials, 24)
    for name, axis in SPACE.axes:
        assert {r.values[name] for r in results} <= set(axis.grid(2))


def test_grid_that_is_interrupted_still_visits_every_point_once(tmp_path):
    done = 0
    while done < 24:
        with opened(tmp_path / "journal", config(100, "grid")) as study:
            for trial in study.refill()[:3]:
                study.record(outcome(trial))
            done = len(study.results)
    assert len({json.dumps(r.values) for r in study.results}) == 24


@pytest.mark.parametrize(
    ("axis", "high"),
    [
        (Range(0.0, 1.0, step=0.3), 0.9),
        (Range(0.1, 0.3, step=0.1), 0.3),
        (Range(16, 100, integer=True, step=32), 80),
        (Range(8.0, 64.0, integer=True), 64),
        (Range(1, 1000, integer=True, log=True), 1000),
        (Range(1e-5, 10, log=True), 10),
    ],
)
def test_distribution_ends_where_the_axis_does(axis, high):
    """Without Optuna's warning of a range that its step does not divide: a warning fails a test."""
    assert distribution(axis).high == high


# --- kills


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "grid", "cmaes"])
@settings(steady, max_examples=6)
@given(st.randoms(use_true_random=True))
def test_a_kill_between_any_two_operations_changes_nothing(plain, sampler, chance):
    """Whatever is killed: nothing recorded is lost, what was asked is asked again, the end is the same."""
    search = config(18, sampler)
    with tempfile.TemporaryDirectory() as folder:
        path, recorded = Path(folder) / "journal", set()
        for _ in range(1000):
            with opened(path, search) as study:
                assert {r.trial for r in study.results} == recorded
                if over := not work_until_killed(study, chance, recorded):
                    assert same(study.results, plain(search))
            if over:
                return
    raise AssertionError("the search came to no end")


def work_until_killed(study: StudySearch, chance: random.Random, recorded: set[int]) -> bool:
    """Whether it was killed; if not, all trials are done."""
    waiting: list[Asked] = []
    while True:
        if chance.random() < 0.15:
            return True
        asked = study.refill()
        assert not {trial.number for trial in asked} & recorded
        waiting += asked
        if not waiting:
            return False
        if chance.random() < 0.15:
            return True
        trial = waiting.pop(chance.randrange(len(waiting)))
        study.record(outcome(trial))
        recorded.add(trial.number)


def batches(data: bytes) -> list[int]:
    """Where each batch ends."""
    ends, size = [], 0
    for line in data.splitlines(keepends=True):
        size += len(line)
        if json.loads(line).get("end"):
            ends.append(size)
    return ends


@pytest.mark.parametrize("last", ["asked", "recorded"])
def test_a_file_cut_at_any_byte_of_its_last_batch_is_as_if_that_had_not_been_written(tmp_path, plain, last):
    search, path = config(4, window=1), tmp_path / "journal"
    with opened(path, search) as study:
        study.record(outcome(*study.refill()))
        (asked,) = study.refill()
        if last == "recorded":
            study.record(outcome(asked))
    whole = path.read_bytes()
    *_, start, end = batches(whole)
    assert end == len(whole)
    for size in range(start, end):
        path.write_bytes(whole[:size])
        store = Store(path, write=True)
        assert path.read_bytes() == whole[:start]
        assert [r.trial for r in store.results()] == [0]
        if size % 32 == 0 or whole[size - 1 : size] == b"\n":
            study = store.begin(META, SPACE, search, search.window)
            assert [dict(t.values) for t in study.refill()] == [dict(plain(search)[1].values)]
        store.close()
    assert same(drive(path, search), plain(search))


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "grid", "cmaes"])
def test_a_file_cut_anywhere_ends_the_same(tmp_path, plain, sampler):
    search, path = config(18, sampler), tmp_path / "journal"
    assert same(drive(path, search), plain(search))
    whole = path.read_bytes()
    for size in random.Random(sampler).sample(range(len(whole)), 8):
        path.write_bytes(whole[:size])
        reader = Store(path, write=False)
        before = reader.results()
        kept = max((end for end in batches(whole) if end <= size), default=0)
        assert len(before) == whole[:kept].count(b'"user_attr":{"result"')
        assert same(drive(path, search), plain(search))
        assert same(before, [r for r in plain(search) if r.trial in {b.trial for b in before}])


def test_trials_raised_later_go_on(tmp_path):
    path = tmp_path / "journal"
    first = drive(path, config(6, "tpe"))
    assert same(drive(path, config(6, "tpe")), first)
    more = drive(path, config(10, "tpe"))
    assert [r.trial for r in more] == list(range(10))
    assert same(more[:6], first)
    assert same(drive(path, config(3, "tpe")), more)  # fewer than there are: nothing is taken away


def test_what_a_run_was_begun_with_stays(tmp_path):
    store = Store(tmp_path / "journal", write=True)
    assert store.meta() == {}
    store.begin({"a": [1, None]}, SPACE, config(3), 4)
    store.close()
    store = Store(tmp_path / "journal", write=True)
    assert store.meta() == {"a": [1, None]}
    store.begin({"b": 2}, SPACE, config(3), 4)
    store.close()
    assert Store(tmp_path / "journal", write=False).meta() == {"a": [1, None]}


def test_time_that_was_spent_is_kept(tmp_path):
    with opened(tmp_path / "journal", config(4)) as study:
        assert study.seconds == 0
        for i, trial in enumerate(study.refill()):
            study.record(outcome(trial), 1.5 * i)
        assert study.seconds == 4.5
    assert Store(tmp_path / "journal", write=False).seconds() == 4.5


def test_confirming_runs_come_after_the_search_and_are_known_again(tmp_path):
    path = tmp_path / "journal"
    values = {"lr": 0.1, "width": 16, "dropout": 0.3, "clip_norm": None}
    runs = [
        TrialResult(0, Phase.CONFIRM, 1, values, "converging", score=0.5),
        TrialResult(0, Phase.CONFIRM, 2, values, "nan", first_bad=3),
        TrialResult(0, Phase.CONFIRM, 3, values, error="killed"),
    ]
    with opened(path, config(2)) as study:
        for run in runs:
            study.record(run)
        for trial in study.refill():
            study.record(outcome(trial))
        results = study.results
    assert [(r.phase, r.trial, r.seed) for r in results[2:]] == [
        ("confirm", 0, 1),
        ("confirm", 0, 2),
        ("confirm", 0, 3),
    ]
    assert same(Store(path, write=False).results(), results)
    with opened(path, config(2)) as study:
        assert study.confirmed() == {(0, 1), (0, 2), (0, 3)}
        assert study.refill() == []


# --- one writer


def test_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    path = tmp_path / "journal"
    with opened(path, config(4)) as study:
        (first, *_) = study.refill()
        study.record(outcome(first))
        assert is_held(path)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"another recipefuzz is at work in this run\n  fix: +wait for it"):
            Store(path, write=True)
        assert [r.trial for r in Store(path, write=False).results()] == [0]
        assert path.read_bytes() == before
    assert not is_held(path)


def test_writer_in_another_process_is_noticed_and_its_death_frees_the_run(tmp_path):
    path = tmp_path / "journal"
    drive(path, config(2))
    code = "import sys; from recipefuzz.journal import Journal; from pathlib import Path\n"
    code += "journal = Journal(Path(sys.argv[1]), write=True); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert is_held(path)
        with pytest.raises(InputError, match="another recipefuzz is at work"):
            Store(path, write=True)
        other.kill()
    Store(path, write=True).close()


def test_reader_makes_no_file(tmp_path):
    with pytest.raises(RunFailedError, match=r"journal: can't read the run's journal: No such file or directory"):
        Store(tmp_path / "journal", write=False)
    with pytest.raises(RunFailedError, match=r"can't open the run's journal: No such file or directory"):
        Store(tmp_path / "missing" / "journal", write=True)
    assert list(tmp_path.iterdir()) == []


# --- damage


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    "line",
    [b'{"op_code": 4, "trial', b"\x00\x00\xff", b"", b"[1]", b"{}"],
    ids=["cut", "zeros", "empty", "list", "no code"],
)
def test_damage_in_the_middle_names_the_line_and_changes_nothing(tmp_path, line, write):
    path = tmp_path / "journal"
    drive(path, config(3))
    lines = path.read_bytes().splitlines()
    lines[6] = line
    damaged = b"\n".join([*lines, b""])
    path.write_bytes(damaged)
    with pytest.raises(
        InputError, match=r"journal:7: the run's journal is damaged: this line is no entry\n(.|\n)*--fresh"
    ):
        Store(path, write=write)
    assert path.read_bytes() == damaged
    assert not is_held(path)


@pytest.mark.parametrize("entry", [{"op_code": 99, "worker_id": "x"}, {"op_code": 4, "worker_id": "x"}])
def test_entries_that_make_no_sense_are_one_plain_error(tmp_path, entry):
    path = tmp_path / "journal"
    drive(path, config(3))
    with path.open("ab") as file:
        file.write(ENCODER.encode(entry | {"end": True}).encode() + b"\n")
    with pytest.raises(InputError, match=r"journal: the run's journal can't be replayed \("):
        Store(path, write=True)
    assert not is_held(path)


def test_empty_and_torn_first_batches_begin_anew(tmp_path, plain):
    path, search = tmp_path / "journal", config(5, window=2)
    with opened(path, search):
        first = path.read_bytes()
    assert first.count(b"\n") == 4
    for size in range(0, len(first), 7):
        path.write_bytes(first[:size])
        with opened(path, search) as study:
            assert [dict(t.values) for t in study.refill()] == [dict(r.values) for r in plain(search)[:2]]


# --- a full disk


class Disk:
    """A file on a disk with room for so many bytes; if `stuck`, it can't be shortened either."""

    def __init__(self, room: int, *, at_most: int = 10**9, stuck: bool = False) -> None:
        self.room, self.at_most, self.stuck = room, at_most, stuck

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: min(self.room, self.at_most)])
        self.room -= written
        return written

    def seek(self, at: int) -> None:
        self.file.seek(at)

    def truncate(self, size: int) -> None:
        if self.stuck and size < self.file.seek(0, os.SEEK_END):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.file.truncate(size)

    def fileno(self) -> int:
        return self.file.fileno()


def put_on(disk: Disk, store: Store) -> None:
    opened = store._journal._opened

    def on_disk() -> Disk:
        disk.file = opened()
        return disk

    store._journal._opened = on_disk


class Syncs(list[int]):
    """The journal's size at each sync, by a clock that the test sets."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(os, "fsync", lambda _: self.append(path.stat().st_size))
        monkeypatch.setattr(journal, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_what_is_recorded_is_synced(tmp_path, monkeypatch):
    synced = Syncs(tmp_path / "journal", monkeypatch)
    with opened(tmp_path / "journal", config(2)) as study:
        asked = study.refill()
        del synced[:]
        for trial in asked:
            synced.now += SYNC_SECONDS
            study.record(outcome(trial))
            assert synced[-1] == (tmp_path / "journal").stat().st_size
        assert len(synced) == 2


def test_of_fast_trials_a_power_cut_takes_a_second_and_a_kill_takes_none(tmp_path, monkeypatch):
    synced = Syncs(tmp_path / "journal", monkeypatch)
    with opened(tmp_path / "journal", config(100, window=100)) as study:
        del synced[:]
        for done, trial in enumerate(study.refill(), start=1):
            synced.now += SYNC_SECONDS / 16  # exact in binary
            study.record(outcome(trial))
            assert len(synced) == done // 16
            assert len(Store(tmp_path / "journal", write=False).results()) == done
        study.refill()
    assert synced[-1] == (tmp_path / "journal").stat().st_size


def test_results_recorded_together_are_synced_once_and_what_is_asked_is_not(tmp_path, monkeypatch):
    synced = Syncs(tmp_path / "journal", monkeypatch)
    with opened(tmp_path / "journal", config(64, window=32)) as study:
        synced.now += SYNC_SECONDS
        del synced[:]
        asked = study.refill()
        assert synced == []
        study.record_all((outcome(trial) for trial in asked), 2.5)
        assert synced == [(tmp_path / "journal").stat().st_size]
        assert study.seconds == 2.5
    reader = Store(tmp_path / "journal", write=False)
    assert same(reader.results(), [outcome(trial) for trial in asked])
    assert reader.seconds() == 2.5


def test_peak_memory_is_kept_over_restarts_and_written_where_it_grew(tmp_path):
    path, sizes = tmp_path / "journal", []
    for peak in (Peak(300), Peak(200, 250), Peak(200, 100)):
        with opened(path, config(6, window=2)) as study:
            study.record_all([outcome(study.refill()[0])], peak=peak)
            sizes.append(path.read_bytes().count(b"peak_memory"))
    assert sizes == [1, 2, 2]
    assert Store(path, write=False).peak() == study.peak == Peak(300, 250)
    assert (str(Peak(300)), str(Peak(300, 250))) == ("300 MB", "300 MB, and 250 MB in a worker at most")


def test_a_trial_takes_under_three_kilobytes_of_memory(tmp_path):
    """Of its result, whose trace alone is 17 kB, and of what the sampler knows: 10,000 trials take 30 MB at most."""
    trace = Trace(*np.random.default_rng(0).random((len(COLUMNS), 300)), steps_run=300)
    used = {}
    with opened(tmp_path / "journal", config(600, window=100)) as study:
        tracemalloc.start()
        try:
            while asked := study.refill():
                study.record_all([of_a_long_run(trial, trace) for trial in asked])
                used[asked[-1].number] = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    first, last = min(n for n in used if n >= 200), max(used)
    assert last == 599
    assert (used[last] - used[first]) / (last - first) < 3000


def of_a_long_run(trial: Asked, trace: Trace) -> TrialResult:
    verdict = Verdict(
        Label.STALLED, f"skill {trial.number} after 300 steps, which are {'too few ' * 16}", "unknown", {}
    )
    recipe = Recipe.of(trial.values)
    whose = {"trial": trial.number, "phase": Phase.SEARCH, "seed": 0, "recipe": recipe}
    return result_of(trace, verdict, 1.0, Budget(300, 4), **whose)


def test_megabytes_are_those_of_this_process():
    code = "from recipefuzz.peak import megabytes; a = megabytes(); b'x' * 2**27; print(a, megabytes())"
    before, after = map(
        int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    )
    assert before < 60
    assert 127 <= after - before <= 140


def test_a_disk_that_is_gone_at_the_end_is_an_error_and_lets_go_of_the_file(tmp_path, monkeypatch):
    store = Store(tmp_path / "journal", write=True)
    for trial in (study := store.begin(META, SPACE, config(2), 2)).refill():
        study.record(outcome(trial))

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunFailedError, match="can't write the run's journal: Input/output error"):
        store.close()
    assert not is_held(tmp_path / "journal")
    assert len(Store(tmp_path / "journal", write=False).results()) == 2


def test_journal_keeps_no_entries_in_memory_and_hands_out_each_once(tmp_path):
    path = tmp_path / "journal"
    with contextlib.closing(Journal(path, write=True)) as writer:
        entries = [{"op_code": 0, "number": n} for n in range(10)]

        def numbers(first: int) -> list[int]:
            return [log["number"] for log in writer.read_logs(first)]

        writer.append_logs(entries[:3])
        assert numbers(0) == [0, 1, 2]
        writer.flush()
        writer.append_logs(entries[3:5])
        assert numbers(3) == [3, 4]
        writer.flush()
        writer.append_logs(entries[5:])
        assert numbers(4) == [4, 5, 6, 7, 8, 9]
        writer.flush()
        assert numbers(10) == []
        assert numbers(0) == list(range(10))
        assert not any(isinstance(value, list) and value for value in vars(writer).values())


def test_short_writes_are_written_to_their_end(tmp_path, plain):
    store = Store(tmp_path / "journal", write=True)
    put_on(Disk(10**9, at_most=100), store)
    study = store.begin(META, SPACE, config(5), 2)
    while asked := study.refill():
        for trial in asked:
            study.record(outcome(trial))
    assert same(Store(tmp_path / "journal", write=False).results(), plain(config(5, window=2)))


@pytest.mark.parametrize("room", [0, 1, 50, 300])
@pytest.mark.parametrize("stuck", [False, True], ids=["", "stuck"])
def test_full_disk_leaves_the_file_as_it_was_and_the_store_usable(tmp_path, plain, room, stuck):
    path, search = tmp_path / "journal", config(5, window=2)
    store = Store(path, write=True)
    study = store.begin(META, SPACE, search, search.window)
    first, second = study.refill()
    study.record(outcome(first))
    whole, healthy = path.read_bytes(), store._journal._opened
    put_on(Disk(room, stuck=stuck), store)
    with pytest.raises(
        RunFailedError, match=r"can't write the run's journal: No space left on device\n  fix: +everything"
    ):
        study.record(outcome(second))
    assert path.read_bytes()[: len(whole)] == whole
    assert stuck or path.read_bytes() == whole
    assert [r.trial for r in Store(path, write=False).results()] == [0]
    store._journal._opened = healthy  # room has been made
    while asked := study.refill():
        for trial in asked:
            study.record(outcome(trial))
    store.close()
    assert same(Store(path, write=False).results(), plain(search))


def test_full_disk_then_another_process(tmp_path, plain):
    path, search = tmp_path / "journal", config(5, window=2)
    store = Store(path, write=True)
    study = store.begin(META, SPACE, search, search.window)
    put_on(Disk(700, stuck=True), store)
    with pytest.raises(RunFailedError, match="No space left"):
        study.refill()
    store._journal._held.close()
    assert same(drive(path, search), plain(search))


def test_journal_refuses_what_is_no_json(tmp_path):
    writer = Journal(tmp_path / "journal", write=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.append_logs([{"op_code": 1, "value": math.nan}])
    writer.flush()
    writer.close()
    assert (tmp_path / "journal").read_bytes() == b""
    assert writer.read_logs(0) == []


# --- CMA-ES, which Optuna keeps as a pickle


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def with_state(path: Path, state: Callable[[str], str]) -> None:
    """Exchange the state in all trials that hold one."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("cma:optimizer:0" in entry.get("system_attr", {}) for entry in entries)
    for entry in entries:
        attributes = entry.get("system_attr", {})
        attributes.update({key: state(value) for key, value in attributes.items() if key == "cma:optimizer:0"})
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_cma_es_proposes_the_same_as_optunas_and_keeps_no_pickle(tmp_path, monkeypatch):
    """With ten numeric axes its state is longer than one attribute may be."""
    space = Space((*SPACE.axes, *((f"x{i}", Range(0.0, 1.0)) for i in range(7))))
    ours = drive(tmp_path / "ours", config(60, "cmaes"), space)
    monkeypatch.setattr(sampling, "PlainCmaEs", optuna.samplers.CmaEsSampler)
    assert same(ours, drive(tmp_path / "optuna's", config(60, "cmaes"), space))
    entries = [json.loads(line).get("system_attr", {}) for line in (tmp_path / "ours").read_text().splitlines()]
    states = [entry["cma:optimizer:0"] for entry in entries if "cma:optimizer:0" in entry]
    assert len(states) > 3
    assert all(state.startswith('{"_mean": [') for state in states)
    assert any("cma:optimizer:1" in entry for entry in entries)


def test_a_pickle_in_a_journal_is_refused_and_not_run(tmp_path, monkeypatch):
    path, search = tmp_path / "journal", config(60, "cmaes")
    drive(path, config(30, "cmaes"))
    with_state(path, lambda _: pickle.dumps(Attack(tmp_path / "attacked")).hex())
    with pytest.raises(
        InputError, match=r"journal: the run's journal can't be replayed \(.*pickles are not read\)\n(.|\n)*--fresh"
    ):
        drive(path, search)
    assert not (tmp_path / "attacked").exists()
    monkeypatch.setattr(sampling, "PlainCmaEs", optuna.samplers.CmaEsSampler)  # it would have been run:
    with pytest.raises(InputError, match="File exists"):
        drive(path, search)
    assert (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"_mean": [0.5]}, "does not fit the space: mean"),
        ({"_C": [[1.0, 0.0], [0.0]]}, "not numbers as this version keeps them"),
        ({"_sigma": 0.0}, "no step size"),
        ({"_sigma": math.nan}, "does not fit the space: sigma"),
        ({"_pc": [1e40, 0.0, 0.0]}, "does not fit the space: pc"),
        ({"_g": -1}, "no generation"),
        ({"_g": None}, "does not fit the space: g"),
    ],
)
def test_a_state_of_cma_es_that_can_not_be_is_refused(tmp_path, change, why):
    path = tmp_path / "journal"
    drive(path, config(30, "cmaes"))
    with_state(path, lambda state: json.dumps(json.loads(state) | change))
    with pytest.raises(InputError, match=rf"can't be replayed \(ValueError: the state of CMA-ES .*{why}"):
        drive(path, config(60, "cmaes"))


def test_optuna_unpickles_no_snapshot_of_ours():
    assert not issubclass(Journal, BaseJournalSnapshot)


# --- what the sampler is told


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_optuna_reads_the_file_and_finds_failed_recipes_completed_and_infeasible(tmp_path, sampler):
    results = drive(tmp_path / "journal", config(24, sampler))
    trials = optuna.load_study(
        study_name="search", storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
    ).trials
    assert [t.number for t in trials] == list(range(24))
    for trial, result in zip(trials, results, strict=True):
        assert trial.params == dict(result.values)
        if result.error:
            assert trial.state is TrialState.FAIL
        else:
            assert trial.state is TrialState.COMPLETE
            (violation,) = trial.constraints.values()
            assert (violation > 0) is (result.verdict != "converging")
            assert (trial.value > 1) is (result.verdict != "converging")


def told(verdict: str, score: float = 0.0, first_bad: int | None = None) -> tuple[float, float]:
    return objective(TrialResult(0, Phase.SEARCH, 0, {}, verdict, score=score, first_bad=first_bad))


def test_objective_prefers_converging_to_stalled_to_nan():
    order = [
        told("converging", 1.0),
        told("converging", 0.3),
        told("converging", 0.0),
        told("stalled", 0.9),
        told("stalled", 0.0),
        told("nan", first_bad=100),
        told("nan", first_bad=1),
    ]
    assert [value for value, _ in order] == sorted({value for value, _ in order})
    assert [violation > 0 for _, violation in order] == [False] * 3 + [True] * 4


@steady
@given(st.sampled_from(["converging", "stalled", "nan"]), st.floats(), st.none() | st.integers(1, 10**6))
def test_objective_is_finite_whatever_was_measured(verdict, score, first_bad):
    value, violation = told(verdict, score, first_bad)
    assert 0 <= value <= 3
    assert (violation > 0) is (verdict != "converging")


AXES = {name: distribution(axis) for name, axis in SPACE.axes}


def seen_trials(count: int, told: int) -> Seen:
    seen, rng = Seen(AXES), np.random.RandomState(0)
    recipes = [at_random(AXES, rng) for _ in range(count)]
    seen.ask(recipes)
    for number in range(told):
        seen.tell(number, outcome(Asked(number, recipes[number])))
    return seen


def optunas_trials(count: int, told: int) -> list[optuna.trial.FrozenTrial]:
    """The same trials as Optuna has them."""
    study, rng = optuna.create_study(), np.random.RandomState(0)
    for number in range(count):
        recipe = at_random(AXES, rng)
        result = outcome(Asked(number, recipe))
        state = TrialState.RUNNING if number >= told else TrialState.FAIL if result.error else TrialState.COMPLETE
        value, violation = objective(result)
        complete = {"value": value, "constraints": {"failed": violation}} if state is TrialState.COMPLETE else {}
        study.add_trial(optuna.trial.create_trial(state=state, params=recipe, distributions=AXES, **complete))
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING))


@pytest.mark.parametrize(("count", "told"), [(0, 0), (30, 14), (90, 61), (400, 380)])
def test_trials_are_split_into_good_and_bad_as_optuna_does(count, told):
    from optuna.samplers._tpe.sampler import _split_trials, default_gamma

    seen = seen_trials(count, told)
    below, above = _split_trials(optuna.create_study(), optunas_trials(count, told), default_gamma(seen.completed))
    assert seen.below().tolist() == [t.number for t in below]
    assert np.concatenate(seen.above()).tolist() == [t.number for t in above]
    for name, column in seen.points(seen.below(), AXES).items():
        assert column.tolist() == [AXES[name].to_internal_repr(t.params[name]) for t in below]


@pytest.mark.parametrize("told", [0, 1, 30, 300])
def test_densities_and_draws_are_those_of_optunas_estimator(told):
    """The same densities to rounding, and the same distribution to sampling noise."""
    seen = seen_trials(told, told)
    kernels = BlockTPE(AXES)._fit_above(seen)
    optunas = super(_Kernels, kernels)
    theirs, ours = (draw(np.random.RandomState(1), 4000) for draw in (optunas.sample, kernels.sample))
    np.testing.assert_allclose(kernels.log_pdf(theirs), optunas.log_pdf(theirs), rtol=0, atol=1e-9)
    for name, axis in AXES.items():
        assert all(axis._contains(value) for value in ours[name])
        points = np.unique(np.concatenate([ours[name], theirs[name]]))
        shares = [np.searchsorted(np.sort(x[name]), points, side="right") / 4000 for x in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 0.043, name  # Kolmogorov-Smirnov: one in a thousand exceeds it


def test_thinned_kernels_keep_the_weight_of_all():
    cells, weights = np.repeat(np.arange(100), 10), np.linspace(0.1, 1, 1000)
    for most, kept in ((1000, 1000), (500, 100), (30, 30)):
        numbers, heavier = thinned(np.arange(1000), weights, cells, most)
        assert len(numbers) == len(set(numbers)) == len(heavier) == kept
        assert heavier.sum() == pytest.approx(weights.sum())


LR_AND_SCALE = Space((("lr", Range(1e-5, 10, log=True)), ("init_scale", Range(0.01, 30, log=True))))


def failing(values) -> str:
    """A space like that of a real network: 23 % NaN, 49 % stalled, the rest converges."""
    if math.log10(values["lr"]) + 0.5 * math.log10(values["init_scale"]) > -0.5:
        return "nan"
    return "stalled" if values["lr"] < 1e-3 or values["init_scale"] < 0.1 else ""


def share_of_failing(
    seed: int, *, as_fail: bool = False, trials: int = 60, window: int = 16, sampler: str = "tpe"
) -> float:
    """Of trials of tpe; `as_fail` tells the same sampler FAIL where we tell it COMPLETE and infeasible."""
    bad = 0
    search = SearchConfig(trials=trials, seed=seed, sampler=sampler, window=window)
    with (
        tempfile.TemporaryDirectory() as folder,
        opened(Path(folder) / "journal", search, LR_AND_SCALE) as study,
    ):
        while asked := study.refill():
            for number, values in ((trial.number, trial.values) for trial in asked):
                verdict = failing(values)
                bad += bool(verdict)
                hill = 1 - (math.log10(values["lr"]) + 2) ** 2 / 4 - math.log10(values["init_scale"]) ** 2 / 4
                found: dict = {"verdict": verdict or "converging", "score": 0.05 if verdict else max(0.0, hill)}
                if verdict and as_fail:
                    found = {"error": verdict}
                study.record(TrialResult(number, Phase.SEARCH, 0, dict(values), **found))
    return bad / search.trials


def test_tpe_spends_fewer_trials_on_failing_recipes_than_if_it_were_told_that_they_failed():
    """Optuna's samplers ignore failed trials (optuna issue 332), so they return to the bad region.

    Observed over these seeds with Optuna 5.0: 0.52 (0.47 to 0.57) of the trials against 0.75 (0.72 to 0.80); over
    eight others 0.53 against 0.76. A recipe picked at random fails in 0.72: told FAIL, tpe is no better than chance.
    """
    seeds = range(4)
    ours = [share_of_failing(seed, as_fail=False) for seed in seeds]
    fail = [share_of_failing(seed, as_fail=True) for seed in seeds]
    assert sum(ours) / len(ours) < sum(fail) / len(fail) - 0.12


def test_tpe_learns_in_blocks_too():
    """Observed over these seeds: 0.28 of the trials fail (blocks of 16, of 200 trials), of those at random 0.72."""
    tpe, chance = (
        [share_of_failing(seed, trials=200, window=64, sampler=sampler) for seed in range(4)]
        for sampler in ("tpe", "random")
    )
    assert max(tpe) < 0.4
    assert min(chance) > 0.6


# --- the run's folder


def study_config(folder: Path, **changes):
    data = {
        "study": "digits",
        "target": {"data": "digits", "model": "mlp"},
        "space": {"lr": [0.1, 1.0]},
        "run": {"folder": str(folder)},
    }
    return parse_config(data | changes)


def begin(config, code=None, *, fresh: bool = False) -> RunFolder:
    folder = RunFolder.of(config)
    store = folder.open(config, code or {}, fresh=fresh)
    store.begin(identity(config, code or {}), config.axes, config.search, 4)
    store.close()
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"trials": 7, "time": "1h", "rank_by": "heldout_skill", "confirm": {"top": 1, "seeds": 2}}},
        {"study": "renamed"},
    ],
)
def test_run_goes_on_with_changes_that_change_no_trial(tmp_path, change):
    begin(study_config(tmp_path / "run"))
    folder = begin(study_config(tmp_path / "run", **change))
    assert folder.load_config().resolved() == study_config(tmp_path / "run", **change).resolved()


@pytest.mark.parametrize(
    ("change", "code", "diff"),
    [
        ({"space": {"lr": [0.1, 2.0]}}, {}, r"-  - 1\.0\n  \+  - 2\.0"),
        ({"search": {"seed": 1}}, {}, r"-  seed: 0\n  \+  seed: 1"),
        ({"trial": {"steps": 40}}, {}, r"-  steps: 300\n  \+  steps: 40"),
        ({"recipe": {"optimizer": "adam"}}, {}, r"\+  optimizer: adam"),
        ({}, {"case.py": "1234"}, r"\+  case\.py: '1234'"),
    ],
)
def test_run_with_another_config_or_code_is_refused_with_the_difference(tmp_path, change, code, diff):
    folder = begin(study_config(tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    message = rf"run: this run was made with another config or other code\n(.|\n)*--fresh(.|\n)*{diff}"
    with pytest.raises(InputError, match=message):
        begin(study_config(tmp_path / "run", **change), code)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
    assert not folder.is_held()
    begin(study_config(tmp_path / "run", **change), code, fresh=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run.old-1").iterdir()} == {
        p.name: b for p, b in before.items()
    }


def test_fresh_puts_a_damaged_run_aside_and_leaves_a_held_one(tmp_path):
    config = study_config(tmp_path / "run")
    folder = begin(config)
    folder.journal.write_bytes(b"rubbish\n" + folder.journal.read_bytes())
    with pytest.raises(InputError, match="damaged"):
        begin(config)
    begin(config, fresh=True)
    begin(config, fresh=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    store = folder.open(config, {}, fresh=False)
    with pytest.raises(InputError, match="another recipefuzz is at work"):
        begin(config, fresh=True)
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]


def test_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFailedError, match=r"run: can't make the run's folder: File exists\n  fix: +run\.folder"):
        begin(study_config(tmp_path / "run"))
    with pytest.raises(RunFailedError, match=r"below: can't make the run's folder: Not a directory"):
        begin(study_config(tmp_path / "run" / "below"))
    assert (tmp_path / "run").read_text() == "a file"


def test_run_is_found_by_its_study_its_folder_and_a_file_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"digits: no run there\n(.|\n)*fix: +recipefuzz search CONFIG makes one"):
        RunFolder.find("digits")
    folder = begin(study_config(tmp_path / "runs" / "digits"))
    for name in ("digits", "runs/digits", str(tmp_path / "runs/digits"), "runs/digits/trials.csv"):
        assert RunFolder.find(name).path == folder.path
    with pytest.raises(InputError, match=r"wine: no run there\n(.|\n)*fix: +runs here: digits"):
        RunFolder.find("wine")


def test_a_grid_that_is_too_large_is_refused():
    axes = tuple((f"a{i}", Range(0.0, 1.0)) for i in range(9))
    with pytest.raises(InputError, match=r"search.sampler: a grid of 1,953,125 points(.|\n)*sampler: qmc"):
        total(SearchConfig(sampler="grid"), Space(axes))
