"""Files that are either whole or not there: a temporary file beside them, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from recipefuzz.errors import Place, RunFailedError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file; text as UTF-8. Half characters, as in the name of a broken file, are written as escapes.

    Raises:
        RunFailedError: a full disk or a folder that can't be written. An older file of the name stays.
    """
    name = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            name = file.name
            file.write(content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except OSError as error:
        raise RunFailedError(
            f"can't write the file: {error.strerror}",
            place=Place(str(path)),
            fix="make room or choose another folder, and run the same command again",
        ) from error
    finally:
        if name:
            with contextlib.suppress(OSError):  # gone, if all went well
                Path(name).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
