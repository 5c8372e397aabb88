"""The pool of processes: the same outcomes as in this process, and a worker's end costs its own trial alone.

A pool takes a second or three to start: the forkserver's torch is imported once for all tests here.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipefuzz.engines import pool, processes, select, worker
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Job, run
from recipefuzz.engines.pool import PoolEngine, died
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.targets.resolve import resolve
from recipefuzz.trace import COLUMNS
from recipefuzz.verdict import Budget

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")

BUDGET = Budget(24, 1)
# rows and models that draw from all generators; a model whose third training step may be the process's last
USERS_CODE = """
import os, random, signal, time
from pathlib import Path
import numpy as np
from torch.utils.data import Dataset

class Drawing(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x, y, *_ = first()
        return x[i] + torch.rand(3) + float(np.random.rand()) + random.random(), y[i]

first = load
def load(): return Drawing(), Drawing()

def leave_a_child():
    if (child := os.fork()) == 0:
        time.sleep(100)
        os._exit(0)
    Path(__file__).with_name("child").write_text(str(child))
    os._exit(3)

def lose_device(kind):
    raise kind("CUDA error: device-side assert triggered\\nand more")

class Fated(nn.Sequential):
    def forward(self, x):
        self.steps = getattr(self, "steps", 0) + self.training
        if self.steps == 3:
            self.fates[self.fate]()
        return super().forward(x)
    fates = {
        "train": lambda: None,
        "raise": lambda: [][0],
        "exit": lambda: os._exit(3),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(1000),
        "fork": leave_a_child,
        "lost": lambda: lose_device(torch.AcceleratorError),
        "lost, older torch": lambda: lose_device(RuntimeError),
    }

def build(fate="train", width=4):
    model = Fated(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))
    model.fate = fate
    return model
