"""Compiled steps: whether they pay, what is made sure of before one is used, and that no trial is worse off."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recipefuzz.engines import aot, compiling, fused, sequential
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.aot import Note
from recipefuzz.engines.compiling import Compiling, Left, differs, expected, pays, saved
from recipefuzz.engines.fused import FusedEngine
from recipefuzz.engines.job import Job, once, run
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.task import Task, TensorRows
from recipefuzz.trace import COLUMNS
from recipefuzz.verdict import Budget

CPU = torch.device("cpu")
BUDGET = Budget(24, 0)
MANY = Ahead(trials=10**9)
GENERATOR = torch.Generator().manual_seed(0)
ROWS = TensorRows(torch.randn(40, 6, generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR))


# --- decisions


@pytest.mark.parametrize(
    ("left", "cost", "speedup", "processes", "seconds"),
    [
        (Left(100, 1.0), 10, 2.0, 1, 45.0),
        (Left(100, 0.5), 10, 2.0, 1, 22.5),
        (Left(100, 1.0), 10, 2.0, 2, 40.0),  # both go on as before until it is there
        (Left(100, 1.0), 10, 1.0, 1, 0.0),
        (Left(100, 1.0), 10, 0.5, 1, 0.0),
        (Left(5, 1.0), 10, 2.0, 1, 0.0),
        (Left(0, 1.0), 0, 2.0, 1, 0.0),
    ],
)
def test_a_faster_step_saves_of_what_is_left_when_it_is_there(left, cost, speedup, processes, seconds):
    assert saved(left, cost, speedup, processes) == pytest.approx(seconds)
    assert pays(left, cost, speedup, processes) == (seconds > compiling.MARGIN * cost)


def test_what_a_build_takes_is_what_was_measured_on_this_machine():
    assumed = compiling.ASSUMED_SECONDS + 100 * compiling.ASSUMED_SECONDS_PER_CALL
    assert expected(None, [], 100) == (assumed, compiling.ASSUMED_SPEEDUP)
    others = [Note(100, assumed * share, speedup) for share, speedup in ((1, 1.2), (2, 1.4), (9, 3.0))]
    assert expected(None, others, 100) == pytest.approx((2 * assumed, 1.4))
    assert expected(None, [Note(100, 500, failed="no")], 100) == (assumed, compiling.ASSUMED_SPEEDUP)
    assert expected(Note(100, 7, 1.1), others, 100) == (7, 1.1)
    assert expected(Note(100, 7), others, 100) == (7, 1.4)


def test_a_step_that_was_no_faster_is_not_compiled_again():
    assert not pays(Left(1e9, 1.0), *expected(Note(100, 7, 0.9), [], 100), 1)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("plain", "compiled", "differ"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], False),
        ([[1.0, 2.0]], [[1.0005, 2.0]], False),
        ([[1.0, 2.0]], [[1.01, 2.0]], True),
        ([[1e6, 0.0], [1.0, 2.0]], [[1e6, 0.0], [1.1, 2.0]], True),  # relative to its own lane
        ([[NAN, 1.0], [1.0, 2.0]], [[INF, 1.0], [1.0, 2.0]], False),
        ([[NAN, 1.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 2.0]], True),  # it hides a NaN
        ([[1.0, 1.0], [1.0, 2.0]], [[NAN, 1.0], [1.0, 2.0]], True),
        ([[NAN, 1.0]], [[NAN, 1.0]], True),  # nothing to compare
    ],
)
def test_results_are_compared_lane_by_lane(plain, compiled, differ):
    plain, compiled = ([torch.tensor(values)[:, :1], torch.tensor(values)[:, 1:, None]] for values in (plain, compiled))
    assert differs(plain, compiled, 1e-3) is differ


def test_there_is_no_cache_where_none_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert aot.cache_folder() == tmp_path / "cache" / "recipefuzz" / "compiled"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert aot.cache_folder() is None


@pytest.mark.parametrize("part", ["recipefuzz", "recipefuzz/compiled"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_none(monkeypatch, tmp_path, part, mode):
    """What lies in it is machine code, and is run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0o002)
    try:
        assert aot.cache_folder() == tmp_path / "recipefuzz" / "compiled"
    finally:
        os.umask(before)
    (tmp_path / part).chmod(mode)
    assert aot.cache_folder() is None


