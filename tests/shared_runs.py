"""Runs that many processes share, for tests: made, worked at, and what their logs say taken to account."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forked import Forked
from optuna.storages.journal._storage import JournalOperation

from recipefuzz.config import load_config
from recipefuzz.entry_log import Cursor, Entry
from recipefuzz.run_folder import RunFolder, fingerprints
from recipefuzz.targets.resolve import user_files

COMMAND = [sys.executable, "-c", "from recipefuzz.cli import main; main()"]
SEARCH, CONFIRM = 0, 1  # studies, in the order in which they are made
SECONDS = 100.0  # for what takes some seconds on a machine that is not busy
Key = tuple[int, str, int]  # trial, phase, seed


class Started:
    """A command under way, started as by a shell."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode


Process = Started | Forked


class SharedRun:
    """A run in a folder of its own, and the processes that were started at it."""

    def __init__(self, config: Path) -> None:
        self.config = load_config(config)
        self.folder = RunFolder(Path(self.config.run.folder or ""))
        self.logs = self.folder.path.parent
        self.processes: list[Process] = []
        self.code = fingerprints(user_files(self.config))
        self.folder.share(self.config, self.code, "maker").log.close()

    def start(self) -> Process:
        """A worker with processes of its own, in seconds."""
        return self._add(Started([*COMMAND, "worker", str(self.folder.path)], self._next_log))

    def fork(
        self,
        command: str = "worker",
        environment: Mapping[str, str] | None = None,
        clock: float = 0,
        **constants: Any,
    ) -> Process:
        """A worker that trains in its own process, or another command, in an instant.

        Args:
            clock: hours by which its clock is wrong.
        """
        run = self.config.source.file if command == "search" else str(self.folder.path)
        arguments = [command, run, *(["--workers", "0"] if command in ("worker", "search") else [])]
        names = {f"recipefuzz.{name.replace('__', '.')}": value for name, value in constants.items()}
        return self._add(Forked(arguments, self._next_log, environment or {}, names, clock))

    def _add(self, process: Process) -> Process:
        self.processes.append(process)
        return process

    @property
    def _next_log(self) -> Path:
        return self.logs / f"{len(self.processes)}.log"

    def wait(self, process: Process, code: int = 0) -> str:
        """For its end; what it said."""
        found = process.wait(SECONDS)
        assert found == code, f"exit code {found}\n{process.log.read_text()}"
        return process.log.read_text()

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                kill_group(process)
                process.wait(SECONDS)

    def entries(self) -> list[Entry]:
        with contextlib.closing(self.folder.log(self.config, write=False)) as log:
            log.catch_up()
            return log.read(Cursor())

    def finished(self) -> list[Key]:
        """Every result, in the order in which they were written."""
        return [key(record) for _, record in _results(self.entries())]

    def until(self, results: int) -> list[Key]:
        """Wait for so many results."""
        return until(lambda: found if len(found := self.finished()) >= results else None, self._all_said)

    def _all_said(self) -> str:
        return "\n".join(process.log.read_text() for process in self.processes)

    def losers(self) -> set[str]:
        """Workers whose trials were taken from them."""
        holders: dict[int, str] = {}
        found = set()
        for entry in self.entries():
            if "holder" in entry.get("user_attr", {}):
                holder, lost = entry["user_attr"]["holder"]
                before = holders.get(entry["trial_id"], "")
                holders[entry["trial_id"]] = holder
                if not holder and lost and before:
                    found.add(before)
        return found

    def account(self) -> list[dict[str, Any]]:
        """All results, if every trial that there is to be is there once, is finished once, and in the table once."""
        self.wait(self.fork("report"))
        entries, search = self.entries(), self.config.search
        created = _of(entries, JournalOperation.CREATE_TRIAL)
        told = Counter(entry["trial_id"] for entry in _of(entries, JournalOperation.SET_TRIAL_STATE_VALUES))
        results = _results(entries)
        assert told == dict.fromkeys(range(len(created)), 1), "not every trial is told once"
        assert sorted(id_ for id_, _ in results) == list(range(len(created))), "not every trial has one result"
        records = [record for _, record in results]
        keys, studies = [key(record) for record in records], Counter(entry["study_id"] for entry in created)
        assert len(keys) == len(set(keys)), "a trial was done twice"
        assert {trial for trial, phase, _ in keys if phase == "search"} == set(range(search.trials))
        assert studies[SEARCH] == search.trials, "another number of trials"
        converging = sum(r["phase"] == "search" and r.get("verdict") == "converging" for r in records)
        assert studies[CONFIRM] == min(search.confirm.top, converging) * search.confirm.seeds
        assert self._table() == sorted(map(row, records)), "trials.csv is not what the log says"
        return records

    def _table(self) -> list[Any]:
        with (self.folder.path / "trials.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return sorted((int(r["trial"]), r["phase"], int(r["seed"]), r["verdict"], float(r["lr"])) for r in rows)


def key(record: Mapping[str, Any]) -> Key:
    return record["trial"], record["phase"], record["seed"]


def row(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*key(record), record.get("verdict", "error"), record["values"]["lr"])


def _of(entries: list[Entry], operation: JournalOperation) -> list[Entry]:
    return [entry for entry in entries if entry["op_code"] == operation]


def _results(entries: list[Entry]) -> list[tuple[int, dict[str, Any]]]:
    """Ids of trials, and records."""
    found = _of(entries, JournalOperation.SET_TRIAL_USER_ATTR)
    return [(entry["trial_id"], entry["user_attr"]["result"]) for entry in found if "result" in entry["user_attr"]]


def kill_group(process: Process, signal_: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_)


@contextmanager
def shared_run(folder: Path, text: str, storage: str, **run: Any) -> Iterator[SharedRun]:
    """A run made of a config without `run`; what is still at work at it in the end is killed."""
    settings = {"storage": storage, "lease": 3, "workers": 1, "folder": str(folder / "run")} | run
    lines = "".join(f"  {name}: {value}\n" for name, value in settings.items())
    (folder / "study.yaml").write_text(f"{text}\nrun:\n{lines}")
    made = SharedRun(folder / "study.yaml")
    try:
        yield made
    finally:
        made.end()


def until(what: Callable[[], Any], otherwise: Callable[[], str] = str) -> Any:
    """Wait until there is something."""
    end = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.05)
    return found
