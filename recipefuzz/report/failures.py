"""Failing trials in buckets, and the region of the space that each bucket fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipefuzz.recipe import Scalar
from recipefuzz.result import Phase, TrialResult
from recipefuzz.space import Choice, Range, Space

CLEAR = 0.25  # least gain (share of the bucket inside minus share of the others) at which a region is named:
# below it the sentence would send people to turn a knob that hardly matters
SMALLEST = 3  # trials; fewer have no region


@dataclass(frozen=True)
class Bucket:
    """Failures with the same verdict and cause.

    Attributes:
        where: the region that tells them from the other trials best, such as "lr > 0.8"; may be empty.
        example: the representative: the failing trial in the middle of the bucket.
    """

    verdict: str
    cause: str
    trials: int
    share: float
    where: str
    example: TrialResult

    @property
    def reason(self) -> str:
        return self.example.error or self.example.reason

    def __str__(self) -> str:
        name = self.cause or self.verdict
        return f"{self.trials} {'trial' if self.trials == 1 else 'trials'}: {name}" + (
            f" ({self.where})" if self.where else ""
        )


def buckets(results: Sequence[TrialResult], space: Space) -> list[Bucket]:
    """Buckets of the search's failing trials, largest first. An error's bucket is its message."""
    trials = [r for r in results if r.phase is Phase.SEARCH]
    counted = Counter(key for r in trials if (key := _key(r)) is not None)
    return [_bucket(key, trials, space) for key, _ in counted.most_common()]


def _bucket(key: tuple[str, str], trials: Sequence[TrialResult], space: Space) -> Bucket:
    inside = [r for r in trials if _key(r) == key]
    outside = [r for r in trials if _key(r) != key]
    return Bucket(
        verdict=key[0],
        cause=key[1],
        trials=len(inside),
        share=len(inside) / len(trials),
        where=region([r.values for r in inside], [r.values for r in outside], space),
        example=inside[len(inside) // 2],
    )


def _key(result: TrialResult) -> tuple[str, str] | None:
    if result.error:
        return "error", result.error[:80]
    return None if result.converging else (result.verdict, result.cause)


def region(inside: Sequence[Mapping[str, Scalar]], outside: Sequence[Mapping[str, Scalar]], space: Space) -> str:
    """The one condition on one axis that best separates `inside` from `outside`: a decision stump.

    Quality is Youden's J, the share of `inside` that meets the condition minus that of `outside`.
    """
    if len(inside) < SMALLEST or not outside:
        return ""
    options = [c for name, axis in space.axes for c in _conditions(name, axis, inside, outside)]
    gain, text = max(options, default=(0.0, ""))
    return text if gain >= CLEAR else ""


def _conditions(
    name: str,
    axis: Range | Choice,
    inside: Sequence[Mapping[str, Scalar]],
    outside: Sequence[Mapping[str, Scalar]],
) -> list[tuple[float, str]]:
    ours, others = [v[name] for v in inside], [v[name] for v in outside]
    if isinstance(axis, Choice):
        return [
            (
                ours.count(o) / len(ours) - others.count(o) / len(others),
                f"{name} = {'null' if o is None else o}",
            )
            for o in axis.options
        ]
    return [_cut(name, ours, others, above=above) for above in (True, False)]


def _cut(name: str, ours: Sequence[Any], others: Sequence[Any], *, above: bool) -> tuple[float, str]:
    """The best threshold: midway between two neighbouring values, rounded to two digits."""
    sign = 1.0 if above else -1.0
    tagged = sorted([(sign * v, 1.0 / len(ours)) for v in ours] + [(sign * v, -1.0 / len(others)) for v in others])
    gain, best, at = 0.0, 0.0, tagged[-1][0]
    for i in range(len(tagged) - 1, 0, -1):
        gain += tagged[i][1]
        if gain > best and tagged[i][0] > tagged[i - 1][0]:
            best, at = gain, (tagged[i][0] + tagged[i - 1][0]) / 2
    return best, f"{name} {'>' if above else '<'} {sign * at:.2g}"
