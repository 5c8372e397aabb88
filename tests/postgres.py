"""A PostgreSQL server for tests: on loopback alone, with a password, of a user who is not root, gone at the end."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

USER = "fuzzer"
SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
password_encryption = 'scram-sha-256'
fsync = off  # a killed server loses nothing by that, a machine without power would
"""


def binaries() -> Path | None:
    """Debian keeps those of each version in a folder that is not on PATH."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return found[0].parent if found else None


class Server:
    """A running server.

    Attributes:
        password: of USER, who may make databases.
        passfile: that libpq finds it in.
    """

    def __init__(self, folder: Path, bin_: Path) -> None:
        self.password, self.passfile = f"secret-{secrets.token_hex(8)}", folder / "pgpass"
        self._data, self._log, self._bin = folder / "data", folder / "log", bin_
        # the server refuses to be root's
        self._user: dict[str, Any] = {"user": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        written = folder / "initial"
        written.write_text(self.password)
        self.passfile.touch(mode=0o600)
        self.passfile.write_text(f"127.0.0.1:{self.port}:*:{USER}:{self.password}\n")
        if self._user:
            for path in (folder, written):
                os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
        options = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={written}", "--no-sync", "--locale=C"]
        command = [bin_ / "initdb", "-D", self._data, "--encoding=UTF8", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._user)
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(f"{SETTINGS}port = {self.port}\n")

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data], stdout=log, stderr=log, cwd=self._data.parent, **self._user
            )
        end = time.monotonic() + 60
        while subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(self._log.read_text())
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as a crash would: what is under way is broken off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(60)
            self._process = None

    def url(self, database: str = "postgres", user: str = USER) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg

        url = self.url(database)
        with psycopg.connect(url, passfile=str(self.passfile), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """The URL of an empty one."""
        self._databases += 1
        self.execute(f"create database study{self._databases}")
        return self.url(f"study{self._databases}")


@contextmanager
def serving() -> Iterator[Server]:
    """Skips the test where there is no PostgreSQL."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'psycopg[binary]'")
    if (found := binaries()) is None:
        pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:  # pytest's own are closed to other users
        server = Server(Path(folder), found)
        try:
            server.start()
            yield server
        finally:
            server.stop()
