"""Files that are either whole or not there: a temporary file beside them, synced, then renamed.

Who may read them is left to the umask and to the folder: nothing that we write is a secret.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from recipefuzz.errors import Place, RunFailedError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file; text as UTF-8. Half characters, as in the name of a broken file, are written as escapes.

    Raises:
        RunFailedError: a full disk or a folder that can't be written. An older file of the name stays.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("xb") as file:
            file.write(content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunFailedError(
            f"can't write the file: {error.strerror}",
            place=Place(str(path)),
            fix="make room or choose another folder, and run the same command again",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone, if all went well
            part.unlink()
