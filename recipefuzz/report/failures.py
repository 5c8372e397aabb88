"""Failing trials in buckets, and the region of the space that each bucket fills."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.recipe import Scalar
from recipefuzz.result import ERROR, Phase, TrialResult
from recipefuzz.space import Choice, Range, Space

CLEAR = 0.25  # least gain (share of the bucket inside minus share of the others) at which a region is named:
# below it the sentence would send people to turn a knob that hardly matters
FEWEST, ALL = 2, 17  # digits of a threshold: two are easy to read, 17 tell any two floats apart
SMALLEST = 3  # trials; fewer have no region
Kind = tuple[str, ...]  # verdict, cause and, if diagnosed, the place; of an error, the beginning of its message


@dataclass(frozen=True)
class Bucket:
    """Failures with the same verdict and cause, or whose representatives were found to have the same cause and place.

    Attributes:
        cause: of the diagnosis where there is one, else what the trace shows.
        where: the region that tells them from the other trials best, such as "lr > 0.8"; may be empty.
        example: the representative: the failing trial in the middle of the bucket.
    """

    verdict: str
    cause: str
    trials: int
    share: float
    where: str
    example: TrialResult
    diagnosis: Diagnosis | None = None

    @property
    def reason(self) -> str:
        return self.example.error or self.example.reason

    @property
    def place(self) -> str:
        """Where it is the code's fault: such as "model.py:31"."""
        return self.diagnosis.where if self.diagnosis and self.diagnosis.root != Root.RECIPE else ""

    def __str__(self) -> str:
        """In a line; whose cause it is is said where it is that of one among several."""
        name = (self.cause or self.verdict) + (f" at {self.place}" if self.place else "")
        text = f"{self.trials} {'trial' if self.trials == 1 else 'trials'}"
        if self.is_diagnosed and self.trials > 1:
            text += f" like trial {self.example.trial}"
        return f"{text}: {name}" + (f" ({self.where})" if self.where else "")

    @property
    def is_diagnosed(self) -> bool:
        """Whether the cause is that of the representative's diagnosis."""
        return self.diagnosis is not None and bool(self.diagnosis.cause)


def buckets(
    results: Sequence[TrialResult], space: Space, diagnoses: Mapping[int, Diagnosis] | None = None
) -> list[Bucket]:
    """Buckets of the search's failing trials, largest first. An error's bucket is its message.

    Args:
        diagnoses: by trial: a bucket has that of its representative. One representative is diagnosed, however many
            trials fail, so buckets are first made of what the traces show, and joined where the diagnoses agree.
    """
    trials = [r for r in results if r.phase is Phase.SEARCH]
    kinds: defaultdict[Kind | None, list[TrialResult]] = defaultdict(list)
    for result in trials:
        kinds[_kind(result)].append(result)
    joined: defaultdict[Kind | None, list[TrialResult]] = defaultdict(list)
    examples: dict[Kind | None, TrialResult] = {}
    for kind in sorted(kinds, key=lambda kind: -len(kinds[kind])):
        inside = kinds[kind]
        example = inside[len(inside) // 2]
        found = diagnoses.get(example.trial) if diagnoses and kind else None
        known = kind if kind is None or found is None or not found.cause else (kind[0], found.cause, found.where)
        joined[known] += inside
        examples.setdefault(known, example)
    made = [_bucket(kind, joined, examples[kind], len(trials), space) for kind in joined if kind is not None]
    return sorted([replace(b, diagnosis=(diagnoses or {}).get(b.example.trial)) for b in made], key=lambda b: -b.trials)


def _bucket(
    kind: Kind,
    kinds: Mapping[Kind | None, Sequence[TrialResult]],
    example: TrialResult,
    trials: int,
    space: Space,
) -> Bucket:
    inside = kinds[kind]
    return Bucket(
        verdict=kind[0],
        cause=kind[1],
        trials=len(inside),
        share=len(inside) / trials,
        where=_where(kind, kinds, space) if len(inside) >= SMALLEST else "",
        example=example,
    )


def _where(kind: Kind, kinds: Mapping[Kind | None, Sequence[TrialResult]], space: Space) -> str:
    outside = [r.values for other, results in kinds.items() if other != kind for r in results]
    return region([r.values for r in kinds[kind]], outside, space)


def _kind(result: TrialResult) -> Kind | None:
    if result.error:
        return ERROR, result.error[:80]
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
    return [_cut(name, ours, others, above=above, integer=axis.integer) for above in (True, False)]


def _cut(name: str, ours: Sequence[Any], others: Sequence[Any], *, above: bool, integer: bool) -> tuple[float, str]:
    """The best threshold: about midway between two neighbouring values."""
    sign = 1.0 if above else -1.0
    values = sign * np.array([*ours, *others], dtype=np.float64)
    shares = np.repeat([1.0 / len(ours), -1.0 / len(others)], [len(ours), len(others)])
    order = np.lexsort((shares, values))[::-1]
    values, gains = values[order], np.cumsum(shares[order])
    ends = np.flatnonzero(values[:-1] > values[1:])  # a cut is never between equal values
    best = ends[gains[ends].argmax()] if len(ends) else 0
    if not len(ends) or gains[best] <= 0:
        return 0.0, ""
    at = _between(float(values[best + 1]), float(values[best]), integer=integer)
    return float(gains[best]), f"{name} {'>' if above else '<'} {_in_full(sign * at)}"


def _between(outside: float, inside: float, *, integer: bool) -> float:
    """A threshold that only the larger value, `inside`, is above: about midway, in as few digits as tell them apart."""
    middle = outside / 2 + inside / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(FEWEST, ALL + 1))
    at = next((at for at in rounded if outside <= at < inside), outside)
    return float(math.floor(middle)) if integer and not at.is_integer() else at


def _in_full(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else f"{value:.{ALL}g}"
