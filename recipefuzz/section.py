"""What sections of a config are made of: frozen, checked, no unknown keys."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """Seconds of a duration such as 90, "90s", "10m", "2h" or "1d"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(value))
    if match is None:
        raise ValueError("not a duration")
    return float(match[1]) * UNITS[match[2] or "s"]


def _number(value: object) -> object:
    """Python, and pydantic with it, takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**31)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, lt=2**31)]
DURATION = "seconds, or a number with s, m, h or d: 90, 10m, 2h"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
