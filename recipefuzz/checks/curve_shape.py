"""The shape of a pair of loss curves, by name: healthy, overfitting, memorizing, apart, noisy, stalled, not finite.

Rows that are trained on and held-out rows are compared in eval mode both, the same rows at every evaluation: dropout,
the running averages of a batch norm and the draw of batches put the loss of a training step elsewhere where nothing is
wrong. What is called different must be so by `SURE` standard errors *and* by a share of the baseline that counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from recipefuzz.evidence import SIGMA, Estimate
from recipefuzz.trace import Floats, Trace
from recipefuzz.verdict import SHOWN, SOME, SURE, Label, Verdict

FIRST = 8  # steps that are called the start
UNSTEADY = 3.0  # times what the draw of rows explains, from which on a step's swing is the weights' own


class Name(StrEnum):
    HEALTHY = "healthy"
    OVERFITTING = "overfitting"  # held-out falls, then rises, while train goes on falling
    MEMORIZING = "memorizing"  # train falls, and held-out was never better than a constant prediction
    APART = "apart from the start"  # train below held-out before any row can be known by heart
    NOISY = "noisy"  # steps swing by more than what was learned, and than the draw of rows explains
    STALLED = "stalled"
    NOT_FINITE = "not finite"
    UNKNOWN = "unknown"  # no constant prediction has a finite loss, from which skill could be counted


@dataclass(frozen=True)
class Curves:
    """One trial, with its held-out loss at many steps.

    Attributes:
        verdict: on the trial; None where it has none.
        baseline: loss of the best constant prediction.
        at: steps done at the evaluations; shape (evaluations,).
        heldout: mean loss of each of some equal parts of the held-out rows; shape (evaluations, parts). The parts are
            the same at every evaluation, so differences between evaluations are free of their differences.
        seen: the same of training rows, in eval mode, too.
        part: rows of a part of `seen`, in batches.
        epoch: steps in which as many rows are drawn as there are.
    """

    trace: Trace
    verdict: Verdict | None
    baseline: float
    at: tuple[int, ...]
    heldout: Floats
    seen: Floats
    part: float
    epoch: float

    @property
    def scale(self) -> float:
        return abs(self.baseline)

    @property
    def means(self) -> Floats:
        """Held-out losses, (evaluations,)."""
        return np.asarray(self.heldout.mean(axis=1))

    def train(self, evaluation: int) -> Estimate:
        """The loss of training rows at an evaluation."""
        return estimate(self.seen[evaluation])

    def gap(self, evaluation: int) -> Estimate:
        """How far held-out is above train."""
        return estimate(self.heldout[evaluation]).minus(self.train(evaluation))


def rise(losses: Floats, first: int, second: int) -> Estimate:
    """Of a loss from one evaluation to another, on the same rows."""
    return estimate(losses[second] - losses[first])


def estimate(values: Floats) -> Estimate:
    """Their mean, with an infinite error where a single value shows none."""
    if len(values) < 2:
        return Estimate(float(values.mean()), math.inf)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)))


@np.errstate(all="ignore")
def shape(curves: Curves) -> tuple[Name, str]:
    """The name, and what it was told by, in numbers."""
    if curves.trace.first_bad is not None:
        return Name.NOT_FINITE, f"not finite from step {curves.trace.first_bad}"
    if not math.isfinite(curves.baseline):
        return Name.UNKNOWN, f"no constant prediction has a finite loss to compare with; {_course(curves)}"
    if curves.verdict is not None and curves.verdict.label is Label.STALLED:
        return Name.STALLED, f"stalled: {curves.verdict.reason}"
    return next((found for rule in RULES if (found := rule(curves))), (Name.HEALTHY, f"healthy: {_course(curves)}"))


def _memorizing(c: Curves) -> tuple[Name, str] | None:
    """Train surely learned something, and held-out, far above it by now, was never better than a constant."""
    last = len(c.at) - 1
    learned = c.train(last).high < c.baseline - SOME * c.scale
    best = float(c.means.min())
    if not learned or best < c.baseline - SOME * c.scale or not _sure(c.gap(last), SOME * c.scale):
        return None
    words = f"memorizing: train {c.train(last).mean:.3g}, held-out never below {best:.3g}"
    return Name.MEMORIZING, f"{words}; a constant prediction has {c.baseline:.3g}"


def _apart(c: Curves) -> tuple[Name, str] | None:
    """Train below held-out within the first pass over the rows, and ever after.

    A gap that comes later is what every model has on rows that it has seen.
    """
    early = [i for i, step in enumerate(c.at) if step <= c.epoch]
    if not early or not all(_sure(c.gap(i), SOME * c.scale) for i in range(len(c.at))):
        return None
    gap = c.gap(early[0])
    words = f"train is below held-out by {gap.mean:.3g} ± {SIGMA * gap.error:.1g} from step {c.at[early[0]]} on"
    return Name.APART, f"{words}, within the first pass over the rows; {_course(c)}"


def _overfitting(c: Curves) -> tuple[Name, str] | None:
    """Held-out rises from its least, at the last two evaluations, and train does not.

    Two, since weights bounce; more than `SHOWN` of the baseline, since a model that is sure of itself loses that
    on a few rows.
    """
    least, last = int(c.means.argmin()), len(c.at) - 1
    if last - least < 2 or not all(_sure(rise(c.heldout, least, i), SHOWN * c.scale) for i in (last - 1, last)):
        return None
    if rise(c.seen, least, last).low > 0:
        return None
    words = f"overfitting from step {c.at[least]}: held-out rises from {c.means[least]:.3g} to {c.means[last]:.3g}"
    return Name.OVERFITTING, f"{words} while train goes from {c.train(least).mean:.3g} to {c.train(last).mean:.3g}"


def _noisy(c: Curves) -> tuple[Name, str] | None:
    """Over the last half, steps swing by more than the gain over a constant, and than the draw of rows explains.

    A swing is `SIGMA` standard deviations, by differences of neighbouring steps, which a trend does not enter
    (von Neumann, Ann. Math. Stat. 12, 1941). What the draw explains follows from the spread between parts of the rows.
    """
    half = slice(c.trace.steps // 2, c.trace.steps)
    loss = c.trace.loss[half]
    swing = SIGMA * float(np.sqrt(np.mean(np.diff(loss) ** 2) / 2))
    spread = float(np.median(c.seen.std(axis=1))) if c.seen.shape[1] > 1 else math.inf
    drawn = SIGMA * spread * math.sqrt(c.part)
    gain = float(np.mean(c.trace.constant[half] - loss))
    if swing <= gain or swing <= UNSTEADY * drawn:
        return None
    words = f"noisy: single steps swing by {swing:.3g}, where the draw of rows explains {drawn:.2g}"
    return Name.NOISY, f"{words} and what was learned lowers the loss by {gain:.3g}; {_course(c)}"


RULES: tuple[Callable[[Curves], tuple[Name, str] | None], ...] = (_memorizing, _apart, _overfitting, _noisy)


def _sure(difference: Estimate, least: float) -> bool:
    return difference.mean >= SURE * difference.error and difference.mean > least


def _course(c: Curves) -> str:
    """From where to where both go."""
    loss = c.trace.loss
    end = max(1, len(loss) // 8)
    train = f"train {loss[: min(FIRST, len(loss))].mean():.3g} → {loss[-end:].mean():.3g}"
    if not c.at:
        return train
    return f"{train}, held-out {c.means[0]:.3g} → {c.means[-1]:.3g}{_tail(loss)}"


def _tail(loss: Floats) -> str:
    """Whether the training loss still falls: from its third quarter to its last by a part of its whole fall."""
    quarter = len(loss) // 4
    if quarter < FIRST:
        return ""
    last = estimate(loss[-quarter:])
    fall = estimate(loss[-2 * quarter : -quarter]).minus(last)
    return ", still falling" if _sure(fall, SHOWN * abs(loss[:FIRST].mean() - last.mean)) else ", flat at the end"
