"""What a cluster's batch jobs ask for: `run.slurm`, and `run.template` for any other scheduler.

All of it ends up in a shell script. A value that could end its line, or be taken for another option, is refused; only
the lines of `setup` are shell code, the user's own.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from recipefuzz.section import DURATION, Count, Duration, Section, Whole

EARLY = 60.0  # seconds; by so much, sbatch's manual says, the signal may come early
OWN_KEYS = ("partition", "account", "qos", "time", "mem", "gpus-per-node", "cpus-per-task")
SET_BY_US = {*OWN_KEYS, "array", "dependency", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode"}
SET_BY_US |= {"output", "requeue", "no-requeue", "signal", "test-only", "wait", "wrap"}


def _word(value: str) -> str:
    """A name of SLURM's; of partitions it may be several."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.,@:/+-]*", value, flags=re.ASCII):
        raise ValueError("not a name")
    return value


def _memory(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,8}[KMGT]", value, flags=re.ASCII):
        raise ValueError("not an amount of memory")
    return value


def _line(value: str) -> str:
    if not value.isprintable() or not value.strip():
        raise ValueError("not a line of text")
    return value


def _option(value: str) -> str:
    """An option of sbatch, in its long form."""
    match = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.+))?", value)
    if match is None or not value.isprintable():
        raise ValueError("not an option of sbatch")
    if match[1] in OWN_KEYS:
        raise ValueError("this has a key of its own in run.slurm")
    if match[1] in SET_BY_US:
        raise ValueError("recipefuzz sets this option itself")
    return value


def _command(value: str) -> str:
    if "{script}" not in _line(value):
        raise ValueError("no {script} in it")
    return value


Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_line)]


class _Job(Section):
    """Jobs of one worker each: how many, and what each may use."""

    workers: Annotated[Count, Field(le=100_000)] = 4
    time: Duration = 3600.0
    memory: Annotated[str, AfterValidator(_memory)] | None = None
    cpus: Annotated[Count, Field(le=4096)] = 1
    gpus: Annotated[Whole, Field(le=64)] = 0


class SlurmConfig(_Job):
    """A job array, of which `parallel` jobs run at once.

    A job is told `grace` before its time is up, and goes back into the queue if work is left.
    """

    parallel: Count | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    grace: Annotated[Duration, Field(validate_default=True)] = 60.0
    sbatch: tuple[Annotated[str, AfterValidator(_option)], ...] = ()
    setup: tuple[Line, ...] = ()

    @field_validator("grace")
    @classmethod
    def _within_time(cls, grace: float, others: ValidationInfo) -> float:
        if grace + EARLY > others.data.get("time", grace + EARLY):
            raise ValueError("too close to run.slurm.time")
        return grace


class TemplateConfig(_Job):
    """A job script of the user's, `file`, that is filled in and handed to `submit`.

    Its path counts from where import paths do.
    """

    file: Line | None = None
    submit: Annotated[str, AfterValidator(_command)] = "qsub {script}"


_JOB = {
    "workers": "an integer, 1 or more: jobs, of one worker each",
    "time": DURATION + ": of one job",
    "memory": "a number with K, M, G or T, such as 8G: of one job; null: what the cluster gives",
    "cpus": "an integer, 1 or more: cores of one worker",
    "gpus": "an integer, 0 or more: GPUs of one worker (0: CPU only)",
}
MEANING = {
    "run.launcher": "local, slurm or template",
    **{f"run.slurm.{key}": meaning for key, meaning in _JOB.items()},
    **{f"run.template.{key}": meaning for key, meaning in _JOB.items()},
    "run.slurm.parallel": "an integer, 1 or more: jobs that run at once; null: all",
    "run.slurm.partition": "a partition of the cluster, or several with commas between",
    "run.slurm.account": "an account of the cluster",
    "run.slurm.qos": "a quality of service of the cluster",
    "run.slurm.grace": DURATION
    + ": what a worker has for leaving before its time is up; a minute less than time, at least",
    "run.slurm.sbatch": "other options, in their long form: [--constraint=a100, --exclusive]",
    "run.slurm.setup": "lines of shell to run before the worker: [module load cuda]",
    "run.template.file": "the path of a job script with {command} in it",
    "run.template.submit": "the command that submits it, such as qsub {script}",
}
