"""The only place where a run is judged."""
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from recipefuzz.trace import Trace


class Label(StrEnum):
    NAN = "nan"
    STALLED = "stalled"
    CONVERGING = "converging"

@dataclass(frozen=True)
class Budget:
    steps: int
    extend: int = 4
    @property
    def limit(self) -> int:
        return self.steps * (1 + self.extend)
    def checkpoints(self) -> tuple[int, ...]:
        return tuple(range(20, self.limit + 1, 20))
    def evaluates_at(self, step: int) -> bool:
        return False

@dataclass(frozen=True)
class Verdict:
    label: Label
    reason: str = ""
    cause: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)


def judge(trace: Trace, baseline: float, budget: Budget, *, whole: bool = False) -> Verdict | None:
    if trace.first_bad: return Verdict(Label.NAN)
    if trace.steps >= budget.limit: return Verdict(Label.CONVERGING)
    return None


def skill_at_end(trace: Trace, baseline: float) -> float:
    import numpy as np
    if not trace.steps: return float("nan")
    w = max(10, trace.steps // 20)
    return float((baseline - np.mean(trace.loss[-w:])) / abs(baseline))
