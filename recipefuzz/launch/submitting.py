"""Submit a study: check it, make the run's folder, hand its workers to the scheduler, and keep which jobs they are."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator

from recipefuzz.config import Config
from recipefuzz.errors import InputError, Place, RunFailedError
from recipefuzz.launch import by_template, slurm
from recipefuzz.launch.jobs import Jobs, Submission, alive, job_names, keep, run_command, submitted
from recipefuzz.launch.private_folder import JOBS, make_private
from recipefuzz.listening import Listener
from recipefuzz.run_folder import RunFolder, fingerprints
from recipefuzz.searching import ready
from recipefuzz.targets.resolve import user_files


def submit(config: Config, *, fresh: bool = False, add: bool = False, listener: Listener) -> Iterator[str]:
    """Submit the workers of a study, and say what was submitted, a line each.

    The user's code is imported and tried here, on the CPU, as before a local search: jobs that fail one by one in the
    night are worse than an error now, and its files are part of what the run is.

    Args:
        fresh: put an existing run aside and start anew.
        add: more workers for a run whose jobs are still there.

    Raises:
        InputError: what is wrong with the config or the user's code; jobs of this run are still there.
        RunFailedError: the folder can't be written, or the scheduler does not take the jobs.
    """
    if config.run.launcher == "slurm":
        slurm.require_slurm()
    folder = RunFolder.of(config)
    there = alive(folder.path)
    _refuse(config, folder, there, fresh=fresh, add=add)
    ready(_on_cpu(config), listener)
    with contextlib.closing(folder.share(config, fingerprints(user_files(config)), "submit", fresh=fresh).log):
        pass
    make_private(folder.path / JOBS)
    yield from (_by_template if config.run.launcher == "template" else _by_slurm)(config, folder, there)
    yield f"how it goes: recipefuzz status {folder.path}"


def _on_cpu(config: Config) -> Config:
    """A login node may have no GPU."""
    return config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})


def _refuse(config: Config, folder: RunFolder, there: Jobs, *, fresh: bool, add: bool) -> None:
    if there.unknown:
        raise RunFailedError(
            there.unknown, place=Place(str(folder.path)), fix="submit from a login node of the cluster"
        )
    if there.ids and (fresh or not add):
        end = f"end them with recipefuzz cancel {folder.path}"
        raise InputError(
            f"jobs of this run are queued or running: {', '.join(there.ids)}",
            place=Place(str(folder.path)),
            fix=f"wait for them, or {end}" if fresh else f"--add gives it {config.run.slurm.workers} more; or {end}",
        )


def _by_slurm(config: Config, folder: RunFolder, there: Jobs) -> Iterator[str]:
    before, workers = submitted(folder.path), config.run.slurm.workers
    array = slurm.submit_workers(config, folder.path)
    made = Submission(_now(), workers, job_names(config.study), array)
    keep(folder.path, [*before, made])  # before anything can go wrong: they are to be found again
    at_once = f", {config.run.slurm.parallel} at once" if config.run.slurm.parallel else ""
    yield f"submitted {workers} worker{'s' * (workers > 1)}{at_once}: job {array}"
    ids = dict.fromkeys(job.id for job in there.workers)
    finish = slurm.submit_finish(config, folder.path, [*ids, array])
    keep(folder.path, [*before, Submission(made.at, workers, made.names, array, finish)])
    if there.finish:  # the new one waits for all workers
        run_command(["scancel", *(job.id for job in there.finish)])
    yield f"ranking and report are written when they have ended: job {finish}"


def _by_template(config: Config, folder: RunFolder, _: Jobs) -> Iterator[str]:
    before = submitted(folder.path)
    said = by_template.submit_script(config, folder.path)
    keep(folder.path, [*before, Submission(_now(), config.run.template.workers, said=said)])
    yield f"handed {folder.path / JOBS / by_template.SCRIPT} to the scheduler" + (f": {said}" if said else "")
    yield f"once its jobs have ended: recipefuzz report {folder.path}"


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
