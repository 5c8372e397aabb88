"""What can be read off an unfinished run: how much it has learned, whether that grows, where its course leads.

Skill is taken against the constant predictor's loss *on the same batches*, so that the luck of the draw cancels. Every
number that decides anything has a standard error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from recipefuzz.trace import Floats, Trace

SIGMA = 2.0  # standard errors by which anything is called different: one chance in twenty to be wrong
LEAST_WINDOW = 10  # steps: fewer give no standard error worth the name
TINY = 1e-30
Number = TypeVar("Number", float, Floats)

# Middles of the last three quarters of a run, in run lengths; of the first quarter only rubbish is expected.
SECOND, THIRD, LAST = 0.375, 0.625, 0.875


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    error: float

    @property
    def low(self) -> float:
        return self.mean - SIGMA * self.error

    @property
    def high(self) -> float:
        return self.mean + SIGMA * self.error

    def minus(self, other: Estimate) -> Estimate:
        return Estimate(self.mean - other.mean, float(np.hypot(self.error, other.error)))


POWERS = np.array([p or 1e-6 for p in np.linspace(-2.0, 4.0, 61)])  # 0 stands for the logarithm
RATIOS = (LAST**POWERS - THIRD**POWERS) / (THIRD**POWERS - SECOND**POWERS)


@dataclass(frozen=True)
class Course:
    """Where a quantity is going: a + b * t**p through its means over the last three quarters of the run.

    The family holds a straight line (p = 1), the logarithm (p = 0), curves that level off (p < 0) and ones that
    get steeper (p > 1), as at the end of a plateau.

    Attributes:
        second, third, last: means over the quarters of the run.
        stretch: the time that is asked about, in lengths of the run so far.
    """

    second: Estimate
    third: Estimate
    last: Estimate
    stretch: float

    @cached_property
    def gain(self) -> Estimate:
        """How much the last quarter is above the third."""
        return self.last.minus(self.third)

    @cached_property
    def earlier(self) -> Estimate:
        """How much the third quarter is above the second."""
        return self.third.minus(self.second)

    @property
    def power(self) -> float:
        return _power(self.gain.mean, self.earlier.mean)

    def at_end(self, least: float = POWERS[0], most: float = POWERS[-1]) -> float:
        """The value at the end of the time asked about, with the power kept between `least` and `most`."""
        return self.last.mean + self._ahead(self.gain.mean, min(max(self.power, least), most))

    def at_best(self) -> float:
        """The same with every error in its favour, no steeper than a straight line."""
        gain = max(self.gain.high, 0.0)
        return self.last.high + self._ahead(gain, min(_power(gain, self.earlier.low), 1.0))

    def _ahead(self, gain: float, power: float) -> float:
        p = power or 1e-6
        return float(gain * (self.stretch**p - LAST**p) / (LAST**p - THIRD**p))


def _power(gain: float, earlier: float) -> float:
    return float(np.interp(gain / earlier, RATIOS, POWERS)) if earlier > 0 else float(POWERS[-1])


@dataclass(frozen=True)
class Evidence:
    """The numbers of one run at one time; each is worked out when a rule first asks for it, and then kept.

    Most runs are judged by the first rules, which ask for few. Skills as in `skill_of`. Runs of huge losses overflow
    here: who asks has numpy's warnings off, as `judge` has.

    Attributes:
        baseline: mean loss of the best constant predictor on the training targets.
        short: steps of the short budget.
        horizon: the most steps that the run can have.
    """

    trace: Trace
    baseline: float
    short: int
    horizon: int

    @cached_property
    def steps(self) -> int:
        return self.trace.steps

    @cached_property
    def used(self) -> float:
        """Steps done, in short budgets."""
        return self.steps / self.short

    @cached_property
    def now(self) -> Estimate:
        """Skill over the last eighth of the run."""
        return skill_of(self.trace, self.baseline, slice(self.steps - window(self.steps), self.steps))

    @cached_property
    def half(self) -> Estimate:
        """Skill over the last half of the run."""
        return skill_of(self.trace, self.baseline, slice(self.steps - 2 * (self.steps // 4), self.steps))

    @cached_property
    def recent(self) -> Estimate:
        """Skill over the last quarter of the run."""
        return skill_of(self.trace, self.baseline, self._quarter(4))

    @cached_property
    def skill(self) -> Course:
        second, third = (skill_of(self.trace, self.baseline, self._quarter(n)) for n in (2, 3))
        return Course(second, third, self.recent, self._stretch)

    @cached_property
    def log_loss(self) -> Course:
        """Of the log of baseline / loss, for a loss far above the baseline."""
        logs = -np.log(np.maximum(self.trace.loss, TINY) / self._scale)
        second, third, last = (_mean(logs[self._quarter(n)]) for n in (2, 3, 4))
        return Course(second, third, last, self._stretch)

    @property
    def fall(self) -> Estimate:
        """Drop of the log loss from the second quarter to the last."""
        return self.log_loss.last.minus(self.log_loss.second)

    @property
    def rising(self) -> bool:
        return self.skill.gain.low > 0

    @property
    def sinking(self) -> bool:
        return self.skill.gain.high < 0

    @property
    def falling(self) -> bool:
        """The loss comes down, if slowly."""
        return self.rising or self.fall.low > 0

    @cached_property
    def motion(self) -> float:
        """Way that the weights will go until the horizon at their present pace, relative to their size."""
        return median(self._ratio[self._quarter(4)]) * self._left

    @cached_property
    def path(self) -> float:
        """The same with the way that they have gone so far."""
        return float(np.add.reduce(self._ratio)) + self.motion

    @property
    def swell(self) -> float:
        """Size of all parameters relative to their first.

        Weights before a normalization grow without harm; its gains, which are counted too, keep that small.
        """
        return float(self.trace.param_norm[-1]) / max(float(self.trace.param_norm[0]), TINY)

    @cached_property
    def reach(self) -> float:
        """Gain of skill until the horizon if every step went straight downhill, to first order.

        |gradient| * |update| bounds what a step changes the loss by.
        """
        last = self._quarter(4)
        bound = float(np.add.reduce(self.trace.grad_norm[last] * self.trace.update_norm[last])) / (self.steps // 4)
        return bound * self._left / self._scale

    @property
    def gradient(self) -> float:
        """Median gradient norm over the last quarter, relative to the first steps'."""
        norms = self.trace.grad_norm
        return median(norms[self._quarter(4)]) / max(median(norms[:LEAST_WINDOW]), TINY)

    def _quarter(self, number: int) -> slice:
        """The steps of the first to fourth quarter; what can't be divided by four is left out at the start."""
        quarter = self.steps // 4
        end = self.steps - (4 - number) * quarter
        return slice(end - quarter, end)

    @cached_property
    def _ratio(self) -> Floats:
        return self.trace.update_ratio

    @property
    def _left(self) -> int:
        return self.horizon - self.steps

    @property
    def _stretch(self) -> float:
        return self.horizon / self.steps

    @property
    def _scale(self) -> float:
        return max(abs(self.baseline), TINY)


