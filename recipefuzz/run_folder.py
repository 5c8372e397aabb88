"""A run's folder: made, found again, refused when the study in it is another one."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipefuzz.atomic import write_atomically
from recipefuzz.config import Config, load_config
from recipefuzz.database import DatabaseLog
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.entry_log import Beat, EntryLog
from recipefuzz.errors import InputError, Place, RunFailedError
from recipefuzz.journal import WORKERS, Journal, at_work
from recipefuzz.locks import Lock, is_held, require_reach
from recipefuzz.peak import Peak
from recipefuzz.result import TrialResult, check_values
from recipefuzz.sharing import SharedStudy
from recipefuzz.source import write_yaml
from recipefuzz.store import Store

RUNS = Path("runs")
JOURNAL, CONFIG, DIAGNOSES = "study.journal", "config.yaml", "diagnoses.json"
FREE = {  # keys that change no trial, so a run may go on with others
    "search": ("trials", "time", "confirm", "rank_by", "diagnose"),
}


@dataclass(frozen=True)
class Shared:
    """A worker's part in a shared run."""

    log: EntryLog
    study: SharedStudy


class RunFolder:
    """`runs/<study>/`: the resolved config, the journal, the tables."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.journal = self.path / JOURNAL
        self.config = self.path / CONFIG

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        return cls(Path(config.run.folder) if config.run.folder else RUNS / config.study)

    @classmethod
    def find(cls, name: str) -> RunFolder:
        """An existing run, by its folder, by a file in it, or by the study's name.

        Raises:
            InputError: there is none.
        """
        for path in (Path(name), RUNS / name, Path(name).parent):
            if (path / JOURNAL).is_file() or cls(path).in_database:
                return cls(path)
        known = sorted(p.parent.name for p in RUNS.glob(f"*/{JOURNAL}"))
        raise InputError(
            "no run there",
            place=Place(name),
            expected=f"a folder with {JOURNAL} in it, such as {RUNS / 'quickstart'}",
            fix=f"runs here: {', '.join(known)}" if known else "recipefuzz search CONFIG makes one",
        )

    def read(self, config: Config) -> tuple[list[TrialResult], float, Peak]:
        """All finished trials, the time and the memory that they took, read while another process may be writing.

        Raises:
            InputError: the journal is damaged, or its trials are not of the config's space.
        """
        store = Store(self.log(config, write=False), write=False)
        try:
            results, seconds, peak = store.results(), store.seconds(), store.peak()
            check_values(results, config.axes)
        except ValueError as error:
            fix = "put the config back as it was, or start again with --fresh"
            raise InputError(
                f"{self.config.name} made another run: {error}", place=Place(str(self.path)), fix=fix
            ) from error
        finally:
            store.close()
        return results, seconds, peak

    def is_of(self, config: Config, code: Mapping[str, str]) -> bool:
        """Whether that config and that code made the run."""
        with contextlib.closing(Store(self.log(config, write=False), write=False)) as store:
            return store.meta() == identity(config, code)

    def diagnoses(self) -> dict[int, Diagnosis]:
        """What was found out about trials, by their numbers; a file that can't be read is as good as none."""
        try:
            records = json.loads((self.path / DIAGNOSES).read_text(encoding="utf-8"))
            return {int(number): Diagnosis.from_record(record) for number, record in dict(records).items()}
        except (OSError, ValueError, TypeError, RecursionError):
            return {}

    def keep(self, diagnoses: Mapping[int, Diagnosis]) -> None:
        """Write them all."""
        records = {str(number): found.record({}) for number, found in diagnoses.items()}
        write_atomically(self.path / DIAGNOSES, json.dumps(records, indent=1))

    @property
    def in_database(self) -> bool:
        """Whether this is the folder of a run that is in a database."""
        with contextlib.suppress(InputError, OSError):
            config = self.load_config()
            return config.database is not None and config.run.folder == str(self.path)
        return False

    def is_shared(self, config: Config) -> bool:
        """Whether the run is, or is to be, one of many workers."""
        return config.run.storage is not None or (self.path / WORKERS).is_dir()

    def is_held(self) -> bool:
        """Whether a process has the run for itself, and is at work in it."""
        return self.journal.exists() and is_held(self.journal)

    def workers(self, config: Config) -> dict[str, Beat]:
        """The last signs of life of a shared run's workers."""
        with contextlib.closing(self.log(config, write=False)) as log:
            return log.beats()

    def log(self, config: Config, *, write: bool) -> EntryLog:
        """The log of a shared run, or to read in that of any."""
        if config.database is not None:
            return DatabaseLog(config.database, config.study, write=write)
        return Journal(self.journal, write=write, shared=True, lock=Lock(config.run.lock))

    def share(
        self, config: Config, code: Mapping[str, str], worker: str, *, fresh: bool = False, joins: bool = False
    ) -> Shared:
        """Make the folder or join what is in it, as one of many workers.

        Args:
            code: fingerprints of the user's source files, by name.
            worker: a name that no other worker has.
            fresh: put an existing run aside and start anew.
            joins: the config is the run's own, but for what this worker alone does otherwise: it stays as it is.

        Raises:
            InputError: another config or other code made the run; one process has it for itself.
            RunFailedError: the folder can't be written, the database can't be reached.
        """
        self._prepare(config, fresh=fresh)
        if config.database is None and Lock(config.run.lock) is Lock.KERNEL:
            require_reach(self.path)
        log = self.log(config, write=True)
        try:
            study = SharedStudy(log, config, identity(config, code), worker)
            self._compare(study.meta, identity(config, code))
            if not joins:
                self._write_config(config)
            if config.database is None:
                self._make(self.path / WORKERS)  # by which a search knows that it does not have the run for itself
        except BaseException:
            log.close()
            raise
        return Shared(log, study)

    def load_config(self) -> Config:
        return load_config(self.config)

    def open(self, config: Config, code: Mapping[str, str], *, fresh: bool) -> Store:
        """Make the folder or resume what is in it, and hold it until the store is closed.

        Args:
            code: fingerprints of the user's source files, by name.
            fresh: put an existing run aside and start anew.

        Raises:
            InputError: another config or other code made the run; another process is at work in it.
            RunFailedError: the folder can't be written.
        """
        self._prepare(config, fresh=fresh)
        store = Store(self.journal, write=True)
        try:
            if old := store.meta():
                self._compare(old, identity(config, code))
            self._write_config(config)
        except BaseException:
            store.close()
            raise
        return store

    def _prepare(self, config: Config, *, fresh: bool) -> None:
        """Refuse what is somebody else's, put an old run aside if it is to be, and make the folder."""
        self._refuse_other_folders(config)
        if fresh:
            self._put_aside(config)
        self._refuse_other_storage(config)
        self._make(self.path)

    def _write_config(self, config: Config) -> None:
        """Unless it is there: of many workers, none replaces what the others are about to read."""
        placed = config.run.model_dump(mode="json") | {"folder": str(self.path)}
        text = write_yaml(config.resolved() | {"run": placed})
        if not self.config.exists() or self.config.read_text(encoding="utf-8") != text:
            write_atomically(self.config, text)

    def _refuse_other_folders(self, config: Config) -> None:
        """A folder with files in it that is no run is somebody's: nothing in it is overwritten or moved."""
        if not self.path.is_dir() or all(path.name.startswith(f".{CONFIG}.") for path in self.path.iterdir()):
            return  # empty, or another worker is just writing the config
        begun = self.journal.exists() and self.journal.stat().st_size > 0
        is_run = begun or self.in_database or (self.journal.exists() and not (self.path / "trials.csv").exists())
        if not is_run or config.folder.is_relative_to(self.path):
            why = "your code" if is_run else f"no {JOURNAL} of a run that made them"
            raise InputError(
                f"the folder has files in it, and {why}",
                place=Place(str(self.path)),
                expected="a new folder, an empty one, or that of a run",
                fix="give another one with --folder or run.folder, or another study name",
            )

    def _refuse_other_storage(self, config: Config) -> None:
        """Its trials would stay where they are, and the run would begin anew under its old tables."""
        in_database = self.in_database
        begun = in_database or (self.journal.exists() and self.journal.stat().st_size > 0)
        if begun and in_database != (config.database is not None):
            raise InputError(
                f"this run is kept {'in a database' if in_database else 'in its folder'}, and is not moved",
                place=config.source.place("run", "storage"),
                found=config.run.storage,
                fix="put run.storage back as it was, give the study another name, or --fresh to start anew",
            )

    def _make(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailedError(
                f"can't make the run's folder: {error.strerror}",
                place=Place(str(path)),
                fix="run.folder in the config, or --folder, names another place",
            ) from error

    def _put_aside(self, config: Config) -> None:
        """Its entries don't matter: a damaged run is put aside, too."""
        if not self.journal.exists() and not self.in_database:
            return
        if self.is_held() or self.is_busy(config):
            raise at_work(self.path)
        if config.database is not None:
            with contextlib.closing(DatabaseLog(config.database, config.study, write=True)) as log:
                log.put_aside()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            problem = f"can't put the old run aside: {error.strerror}"
            raise RunFailedError(problem, place=Place(str(self.path))) from error

    def is_busy(self, config: Config) -> bool:
        """Whether workers of a shared run are at work."""
        return self.is_shared(config) and any(beat.silent < config.run.lease for beat in self.workers(config).values())

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        if old == new:
            return
        lines = difflib.unified_diff(
            write_yaml(old).splitlines(), write_yaml(new).splitlines(), "this run", "now", lineterm="", n=1
        )
        raise InputError(
            "this run was made with another config or other code",
            place=Place(str(self.path)),
            expected="the same study; only search.trials, time, confirm, rank_by, diagnose and run.* may change",
            fix="give the study another name, or --fresh to start anew (the old folder is kept)",
            detail="\n".join(list(lines)[2:]),
        )


def identity(config: Config, code: Mapping[str, str]) -> dict[str, Any]:
    """What makes two runs the same study: all that a trial depends on, and how recipes are asked for."""
    parts = config.resolved()
    for section, keys in FREE.items():
        parts[section] = {k: v for k, v in parts[section].items() if k not in keys}
    aside = ("run", "base", "study", "ladder", "reference")
    return {k: v for k, v in parts.items() if k not in aside} | {"code": dict(code)}


def fingerprints(files: list[Path]) -> dict[str, str]:
    """A digest of each file, by its path from the folder that holds them all."""
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    return {os.path.relpath(file, root): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}