def test_a_cache_of_another_user_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert aot.cache_folder() is not None
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert aot.cache_folder() is None


# --- in the engine, with a pretend compiler


class Normed(nn.Module):
    """With buffers that a step changes in place."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


TASK = Task(ROWS, ROWS, Normed, LOSSES["cross_entropy"], "cross_entropy", takes_norm=False, takes=None)
JOBS = [Job(key, Recipe.of({"lr": 0.01 * (1 + key), "batch_size": 8}), key) for key in range(12)]


@pytest.fixture(autouse=True)
def eager_for_decisions(monkeypatch, tmp_path):
    """A cache of the test's own; trials run their whole budget, which at these sizes is a lot of work."""

    def judge(trace, _, budget, **__):
        return trace.first_bad or (trace.steps_run >= budget.limit or None)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fused, "judge", judge)
    monkeypatch.setattr(sequential, "judge", judge)


class Finished:
    """A compiler's process that is at its end."""

    exitcode = 0

    def is_alive(self):
        return False

    def kill(self):
        pass

    join = kill


@pytest.fixture
def pretend(monkeypatch):
    """A compiler that is done at once: of a step as given, so many times as fast, or of none for a reason."""
    started = []

    def compiler(make=lambda plain: plain, times=2.0, failed="", exitcode=0):
        plain = {}

        def start(self):
            started.append(self._order.calls)
            plain["step"] = self._program.recorded_step
            self._process = Finished()
            self._process.exitcode = exitcode
            if failed or not exitcode:
                aot.write_note(self._order.note, Note(self._order.calls, 3.0, failed=failed))
            if not failed and not exitcode:
                self._order.library.touch()
            return True

        monkeypatch.setattr(Compiling, "_start", start)
        monkeypatch.setattr(compiling, "least_seconds", lambda step, *_: 1.0 / (times if hasattr(step, "fast") else 1))
        monkeypatch.setattr(aot, "loaded", lambda _: marked(make(plain["step"])))
        return started

    return compiler


def marked(step):
    def compiled(inputs):
        return step(inputs)

    compiled.fast = True
    return compiled


def trained(ahead=MANY, lanes=4):
    """Outcomes and what was said; the outcomes must be the sequential engine's."""
    lines = []
    engine = FusedEngine(TASK, BUDGET, CPU, SequentialEngine(TASK, BUDGET, CPU), lanes, ahead, once(lines.append))
    found = {outcome.job.key: outcome for outcome in run(engine, JOBS)}
    expected_traces = {o.job.key: o.trace for o in run(SequentialEngine(TASK, BUDGET, CPU), JOBS)}
    assert sorted(found) == sorted(expected_traces)
    for key, outcome in found.items():
        assert outcome.error == ""
        for column in COLUMNS:
            theirs = getattr(expected_traces[key], column)
            np.testing.assert_allclose(
                getattr(outcome.trace, column), theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max(), err_msg=column
            )
    assert engine.reasons == {}
    (group,) = engine._groups.values()
    engine.close()
    return group, lines


def test_a_faster_step_is_used_and_said(pretend):
    used = []

    def make(plain):
        def step(inputs):
            used.append(len(inputs[0]))
            return plain(inputs)

        return step

    started = pretend(make)
    group, lines = trained()
    assert len(started) == 1
    assert len(used) > 2 * BUDGET.steps / 2
    assert group.lanes.program.compiled
    assert lines == ["the default structure: steps are compiled: 2.0 times as fast (built in 3 s, kept for other runs)"]
    trained()
    assert len(started) == 1  # it is there, and used again


def test_what_is_left_decides(pretend):
    started = pretend()
    assert trained(Ahead())[1] == []
    assert trained(Ahead(len(JOBS)))[1] == []
    assert trained(replace(MANY, seconds=5.0))[1] == []
    assert started == []