"""
RECIPES = [
    {"lr": 0.1},
    {"lr": 0.01, "optimizer": "adam", "norm": "layer"},
    {"lr": 1e30},
    {"lr": 0.1, "fate": "raise"},
    {"lr": 0.1, "optimizer": "momentum", "precision": "bf16", "init_scale": 3, "clip_norm": 1},
    {"lr": 0.1, "norm": "rms", "input_norm": "standardize", "target_norm": "minmax", "batch_size": 7},
    {"lr": 1e-5, "width": 9},
]


def jobs_of(config, recipes):
    return [Job(key, config.recipe_of(values), seed=key % 3) for key, values in enumerate(recipes)]


def of_pool(config, jobs, workers, timeout=None):
    engine = PoolEngine(config, BUDGET, ["cpu"] * workers, timeout)
    try:
        return {outcome.job.key: outcome for outcome in run(engine, jobs)}
    finally:
        engine.close()


def of_this_process(config, jobs):
    engine = SequentialEngine(resolve(config), BUDGET, torch.device("cpu"))
    return {outcome.job.key: outcome for outcome in run(engine, jobs)}


def bits(outcome):
    trace = outcome.trace
    columns = [getattr(trace, column).tobytes() for column in COLUMNS]
    return outcome.job, columns, trace.heldout, trace.first_bad, outcome.error, repr(outcome.verdict), outcome.baseline


def line_of(text, config):
    return (config.folder / "case.py").read_text().partition(text)[0].count("\n") + 1


def alive(pid):
    """Whether a process is there and has not ended (a zombie has, and waits for its parent to hear of it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def pids_of(engine):
    return [w.process.pid for w in engine._workers.values()]


@pytest.mark.parametrize(("workers", "loss"), [(1, "mse"), (2, "mse"), (2, "case:loss"), (3, "case:loss")])
def test_outcomes_are_those_of_the_sequential_engine(write_study, workers, loss):
    config = write_study(USERS_CODE, "trial: {batch_size: 8}\n", loss=loss)
    jobs = jobs_of(config, RECIPES)
    expected = of_this_process(config, jobs)
    found = of_pool(config, jobs, workers)
    assert sorted(found) == sorted(expected) == list(range(len(jobs)))
    for key, outcome in found.items():
        theirs = bits(expected[key])
        assert repr(bits(outcome)) == repr(theirs), RECIPES[key]
    assert expected[2].trace.first_bad is not None
    assert expected[3].error == f"IndexError: list index out of range (case.py:{line_of('[][0]', config)})"


def test_jobs_may_come_while_others_are_under_way(write_study):
    config = write_study(USERS_CODE)
    engine = PoolEngine(config, BUDGET, ["cpu"] * 2, None)
    jobs = iter(jobs_of(config, [{"lr": 0.1}] * 9))
    done = []
    try:
        for _ in range(3):
            engine.submit(next(jobs))
        while outcomes := engine.collect():
            done += [o.job.key for o in outcomes]
            for job in itertools.islice(jobs, len(outcomes)):
                engine.submit(job)
    finally:
        engine.close()
    assert sorted(done) == list(range(9))


def test_a_trial_that_ends_its_worker_costs_itself_alone(write_study, monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.2)
    config = write_study(USERS_CODE, "trial: {batch_size: 8}\n")
    fates = ["train", "exit", "train", "kill", "hang", "train", "crash", "raise", "train"]
    jobs = jobs_of(config, [{"lr": 0.1, "fate": fate} for fate in fates])
    expected = of_this_process(config, [j for j, fate in zip(jobs, fates, strict=True) if fate == "train"])
    found = of_pool(config, jobs, workers=2, timeout=10.0)
    assert sorted(found) == list(range(len(jobs)))
    errors = {fates[key]: outcome.error for key, outcome in found.items() if fates[key] != "train"}
    assert errors == {
        "exit": "killed: the worker process ended with exit code 3",
        "kill": "killed: the worker process got SIGKILL: probably out of memory",
        "crash": "killed: the worker process got SIGSEGV",
        "hang": "timeout: not done after 10 s (trial.timeout)",
        "raise": f"IndexError: list index out of range (case.py:{line_of('[][0]', config)})",
    }
    assert found[fates.index("hang")].seconds >= 4
    for key, outcome in expected.items():
        assert bits(found[key]) == bits(outcome)


def test_a_worker_that_dies_between_trials_costs_none(write_study, monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.2)
    config = write_study(USERS_CODE)
    job = jobs_of(config, [{"lr": 0.1}])[0]
    engine = PoolEngine(config, BUDGET, ["cpu"], None)
    try:
        first = list(run(engine, [job]))
        for _ in range(2):
            os.kill(pids_of(engine)[0], signal.SIGKILL)
            assert engine._workers[0].pipe.poll(10)  # its end of the pipe is closed
            again = list(run(engine, [job]))
            assert [bits(o) for o in again] == [bits(o) for o in first]
            assert first[0].error == ""
    finally:
        engine.close()


def test_a_worker_that_dies_and_leaves_a_child(write_study):
    """What the user's code forked holds the worker's end of the pipe: it never closes."""
    config = write_study(USERS_CODE)
    jobs = jobs_of(config, [{"fate": "fork"}, {"lr": 0.1}])
    started = time.monotonic()
    try:
        found = of_pool(config, jobs, workers=1)
    finally:
        os.kill(int((config.folder / "child").read_text()), signal.SIGKILL)
    assert time.monotonic() - started < 60
    assert [found[key].error for key in (0, 1)] == ["killed: the worker process ended with exit code 3", ""]


@pytest.mark.parametrize("fate", ["lost", "lost, older torch"])
def test_a_worker_that_has_lost_its_gpu_is_replaced(write_study, fate):
    config = write_study(USERS_CODE)
    fates = [fate, "train", "raise", fate, fate, "train"]
    engine = PoolEngine(config, BUDGET, ["cpu"], None)
    pids, errors = [], []
    try:
        for outcome in run(engine, jobs_of(config, [{"lr": 0.1, "fate": fate} for fate in fates])):
            pids += pids_of(engine)
            errors.append(outcome.error.partition(" (")[0])
    finally:
        engine.close()
    kind = "RuntimeError" if "older" in fate else "AcceleratorError"
    lost = f"{kind}: CUDA error: device-side assert triggered"
    assert errors == [lost, "", "IndexError: list index out of range", lost, lost, ""]
    assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 4, 4]


