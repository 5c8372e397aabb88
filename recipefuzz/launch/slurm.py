"""SLURM, through submitit: a job array of workers, and a job after it that reports.

submitit writes the scripts, calls sbatch, and puts jobs back into the queue whose time was too short. What its jobs
unpickle is said in `task`.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipefuzz.config import Config
from recipefuzz.errors import InputError, Place, RunFailedError
from recipefuzz.launch.jobs import job_names
from recipefuzz.launch.private_folder import JOBS
from recipefuzz.launch.task import Finish, Worker

REQUEUES = 1_000_000  # of a worker whose time was too short: as often as it takes
REPORTS = 5  # of the job that reports: its tables are written first, and explanations are kept
# submitit's jobs run with -m, which puts the folder that they were submitted from first on the path: not with -P
PYTHON = f"{shlex.quote(sys.executable)} -P"


def scripts(config: Config, run: Path) -> tuple[str, str]:
    """The scripts of both jobs, as they would be submitted.

    Raises:
        InputError: submitit is not installed; SLURM can't do with the run's path.
    """
    _require_submitit()
    from submitit.slurm import slurm

    folder, workers = _folder(config, run), config.run.slurm.workers
    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array = {"map_count": workers} if workers > 1 else {}
    write = slurm._make_sbatch_string  # noqa: SLF001 - an executor of submitit's can't be made where there is no srun
    return (
        write(command, folder, **_workers(config, folder) | array),
        write(command, folder, **_finish(config, folder, ["ARRAY"])),
    )


def submit_workers(config: Config, run: Path) -> str:
    """Submit the array; its job id.

    Raises:
        RunFailedError: sbatch refuses, or isn't there.
    """
    jobs = _submit(_workers(config, run / JOBS), run / JOBS, [Worker(str(run))] * config.run.slurm.workers, REQUEUES)
    return jobs[0].split("_")[0]


def submit_finish(config: Config, run: Path, after: Sequence[str]) -> str:
    """Submit the job that reports once those jobs have ended, however they do; its job id.

    Raises:
        RunFailedError: sbatch refuses, or isn't there.
    """
    return _submit(_finish(config, run / JOBS, after), run / JOBS, [Finish(str(run))], REPORTS)[0]


def require_slurm() -> None:
    """See that jobs can be submitted from here.

    Raises:
        InputError: submitit is not installed, or SLURM is not there.
    """
    _require_submitit()
    if shutil.which("sbatch") is None:
        raise InputError(
            "there is no command sbatch here",
            expected="a machine from which jobs are submitted to SLURM, such as a login node",
            fix="--dry-run shows the job scripts on any machine; --template submits to another scheduler",
        )


def _submit(parameters: dict[str, Any], folder: Path, tasks: Sequence[Any], requeues: int) -> list[str]:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = SlurmExecutor(folder, max_num_timeout=requeues, python=PYTHON)
        executor.update_parameters(**parameters)
        return [str(job.job_id) for job in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailedError(
            "SLURM did not take the job",
            place=Place(str(folder)),
            fix="look at run.slurm in the config; everything finished is kept",
            detail="\n".join(lines[-5:]),
        ) from error


def _workers(config: Config, folder: Path) -> dict[str, Any]:
    slurm = config.run.slurm
    return _common(config, folder) | {
        "job_name": job_names(config.study)[0],
        "array_parallelism": slurm.parallel or slurm.workers,
    }


def _finish(config: Config, folder: Path, after: Sequence[str]) -> dict[str, Any]:
    """Explaining failures trains, so it gets what a worker gets."""
    return _common(config, folder) | {
        "job_name": job_names(config.study)[1],
        "dependency": f"afterany:{':'.join(after)}",
    }


def _common(config: Config, folder: Path) -> dict[str, Any]:
    slurm = config.run.slurm
    check = f"{PYTHON} -m recipefuzz.launch.private_folder {shlex.quote(str(folder))} || exit 1"
    options = dict(option.removeprefix("--").partition("=")[::2] for option in slurm.sbatch)
    return {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": math.ceil(slurm.time / 60),  # minutes, as SLURM counts
        "mem": slurm.memory,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": slurm.cpus,
        "srun_args": [f"--cpus-per-task={slurm.cpus}"],  # since SLURM 22.05, srun does not ask the job for it
        "gpus_per_node": slurm.gpus or None,
        "signal_delay_s": math.ceil(slurm.grace),
        "setup": [*slurm.setup, check],
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own is refused where keys are checked
        "additional_parameters": {"requeue": True} | {name: value or True for name, value in options.items()},
    }


def _folder(config: Config, run: Path) -> Path:
    """Of the jobs. In the path of a log, SLURM has its own meaning for a percent sign and a backslash."""
    if set("%\\") & set(str(run)) or not str(run).isprintable():
        place = config.source.place("run", "folder")
        raise InputError("SLURM can't write logs in this folder", place=place, found=run, expected="no % or \\ in it")
    return run / JOBS


def _require_submitit() -> None:
    try:
        import submitit  # noqa: F401 - heavy, and of use here alone
    except ImportError as error:
        fix = "pip install 'recipefuzz[slurm]'"
        raise InputError("submitting to SLURM needs submitit", expected="submitit, installed", fix=fix) from error
