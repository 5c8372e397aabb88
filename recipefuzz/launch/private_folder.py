"""The folder of a run's jobs, which nobody but its owner may write.

SLURM's jobs find out what to do from a pickle in this folder, see `task`: whoever can put a file there can run code as
the user. So it is made with mode 0700, and each job looks, before it unpickles anything, whether it still is what it
was: `python -m recipefuzz.launch.private_folder FOLDER`.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from recipefuzz.errors import Place, RecipefuzzError, RunFailedError
from recipefuzz.ownership import is_ours_alone

JOBS = "jobs"  # in the run's folder


def make_private(path: Path) -> None:
    """Make the folder, or see that the one there is right.

    Raises:
        RunFailedError: it can't be made, or somebody else can write it.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        problem = f"can't make the folder for the jobs: {error.strerror}"
        raise RunFailedError(problem, place=Place(str(path))) from error
    require_private(path)


def require_private(path: Path) -> None:
    """See that only this user can write the folder.

    Raises:
        RunFailedError: it is a link, another user's, or one that a group or everybody can write.
    """
    try:
        found = path.lstat()
    except OSError as error:
        problem = f"can't look at the folder of the jobs: {error.strerror}"
        raise RunFailedError(problem, place=Place(str(path))) from error
    if not stat.S_ISDIR(found.st_mode) or not is_ours_alone(found):
        raise RunFailedError(
            "others could write what jobs in this folder run",
            place=Place(str(path)),
            found=f"{stat.filemode(found.st_mode)}, user {found.st_uid}",
            expected=f"a folder of user {os.getuid()} that no other can write: drwx------",
            fix="move it away after a look at what is in it, and submit again",
        )


def main() -> None:
    try:
        require_private(Path(sys.argv[1]))
    except RecipefuzzError as error:
        sys.exit(f"recipefuzz: failed: {error}")


if __name__ == "__main__":
    main()
