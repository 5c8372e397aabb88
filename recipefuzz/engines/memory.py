"""Memory: how many lanes fit, and how a process keeps what it frees."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

SHARE = 0.5  # of the memory that is free, for the lanes: the estimate knows nothing of fragments and caches
STATES = 6  # copies of the parameters beside the program's own tensors: two of them, a gradient, state, a buffer
UNKNOWN = 8 << 30  # where the system does not tell
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
KEPT, PADDED = (1 << 31) - 1, 64 << 20


def lanes_that_fit(bytes_per_lane: int, parameters: int, device: torch.device, processes: int) -> int:
    """Lanes that each of some processes can hold: an estimate; running out of memory halves them."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // max(1, processes)
    each = bytes_per_lane + 4 * STATES * parameters
    return max(1, int(SHARE * free / each)) if each else sys.maxsize


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    free = UNKNOWN
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system at every large `free`.

    Tensors over 128 kB to 32 MB come from mmap, and each is zeroed by the kernel, page by page, at its first touch: for
    the activations of some lanes that takes as long as computing them (measured: 1.4 times for a small convolutional
    net). Elsewhere than glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_TOP_PAD, PADDED)