def raising(_):
    def step(_):
        raise RuntimeError("not this one")

    return step


def wrong(plain):
    return lambda inputs: [2 * tensor for tensor in plain(inputs)]


def leaving_buffers(plain):
    return lambda inputs: plain([t.clone() for t in inputs])


@pytest.mark.parametrize(
    ("compiler", "line"),
    [
        ({"make": raising}, "steps go on uncompiled: the compiled one raised RuntimeError: not this one"),
        ({"make": wrong}, "steps go on uncompiled: the compiled one computes something else"),
        ({"make": leaving_buffers}, "steps go on uncompiled: the compiled one computes something else"),
        ({"times": 1.01}, None),
        ({"failed": "CppCompileError: as it says"}, "steps go on uncompiled: CppCompileError: as it says"),
        ({"exitcode": -9}, "steps go on uncompiled: the compiler's process ended with exit code -9"),
    ],
    ids=["raises", "wrong", "leaves buffers", "no faster", "fails", "killed"],
)
def test_a_compiled_step_that_is_no_good_is_not_used(pretend, compiler, line):
    started = pretend(**compiler)
    group, lines = trained()
    assert group.lanes.program.compiled is None
    assert lines == ([f"the default structure: {line}"] if line else [])
    assert len(started) == 1
    if "failed" in compiler or "times" in compiler:  # and it is known in the next run
        assert trained()[1] == []
        assert len(started) == 1


def test_a_compiled_step_that_fails_later_is_given_up(pretend):
    calls = []

    def make(plain):
        def step(inputs):
            calls.append(len(inputs[0]))
            if len(calls) > 10:
                raise RuntimeError("in the midst")
            return plain(inputs)

        return step

    pretend(make)
    group, _ = trained()
    assert group.lanes.program.compiled is None
    assert len(calls) == 11


def test_without_a_compiler_steps_go_on(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    group, lines = trained()
    assert group.lanes.program.compiled is None
    reason = "there is no C++ compiler (g++, or what $CXX names)"
    assert lines == [f"the default structure: steps are not compiled, though it would pay: {reason}"]


def test_whatever_is_wrong_with_compiling_no_trial_is_worse_off(monkeypatch):
    def ordered(*_):
        raise TypeError("can't be packed")

    monkeypatch.setattr(aot, "ordered", ordered)
    assert trained()[1] == ["the default structure: steps go on uncompiled: TypeError: can't be packed"]


# --- with the compiler

TRAIN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_compiling as tests
from recipefuzz.engines import aot, compiling
from recipefuzz.engines.compiling import Compiling

if __name__ == "__main__":  # not in the compiler's process
    if sys.argv[2] == "second":
        Compiling._start = None
    advance = Compiling.advance

    def wait(self, *args):
        line = advance(self, *args)
        while self._process is not None:
            self._process.join()
            line = advance(self, *args)
        return line

    Compiling.advance = wait
    compiling.FASTER = 0.0  # at this size anything may be
    tests.fused.judge = tests.sequential.judge = lambda trace, _, budget, **__: (
        trace.first_bad or (trace.steps_run >= budget.limit or None)
    )
    group, lines = tests.trained()
    print(*lines, group.lanes.program.compiled is not None, sep="|", end="")
"""


def in_a_process(tmp_path, which):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    arguments = [sys.executable, str(script), str(Path(__file__).parent), which]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(aot.compiler() is None, reason="no C++ compiler")
def test_the_real_compiler_is_run_once_for_all_processes(tmp_path):
    done = in_a_process(tmp_path, "first")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("the default structure: steps are compiled: ")
    assert done.stdout.endswith("kept for other runs)|True")
    started = time.monotonic()
    done = in_a_process(tmp_path, "second")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("|True")
    assert time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.skipif(aot.compiler() is None, reason="no C++ compiler")
def test_a_real_compiler_that_fails_costs_no_trial(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho nothing works >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    done = in_a_process(tmp_path, "first")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("the default structure: steps go on uncompiled: ")
    assert done.stdout.endswith("|False")
    assert "nothing works" not in done.stderr
