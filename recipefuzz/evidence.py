"""What can be read off an unfinished run: how much it has learned, whether that grows, where its course leads.

Skill is taken against the constant predictor's loss *on the same batches*, so that the luck of the draw cancels. Every
number that decides anything has a standard error.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        last: mean over the last quarter.
        gain, earlier: how much that is above the third quarter, and the third above the second.
        stretch: the time that is asked about, in lengths of the run so far.
    """

    last: Estimate
    gain: Estimate
    earlier: Estimate
    stretch: float

    @classmethod
    def through(cls, quarters: list[Estimate], stretch: float) -> Course:
        """The course through the means of the second, third and last quarter."""
        second, third, last = quarters
        return cls(last, last.minus(third), third.minus(second), stretch)

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
    """The numbers of one run at one time. Skills as in `skill_of`.

    Attributes:
        steps: done so far. `horizon`: the most there can be. `used`: done, in short budgets.
        now: skill over the last eighth of the run; `half`: over its last half.
        skill: course of the skill; `log_loss`: of the log of baseline / loss, for a loss far above the baseline.
        fall: drop of the log loss from the second quarter to the last.
        motion: length of the way that the weights will go until the horizon at their present pace, relative
            to their size; `path`: the same with what they have gone so far.
        swell: size of all parameters relative to their first. Weights before a normalization grow without
            harm; its gains, which are counted too, keep that small.
        reach: gain of skill until the horizon if every step went straight downhill, to first order:
            |gradient| * |update| bounds what a step changes the loss by.
        gradient: median gradient norm over the last quarter, relative to the first steps'.
    """

    steps: int
    horizon: int
    used: float
    now: Estimate
    half: Estimate
    skill: Course
    log_loss: Course
    fall: Estimate
    motion: float
    path: float
    swell: float
    reach: float
    gradient: float

    @property
    def recent(self) -> Estimate:
        return self.skill.last

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


@np.errstate(all="ignore")  # finite runs reach 1e38, whose squares are inf: no rule decides by those
def weigh(trace: Trace, baseline: float, short: int, horizon: int) -> Evidence | None:
    """The evidence of a run that is finite so far; None while it is too short for any.

    Args:
        baseline: mean loss of the best constant predictor on the training targets.
        short: steps of the short budget.
        horizon: the most steps that the run can have.
    """
    t = trace.steps
    window, quarter = max(LEAST_WINDOW, t // 8), t // 4
    if t < 2 * window:
        return None
    scale, left = max(abs(baseline), TINY), horizon - t
    parts = [slice(t - k * quarter, t - (k - 1) * quarter) for k in (3, 2, 1)]
    logs = [_mean(-np.log(np.maximum(trace.loss[p], TINY) / scale)) for p in parts]
    pace = float(np.median(trace.update_ratio[parts[-1]]))
    bound = float((trace.grad_norm[parts[-1]] * trace.update_norm[parts[-1]]).mean())
    return Evidence(
        steps=t,
        horizon=horizon,
        used=t / short,
        now=skill_of(trace, baseline, slice(t - window, t)),
        half=skill_of(trace, baseline, slice(t - 2 * quarter, t)),
        skill=Course.through([skill_of(trace, baseline, p) for p in parts], horizon / t),
        log_loss=Course.through(logs, horizon / t),
        fall=logs[2].minus(logs[0]),
        motion=pace * left,
        path=float(trace.update_ratio.sum()) + pace * left,
        swell=float(trace.param_norm[-1] / max(trace.param_norm[0], TINY)),
        reach=bound * left / scale,
        gradient=float(np.median(trace.grad_norm[parts[-1]]) / max(np.median(trace.grad_norm[:LEAST_WINDOW]), TINY)),
    )


def skill_at_end(trace: Trace, baseline: float) -> float:
    """Skill over the last eighth of a run (ten steps at least): 0 learned nothing, 1 perfect.

    NaN for a run that is empty or ended in something not finite.
    """
    if not trace.steps or trace.first_bad is not None:
        return float("nan")
    window = max(LEAST_WINDOW, trace.steps // 8)
    return skill_of(trace, baseline, slice(max(0, trace.steps - window), trace.steps)).mean


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
    mean = float(constant.mean())
    if baseline > 0 and mean > 0:
        skill = 1.0 - float(loss.mean()) / mean
        rest = (loss - (1.0 - skill) * constant) / mean
    else:
        rest = below(constant, loss, baseline)
        skill = float(rest.mean())
    return Estimate(skill, float(rest.std() / np.sqrt(len(rest))))


def _mean(values: Floats) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / np.sqrt(len(values))))