class Jobs:
    """The worker's end of the pipe."""

    def __init__(self, jobs):
        self.jobs, self.sent = jobs, []
        self.messages = iter([(0, Ahead()), *(([job], False) for job in jobs)])  # 0 lanes: the sequential engine

    def poll(self, timeout):
        return timeout is None

    def recv(self):
        message = next(self.messages)
        self.jobs = self.jobs[1:] if isinstance(message[0], list) else self.jobs
        return message

    def send(self, message):
        self.sent.append(message)


def test_a_worker_leaves_when_its_gpu_is_lost(write_study):
    config = write_study(USERS_CODE)
    pipe = Jobs(jobs_of(config, [{"lr": 0.1}, {"fate": "raise"}, {"fate": "lost"}, {"lr": 0.1}]))
    before = signal.getsignal(signal.SIGINT)
    try:
        worker.serve(pipe, config, BUDGET, "cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [job.key for job in pipe.jobs] == [3]
    assert pipe.sent[0] == "ready"
    assert [(outcome.job.key, leaves) for (outcome,), leaves, _ in pipe.sent[1:]] == [(0, False), (1, False), (2, True)]


CHILDREN = """
import multiprocessing
from torch.utils.data import DataLoader, TensorDataset

first = load
def load():
    x, y, *_ = first()
    with multiprocessing.get_context("fork").Pool(1) as children:
        assert children.map(abs, [-1]) == [1]
    parts = list(DataLoader(TensorDataset(x, y), batch_size=8, num_workers=1))
    return tuple(torch.cat(part) for part in zip(*parts)) * 2
"""


def test_the_users_code_may_have_processes_of_its_own(write_study):
    config = write_study(CHILDREN)
    assert of_pool(config, jobs_of(config, [{"lr": 0.1}]), workers=1)[0].error == ""


def test_close_leaves_no_processes(write_study):
    config = write_study(USERS_CODE)
    engine = PoolEngine(config, BUDGET, ["cpu"] * 3, None)
    for job in jobs_of(config, [{"lr": 0.1}, {"fate": "hang"}, {"fate": "hang"}, {"lr": 0.1}]):
        engine.submit(job)
    assert engine.collect()
    pids = pids_of(engine)
    assert all(map(alive, pids))
    started = time.monotonic()
    engine.close()
    assert not any(map(alive, pids))
    assert time.monotonic() - started < 5
    assert engine.collect() == []


def test_close_while_workers_are_starting(write_study):
    engine = PoolEngine(write_study(USERS_CODE), BUDGET, ["cpu"] * 2, None)
    pids = pids_of(engine)
    engine.close()
    assert not any(map(alive, pids))


def test_an_engine_that_is_forgotten_leaves_no_processes(write_study):
    engine = PoolEngine(write_study(USERS_CODE), BUDGET, ["cpu"] * 2, None)
    pids = pids_of(engine)
    assert all(map(alive, pids))
    del engine
    gc.collect()
    assert gone(pids)


ABANDONED = """
import sys, tempfile
held = tempfile.TemporaryDirectory()  # the first weakref.finalize: before multiprocessing registers what it does at exit
from recipefuzz.config import load_config
from recipefuzz.engines.pool import PoolEngine
from recipefuzz.verdict import Budget

def start_two(self, slot):
    if slot == 2:
        raise RuntimeError("in the constructor")
    worker = start(self, slot)
    print(worker.process.pid, flush=True)
    return worker

start, PoolEngine._start = PoolEngine._start, start_two
engine = PoolEngine(load_config(sys.argv[1]), Budget(24, 0), ["cpu"] * int(sys.argv[2]), None)
raise RuntimeError("before close")
"""


@pytest.mark.parametrize(("workers", "error"), [(2, "before close"), (3, "in the constructor")])
def test_the_parent_ends_when_it_never_closed_its_engine(write_study, workers, error):
    folder = write_study(USERS_CODE).folder
    command = [sys.executable, "-c", ABANDONED, str(folder / "config.yaml"), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"RuntimeError: {error}")
    assert len(done.stdout.split()) == 2
    assert gone(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "raise OSError('only there')",
            InputError,
            r"(?s)config\.yaml:2: target\.data: importing case raised OSError.*case\.py",
        ),
        ("import os; os._exit(7)", RunFailedError, "a worker process ended while starting: .* ended with exit code 7"),
    ],
)
def test_a_target_that_workers_can_not_load(write_study, code, error, message):
    """What works in this process need not in another: a file that is gone, a library that allows one copy."""
    config = write_study(code)
    engine = PoolEngine(config, BUDGET, ["cpu"], None)
    pids = pids_of(engine)
    try:
        engine.submit(Job(0, config.default_recipe(), 0))
        with pytest.raises(error, match=message):
            engine.collect()
    finally:
        engine.close()
    assert gone(pids)


