"""Who may write what this process is going to run."""

from __future__ import annotations

import os
import stat

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def is_ours_alone(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write it. Not for Windows."""
    return found.st_uid == os.getuid() and not found.st_mode & OTHERS