def weigh(trace: Trace, baseline: float, short: int, horizon: int) -> Evidence | None:
    """The evidence of a run that is finite so far, as in `Evidence`; None while it is too short for any."""
    return None if trace.steps < 2 * window(trace.steps) else Evidence(trace, baseline, short, horizon)


def window(steps: int) -> int:
    """Length of the end of a run by which it is judged: an eighth, ten steps at least."""
    return max(LEAST_WINDOW, steps // 8)


def skill_at_end(trace: Trace, baseline: float) -> float:
    """Skill over the last eighth of a run (ten steps at least): 0 learned nothing, 1 perfect.

    NaN for a run that is empty or ended in something not finite.
    """
    if not trace.steps or trace.first_bad is not None:
        return float("nan")
    return skill_of(trace, baseline, slice(max(0, trace.steps - window(trace.steps)), trace.steps)).mean


def best_heldout_skill(trace: Trace, baseline: float) -> float:
    """Of all evaluations on held-out rows; NaN where there was none."""
    losses = [loss for _, loss in trace.heldout]
    return below(baseline, min(losses), baseline) if losses else float("nan")


def below(constant: Number, loss: Number, baseline: float) -> Number:
    """How far a loss is below a constant prediction's, in units of the baseline: skill, where the two are equal."""
    return (constant - loss) / max(abs(baseline), TINY)


@np.errstate(all="ignore")
def skill_of(trace: Trace, baseline: float, steps: slice) -> Estimate:
    """1 - loss / constant's loss over some steps: a ratio of means.

    The standard error is that of the classical ratio estimator (Cochran, Sampling Techniques, 1977, ch. 6).
    Where the baseline is not positive (a likelihood of densities, say) it only sets the scale.
    """
    loss, constant = trace.loss[steps], trace.constant[steps]
    mean = _average(constant)
    if baseline > 0 and mean > 0:
        skill = 1.0 - _average(loss) / mean
        return Estimate(skill, _mean((loss - (1.0 - skill) * constant) / mean).error)
    return _mean(below(constant, loss, baseline))


def _mean(values: Floats) -> Estimate:
    mean = _average(values)
    rest = values - mean
    return Estimate(mean, math.sqrt(_average(rest * rest)) / math.sqrt(len(values)))


def _average(values: Floats) -> float:
    """As `values.mean()`, which takes three times as long for a few dozen numbers."""
    return float(np.add.reduce(values)) / len(values)


def median(values: Floats) -> float:
    """As `np.median`, which takes ten times as long for a few dozen numbers. NaN if there is one among them."""
    ordered, half = np.sort(values), len(values) // 2
    if math.isnan(ordered[-1]):  # sorted to the end
        return math.nan
    return float(ordered[half]) if len(values) % 2 else float(ordered[half - 1] + ordered[half]) / 2
