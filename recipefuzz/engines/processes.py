"""What our processes of their own have in common: how they are started, and that they end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAFE_PATH = "PYTHONSAFEPATH"


@contextlib.contextmanager
def apart_from_users_code(folder: Path | None) -> Iterator[None]:
    """Start processes without running the user's script again in each of them, or a `random.py` beside the config.

    They need nothing of `__main__`; multiprocessing would import it, and a script that calls
    `recipefuzz.search` without an `if __name__ == "__main__"` would search within its own workers. Of `sys.path` they
    get the config's folder last, and the working directory not at all, which `python -c` would put first: the folder
    comes first only when the target is imported.
    """
    path, safe = sys.path.copy(), os.environ.get(SAFE_PATH)
    main = sys.modules["__main__"]
    saved: dict[str, Any] = {n: main.__dict__.pop(n) for n in ("__file__", "__spec__") if n in main.__dict__}
    main.__spec__ = None
    sys.path.sort(key=lambda p: p == str(folder))
    os.environ[SAFE_PATH] = safe or "1"
    try:
        yield
    finally:
        sys.path[:] = path
        if safe is None:
            del os.environ[SAFE_PATH]
        main.__dict__.update(saved)


def leave_with_parent() -> None:
    """From now on, end this process when its parent has ended: in the midst of a trial, too, and of one that hangs."""
    threading.Thread(target=_leave, daemon=True).start()


def _leave() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
