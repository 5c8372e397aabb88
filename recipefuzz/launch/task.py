"""What a SLURM job runs, and all that is unpickled for it.

submitit pickles the function of each job into `<run>/jobs/<job>_submitted.pkl`, and the job unpickles it. Of ours there
is a `Worker` or a `Finish` in it: the name of the class, and the run's path as a string. The class is imported from the
installed recipefuzz; config and trials are read from the run's folder as data. The pickle itself is trusted, so the
folder must be its owner's alone, see `private_folder`. The job pickles its outcome beside it (None, or a traceback),
which nothing of ours reads.

A job that is told to stop while work is left goes back into the queue. Once its worker has given its trials back,
submitit's own handler does that (`checkpoint`, then `scontrol requeue`), whether its time limit is near or it is
preempted: SLURM 22.05 counts a preempted job that leaves before its grace time is over as completed, whatever its exit
code, and does not requeue it; and one that has requeued itself it does not requeue again. `scancel` is another matter:
its signal is that of preemption, but for SLURM the job is not running any more.
"""

from __future__ import annotations

import abc
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipefuzz.stopping import SIGNALS, Stop

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

    from recipefuzz.config import Config
    from recipefuzz.report.progress import Progress
    from recipefuzz.run_folder import RunFolder

SECONDS = 30.0  # for SLURM to answer, of those between the signal and the end


@dataclass(frozen=True)
class _Task(abc.ABC):
    """submitit calls it, and puts the job back into the queue with what `checkpoint` returns: the same again."""

    run: str

    @abc.abstractmethod
    def __call__(self) -> None: ...

    def checkpoint(self) -> DelayedSubmission:
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Worker(_Task):
    """`recipefuzz worker RUN`; with work left, another time."""

    def __call__(self) -> None:
        with Stop() as stop:  # before torch is imported, which takes seconds
            over = self._work(stop)
        if over:
            _ignore_signals()
        elif stop.signal is not None and _is_wanted(stop.signal):
            _requeue()

    def _work(self, stop: Stop) -> bool:
        from recipefuzz.working import work

        with _listened(self.run) as (config, folder, listener):
            return work(config, folder, listener, stop)


@dataclass(frozen=True)
class Finish(_Task):
    """The end of the search: failures explained, ranking and report."""

    def __call__(self) -> None:
        from recipefuzz.working import finish

        with _listened(self.run) as (config, folder, listener):
            finish(config, folder, listener)


@contextmanager
def _listened(run: str) -> Iterator[tuple[Config, RunFolder, Progress]]:
    """A run, and the job's log."""
    from recipefuzz.report.progress import Progress
    from recipefuzz.report.terminal import console
    from recipefuzz.run_folder import RunFolder

    folder = RunFolder(Path(run))
    config = folder.load_config()
    with closing(Progress(console(), config.axes.names)) as progress:
        yield config, folder, progress


def _ignore_signals() -> None:
    """Python ends without its handlers: a signal then, that the time is nearly up, would make a failed job of this."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_wanted(told: signal.Signals) -> bool:
    """Whether the job was not cancelled. SLURM knows; if it does not answer, the signal tells: `scancel` sends TERM."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    # not $SLURM_JOB_ID: that of an array's last job stands for the whole array
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={SlurmJobEnvironment().job_id}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return told is not signal.SIGTERM
    return answer.stdout.strip() == "RUNNING"


def _requeue() -> None:
    """By submitit's handler, which listened for the signal before the worker did. It does not return."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    signal.raise_signal(signal.Signals[f"SIG{SlurmJobEnvironment.USR_SIG}"])