PARENT = """
import sys, time
from recipefuzz.config import load_config
from recipefuzz.engines.pool import PoolEngine, forkserver
from recipefuzz.engines.job import Job
from recipefuzz.verdict import Budget

config = load_config(sys.argv[1])
engine = PoolEngine(config, Budget(10**6, 0), ["cpu"] * 3, None)
engine.submit(Job(0, config.recipe_of({"lr": 1e-9}), 0))
engine.submit(Job(1, config.recipe_of({"fate": "hang"}), 0))
while sum(len(w.jobs) for w in engine._workers.values()) < 2 or not all(w.ready for w in engine._workers.values()):
    for slot, worker in engine._workers.items():
        if worker.pipe.poll(0.05):
            engine._check(slot, [worker.pipe])
    engine._hand_out()
pids = [w.process.pid for w in engine._workers.values()] + [forkserver._forkserver._forkserver_pid]
time.sleep(1)
print(*[p for p in pids if p], flush=True)
time.sleep(1000)
"""


def test_workers_leave_when_the_parent_is_killed(write_study):
    """One is in the midst of a long trial, one hangs, one is idle."""
    config = write_study(USERS_CODE)
    command = [sys.executable, "-c", PARENT, str(config.folder / "config.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=config.folder) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(pids) >= 3
            assert all(map(alive, pids))
            parent.kill()
            assert gone(pids, 10)
        finally:
            parent.kill()
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)


SCRIPT = """
from pathlib import Path
with open("ran", "a") as file:
    file.write("once\\n")
import recipefuzz
result = recipefuzz.search({
    "study": "small",
    "target": {"data": "case:load", "model": "case:build", "loss": "mse"},
    "space": {"lr": {"low": 1e-3, "high": 1, "log": True}},
    "trial": {"steps": 24, "batch_size": 8},
    "search": {"trials": 4, "confirm": {"top": 0}},
    "run": {"workers": 2},
})
print(len(result.trials), __name__, Path(__file__).name)
"""


def test_a_script_without_a_main_guard(write_study):
    folder = write_study().folder
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False, cwd=folder)
    assert (done.returncode, done.stdout.split()) == (0, ["4", "__main__", "script.py"]), done.stderr
    assert (folder / "ran").read_text() == "once\n"


NAMESAKE = """
import os, sys
assert "PYTHONSAFEPATH" not in os.environ
assert os.path.samefile(sys.path[0], os.path.dirname(__file__))
"""
SEARCH = """
space: {lr: {low: 1e-3, high: 0.1, log: true}}
trial: {steps: 24, batch_size: 8}
search: {trials: 2, confirm: {top: 0}}
run: {workers: 1}
"""


