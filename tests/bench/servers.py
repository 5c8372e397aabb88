"""Servers for the time of a benchmark: on the loopback, in a folder that is removed, with the packages' own settings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONNECTIONS = 200


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def postgres_programs() -> Path | None:
    """Where Debian's newest PostgreSQL is; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """A new PostgreSQL's URL. Its commits are synced, as they are unless somebody says otherwise."""
    programs = postgres_programs()
    assert programs is not None, "apt-get install postgresql"
    user, command = ("postgres", ["runuser", "-u", "postgres", "--"]) if os.getuid() == 0 else ("", [])
    folder, port = Path(tempfile.mkdtemp(prefix="bench-postgres-")), free_port()
    if user:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run([*command, programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/")

    data, options = str(folder / "data"), f"-p {port} -h 127.0.0.1 -k {folder} -c max_connections={CONNECTIONS}"
    try:
        run("initdb", "-D", data, "-A", "trust", "-U", "bench")
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://bench@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis() -> Iterator[str]:
    """A new Redis' URL. It keeps a log that it syncs each second: without one a restart loses the study."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "yes"]
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        try:
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("the server does not start")
