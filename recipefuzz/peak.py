"""Peak memory of a run: of the process that searches, and of the workers that train for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MEGA = 2**20
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Peak:
    """The most memory that processes of a run held at once, in MB (2**20 bytes); 0 is not known.

    Pages that a worker shares with the process that it was forked from (torch's code, mostly) count in each.

    Attributes:
        search: of the process that searches.
        worker: of the largest worker; 0 where there was none.
    """

    search: int = 0
    worker: int = 0

    def __str__(self) -> str:
        workers = f", and {self.worker} MB in a worker at most" if self.worker else ""
        return f"{self.search} MB{workers}"

    def over(self, other: Peak) -> Peak:
        """The larger of each."""
        return Peak(max(self.search, other.search), max(self.worker, other.worker))


def megabytes() -> int:
    """The most that this process held so far: where Linux tells, without what its parent held before `exec`."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // (MEGA if sys.platform == "darwin" else 1024)
