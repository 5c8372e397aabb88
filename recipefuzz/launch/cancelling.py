"""End what was submitted for a run. Needs neither torch nor submitit."""

from __future__ import annotations

from collections.abc import Iterator

from recipefuzz.launch.jobs import cancel
from recipefuzz.run_folder import RunFolder


def end(folder: RunFolder) -> Iterator[str]:
    """Cancel the jobs of a run, and say which, a line each.

    Raises:
        InputError: the list of its jobs can't be read.
        RunFailedError: SLURM can't be asked, or refuses.
    """
    jobs = cancel(folder.path)
    for submission in jobs.submissions:
        if not submission.array:
            yield f"handed to a scheduler by its template, {submission.at}: end it with the scheduler's own command"
    if not jobs.ids:
        yield "no job of this run is queued or running"
        return
    counts = f"{len(jobs.workers)} worker{'s' * (len(jobs.workers) != 1)}"
    yield f"cancelled: job {', '.join(jobs.ids)} ({counts}{', the report' * bool(jobs.finish)})"
    yield f"everything finished is kept. Go on with: recipefuzz submit {folder.config}"
