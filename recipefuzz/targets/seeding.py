"""Seed every random generator for a stretch of code and give the user's global state back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run the body under `torch.manual_seed(seed)`, numpy's and Python's generators seeded alike.

    A trial is a pure function of its seed only if none of the three leaks in; the state that the user's
    process had (of the CPU and of `device`) is restored on the way out.
    """
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(**_forked(device)):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """Run the body, and let torch's random numbers go on as if it had not been run."""
    return torch.random.fork_rng(**_forked(device))


def _forked(device: torch.device | None) -> dict[str, Any]:
    if device is None or device.type not in ("cuda", "mps"):
        return {"devices": []}
    index = device.index if device.index is not None else 0
    return {"devices": [index], "device_type": device.type}
