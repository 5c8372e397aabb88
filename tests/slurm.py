"""A SLURM cluster of three nodes on this machine, with two pretend GPUs each, for the tests that are marked `cluster`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "shared" / "slurm"
PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
NODES = 3


@dataclass(frozen=True)
class Slurm:
    """The cluster. Its commands find it by the environment variable SLURM_CONF.

    Attributes:
        conf: what SLURM_CONF says.
        folder: with its logs, and the process ids of its daemons in `pids`.
    """

    conf: Path
    folder: Path

    def run(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one of an array as in "12_3"; of ended ones, too."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self) -> dict[str, str]:
        """Of the jobs that are queued or running, by their ids."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 120) -> None:
        """Until something holds; with the queue in the message, if it does not in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s; the queue: {self.run('squeue')}"
            time.sleep(0.2)

    @contextmanager
    def lost(self, node: str) -> Iterator[None]:
        """Without one of its nodes, and with all that ran there killed; after that it is there again."""
        pids = dict(line.split() for line in (self.folder / "pids").read_text().splitlines())
        os.kill(int(pids[f"slurmd-{node}"]), signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
        try:
            yield
        finally:
            command = f"slurmd -D -N {node} -f {self.conf} >/dev/null 2>&1 </dev/null & echo slurmd-{node} $!"
            done = subprocess.run(
                ["sh", "-c", command], env={"PATH": _path()}, capture_output=True, text=True, check=True
            )
            with (self.folder / "pids").open("a") as file:
                file.write(done.stdout)
            self.wait("the node is back", lambda: "idle" in self.run("sinfo", "-h", "-n", node, "-o", "%t"), 60)

    def wait_for_end(self, seconds: float = 300) -> None:
        """Until no job is left, be it with success or not."""
        self.wait("no job is left", lambda: not self.states(), seconds)


def _missing() -> str:
    if not (TOOLS / "start-slurm.sh").is_file():
        return f"no {TOOLS.parent.name}/slurm beside the repository"
    if os.getuid() != 0:
        return "starting SLURM needs root"
    packages = {package for command, package in PACKAGES.items() if not shutil.which(command, path=_path())}
    return f"Debian's packages {' '.join(sorted(packages))} are not installed" if packages else ""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def serving(folder: Path) -> Iterator[Slurm]:
    """A cluster, with its state in that folder; where there can be none, the tests are skipped."""
    if missing := _missing():
        pytest.skip(missing)
    with (
        pytest.MonkeyPatch.context() as patch,
        (Path(tempfile.gettempdir()) / "recipefuzz-slurm.lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # its ports are fixed: one cluster a machine
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run([TOOLS / "start-slurm.sh", folder, str(NODES)], check=True, timeout=120)
            yield Slurm(folder / "slurm.conf", folder)
        finally:
            subprocess.run([TOOLS / "stop-slurm.sh", folder], check=True, timeout=120)
