"""Which line of the user's own code is being run."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import FrameType

from recipefuzz.errors import PACKAGE, is_users

ENGINE = "torch/autograd/graph.py"  # from here on down the stack it is who called `backward()`
LAUNCHER = f"{PACKAGE}/diagnose/"


@lru_cache(maxsize=4096)
def _kind(filename: str) -> str:
    if filename.startswith(LAUNCHER):
        return "launcher"
    if filename.replace("\\", "/").endswith(ENGINE):
        return "engine"
    return "user" if is_users(filename) else "library"


def user_line(backward: bool = False) -> tuple[str, int]:
    """File and line of the innermost frame of the user's code; ("", 0) where none is being run.

    In a backward pass only what runs inside it counts (a custom Function), not the line that started it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _kind(frame.f_code.co_filename) == "launcher":  # the watching itself
        frame = frame.f_back
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        if kind == "user":
            return frame.f_code.co_filename, frame.f_lineno
        if kind == "launcher" or (backward and kind == "engine"):
            return "", 0
        frame = frame.f_back
    return "", 0
