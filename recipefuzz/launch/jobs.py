"""Which jobs were submitted for a run, and what the scheduler says of them. Needs neither torch nor submitit."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from recipefuzz.atomic import write_atomically
from recipefuzz.errors import InputError, Place, RunFailedError, shorten
from recipefuzz.launch.private_folder import JOBS
from recipefuzz.records import read_record

FILE = "jobs.json"  # in the run's folder
SECONDS = 30.0  # for SLURM to answer
ENDED, TAIL = 20, 100_000  # logs that are looked through for an error, and the bytes at their ends


@dataclass(frozen=True)
class Submission:
    """What one `recipefuzz submit` submitted.

    Attributes:
        at: when, as ISO 8601 with the zone.
        workers: jobs of one worker.
        names: what SLURM calls the array and the job that reports.
        array: SLURM's id of the workers' jobs; empty where a template was submitted.
        finish: SLURM's id of the job that reports; empty if it was not submitted.
        said: what the command of a template answered.
    """

    at: str
    workers: int
    names: tuple[str, ...] = ()
    array: str = ""
    finish: str = ""
    said: str = ""


@dataclass(frozen=True)
class Job:
    """One job of the run that SLURM knows, in SLURM's words.

    Attributes:
        id: of the array, of which it is one, or of the job that reports.
        index: in the array.
        state: such as PENDING or RUNNING.
        node: where it runs.
        reason: why it waits.
    """

    id: str
    index: str
    state: str
    node: str
    reason: str


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run that have not ended.

    Attributes:
        unknown: why SLURM could not be asked; empty if it could.
    """

    submissions: tuple[Submission, ...]
    workers: tuple[Job, ...] = ()
    finish: tuple[Job, ...] = ()
    unknown: str = ""

    @property
    def ids(self) -> list[str]:
        """To cancel them by."""
        return list(dict.fromkeys(job.id for job in (*self.workers, *self.finish)))


def job_names(study: str) -> tuple[str, str]:
    """Of the array and of the job that reports."""
    return f"recipefuzz-{study}", f"recipefuzz-{study}-report"


def keep(run: Path, submissions: Iterable[Submission]) -> None:
    records = [asdict(submission) for submission in submissions]
    write_atomically(run / FILE, json.dumps(records, indent=1))


def submitted(run: Path) -> tuple[Submission, ...]:
    """All submissions of a run so far.

    Raises:
        InputError: the file is not what `keep` wrote.
    """
    path = run / FILE
    try:
        return tuple(_submission(record) for record in json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            "the list of the run's jobs can't be read",
            place=Place(str(path)),
            found=str(error),
            fix="look for its jobs with squeue, and put the file aside",
        ) from error


def _submission(record: object) -> Submission:
    """Ids are numbers, since they become arguments of `scancel`; of jobs of ours, or it would end others."""
    found = read_record(Submission, record)
    if not all(re.fullmatch(r"[0-9]{0,20}", number) for number in (found.array, found.finish)):
        raise ValueError("a job's id that is no number")
    if not all(re.fullmatch(r"recipefuzz-[A-Za-z0-9._-]+", name) for name in found.names):
        raise ValueError("a job's name that is none of ours")
    return found


def alive(run: Path) -> Jobs:
    """The run's jobs that are queued or running.

    Raises:
        InputError: the list of its jobs can't be read.
    """
    known = submitted(run)
    arrays = {submission.array for submission in known} - {""}
    finishing = {submission.finish for submission in known} - {""}
    if not arrays:
        return Jobs(known)
    try:
        jobs = _ask(sorted({name for submission in known for name in submission.names}))
    except RunFailedError as error:
        return Jobs(known, unknown=error.problem)
    return Jobs(
        known,
        tuple(job for job in jobs if job.id in arrays),
        tuple(job for job in jobs if job.id in finishing),
    )


def _ask(names: Sequence[str]) -> list[Job]:
    """By their names, not their ids: SLURM gives an id again some day, and of one that is gone it makes an error."""
    answer = run_command(
        ["squeue", "--noheader", "--array", f"--name={','.join(names)}", "--format=%F|%K|%T|%N|%r"],
    )
    rows = (line.strip().split("|", 4) for line in answer.splitlines() if line.strip())
    return [Job(*row) for row in rows if len(row) == 5]


def cancel(run: Path) -> Jobs:
    """Have SLURM end the run's jobs; which they were.

    Raises:
        InputError: the list of its jobs can't be read.
        RunFailedError: SLURM can't be asked, or refuses.
    """
    jobs = alive(run)
    if jobs.unknown:
        raise RunFailedError(
            jobs.unknown, place=Place(str(run / FILE)), fix="try again from a login node of the cluster"
        )
    if jobs.ids:
        run_command(["scancel", *jobs.ids])
    return jobs


def run_command(command: Sequence[str], seconds: float | None = SECONDS) -> str:
    """What a command of the scheduler prints.

    Args:
        seconds: that it may take; None: as long as it likes.

    Raises:
        RunFailedError: it isn't there, fails, or does not answer.
    """
    try:
        done = subprocess.run(  # noqa: S603 - no shell; the words are ours, or the config's `submit`
            command, capture_output=True, text=True, errors="replace", check=False, timeout=seconds
        )
    except FileNotFoundError as error:
        raise RunFailedError(f"there is no command {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(f"{command[0]} did not answer within {seconds:.0f} s") from error
    except OSError as error:
        raise RunFailedError(f"can't run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RunFailedError(f"{command[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def job_lines(jobs: Jobs, run: Path) -> Iterator[str]:
    """For `recipefuzz status`: a line of words each."""
    for submission in jobs.submissions:
        if not submission.array:
            answer = f": {submission.said}" if submission.said else ""
            yield f"  jobs     handed to the scheduler {submission.at}{answer}"
    if jobs.unknown:
        yield f"  jobs     unknown: {jobs.unknown}"
    elif any(submission.array for submission in jobs.submissions):
        yield f"  jobs     {_counts(jobs.workers) or 'no worker is queued or running'}"
        if jobs.finish:
            yield f"  report   by job {jobs.finish[0].id}: {_counts(jobs.finish)}"
        yield f"  logs     {run / JOBS}"
        if not jobs.workers and (error := last_error(run)):
            yield f"  last     {error}"


def last_error(run: Path) -> str:
    """The exception with which the last worker ended that wrote a log, and in which log it is; empty if with none."""
    logs = sorted((run / JOBS).glob("*_log.out"), key=lambda path: path.stat().st_mtime)
    for path in reversed(logs[-ENDED:]):
        text = path.read_bytes()[-TAIL:].decode(errors="replace")
        errors = [line for line in text.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        if errors:
            return f"{shorten(errors[-1], 300)} ({path.name})"
    return ""


def _counts(jobs: Sequence[Job]) -> str:
    """`2 running on n1 n2, 3 pending (Resources)`."""
    states = Counter(job.state for job in jobs)
    return ", ".join(f"{count} {state.lower()}{_about(jobs, state)}" for state, count in states.most_common())


def _about(jobs: Sequence[Job], state: str) -> str:
    reasons = dict.fromkeys(j.reason for j in jobs if j.state == state and j.reason not in ("", "None"))
    nodes = dict.fromkeys(j.node for j in jobs if j.state == state and j.node)
    shown = list(nodes)[:4] + (["..."] if len(nodes) > 4 else [])
    return (f" on {' '.join(shown)}" if shown else "") + (f" ({', '.join(reasons)})" if reasons else "")
