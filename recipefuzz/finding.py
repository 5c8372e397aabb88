"""What a preflight check says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    PASS = "pass"  # noqa: S105
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of `recipefuzz check`.

    Attributes:
        check: name of the check, such as "initial loss".
        seen: what was seen, with its numbers.
        todo: what to do about it; empty where nothing is wrong.
        lines: further lines that are shown below: a table, a curve.
        evidence: the numbers, as plain values.
    """

    check: str
    level: Level
    seen: str
    todo: str = ""
    lines: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is null."""
        return plain(vars(self))  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """A value for JSON, in which there is no NaN."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def worst(findings: tuple[Finding, ...] | list[Finding]) -> Level:
    """Of several; pass where there are none."""
    order = list(Level)
    return max((f.level for f in findings), key=order.index, default=Level.PASS)
