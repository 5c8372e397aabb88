"""Python's cyclic garbage collector, and the imports of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_kept() -> Iterator[None]:
    """Import without collecting meanwhile, and exempt from later collections what there is by then.

    torch and pandas make 340,000 objects that live as long as the process: going through them again and again takes
    a sixth of the import, and once more at the end of the process as long. Only for processes that are ours: what
    a user's program holds would be exempt, too.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collects:
            gc.enable()