def test_modules_beside_the_config_with_a_name_of_pythons(write_study, tmp_path):
    """The target does not use them; python -c, which multiprocessing starts processes with, would."""
    folder = write_study(NAMESAKE, SEARCH, folder=tmp_path / "study").folder
    for name in ("random", "selectors", "tempfile"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the namesake')")
    (tmp_path / "run.py").write_text("from recipefuzz.cli import main\nmain()\n")
    command = [sys.executable, str(tmp_path / "run.py"), "search", "config.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != processes.SAFE_PATH}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, timeout=120, env=environment
    )
    assert "Traceback" not in done.stderr
    assert "namesake" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("users", [None, "yes"])
def test_processes_are_started_with_the_configs_folder_last(monkeypatch, tmp_path, users):
    others = sys.path.copy()
    monkeypatch.delenv(processes.SAFE_PATH, raising=False)
    if users:
        monkeypatch.setenv(processes.SAFE_PATH, users)
    sys.path.insert(0, str(tmp_path))
    with processes.apart_from_users_code(tmp_path):
        assert sys.path == [*others, str(tmp_path)]
        assert os.environ[processes.SAFE_PATH]
    assert sys.path == [str(tmp_path), *others]
    assert os.environ.get(processes.SAFE_PATH) == users


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "killed: the worker process ended with exit code 1"),
        (0, "killed: the worker process ended with exit code 0"),
        (-9, "killed: the worker process got SIGKILL: probably out of memory"),
        (-6, "killed: the worker process got SIGABRT"),
        (-999, "killed: the worker process got 999"),
        (None, "killed: the worker process ended with exit code None"),
    ],
)
def test_why_a_worker_ended(code, reason):
    assert died(code) == reason


# --- which engine, where


@pytest.mark.parametrize(
    ("device", "workers", "expected"),
    [("cpu", "auto", ["cpu"] * 5), ("cpu", 3, ["cpu"] * 3), ("mps", "auto", ["mps"]), ("cuda:1", 2, ["cuda:1"] * 2),
     ("cuda", "auto", ["cuda:0", "cuda:1"]), ("cuda", 3, ["cuda:0", "cuda:1", "cuda:0"])],
)  # fmt: skip
def test_a_worker_a_core_or_a_gpu(monkeypatch, device, workers, expected):
    monkeypatch.setattr(select, "cores", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select.worker_devices(device, workers) == expected


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", None, ("cpu", None)),
        ("cuda", "4,5", ("cuda", None)),
        ("cuda:1", None, ("cuda:0", "1")),
        ("cuda:1", "", ("cuda:0", "1")),
        ("cuda:1", "4, 5", ("cuda:0", "5")),
        ("cuda:0", "GPU-8932f937,MIG-5c89", ("cuda:0", "GPU-8932f937")),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(device, visible, expected):
    assert pool.own_gpu(device, visible) == expected


def test_the_users_code_in_a_worker_sees_its_own_gpu_alone(write_study, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    seen = tmp_path / "seen"
    seen.mkdir()
    told = f"""
import os
from pathlib import Path
Path({str(seen)!r}, os.environ["CUDA_VISIBLE_DEVICES"]).touch()
"""
    config = write_study(USERS_CODE + told)
    engine = PoolEngine(config, BUDGET, ["cuda:0", "cuda:1"], None)
    try:
        end = time.monotonic() + 60
        while len(list(seen.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        engine.close()
    assert sorted(path.name for path in seen.iterdir()) == ["3", "7"]


@pytest.mark.parametrize(
    ("device", "shown"), [("cuda", "expected: it has a CPU only"), ("cuda:2", "fix:      device: auto")]
)
def test_devices_that_are_not_there(write_study, monkeypatch, device, shown):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = write_study(more=f"run: {{device: '{device}'}}\n")
    with pytest.raises(InputError, match=r"config\.yaml:5: run\.device: this machine has no such device") as caught:
        select.pick_device(config)
    assert shown in str(caught.value)
    assert select.pick_device(write_study()) == "cpu"


@pytest.mark.parametrize(("given", "cores"), [("", 8), ("2", 2), ("64", 8), ("0", 1), ("many", 8)])
def test_a_job_of_slurm_s_has_the_cores_that_it_asked_for(monkeypatch, given, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    assert pool.cores() == cores
