"""The only place where a run is judged: nan, stalled or converging, as soon as the evidence allows.

The question is what the run will have learned by its horizon, the longest that it may be extended to, measured by skill:
the share of the best constant predictor's loss that the model has done away with. Skill is taken against the constant's
loss *on the same batches*, so that the luck of the draw cancels; whatever is said of a trend is said at two standard
errors. The kinds of evidence, in the order in which they are heard:

* something is not finite: `nan`;
* skill is there and not sinking: `converging`;
* skill is rising, and on its present course will be there by the horizon: `converging`;
* the steps are so small that the loss can't get there: to first order a step changes the loss by at most
  |gradient| * |update|, and a model whose weights move by less than a third in all stays where that order holds (the
  "lazy" regime: Chizat, Oyallon, Bach, arXiv:1812.07956): `stalled`;
* the loss is far above the constant's and no longer comes down: `stalled`;
* the short budget is used up and the run is flat, no better than a constant: `stalled`. A plateau can end later, so a
  run that is neither flat nor rising for certain goes on, budget by budget, to the horizon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from recipefuzz.trace import Floats, Trace


class Label(StrEnum):
    NAN = "nan"
    STALLED = "stalled"
    CONVERGING = "converging"


LEARNED = 0.3  # skill that no run keeps without having learned from its inputs: text models that know only which
# letter follows which have 0.2 to 0.3, a memory of the label frequencies has 0
SOME = 0.1  # skill of which, at the end of the short budget, it is not doubted that something is being learned
SIGMA = 2.0  # standard errors by which anything is called different: one chance in twenty to be wrong
LAZY = 0.3  # path length of the weights, relative to their size, below which the loss is linear in them
ALIVE = 0.5  # path length that a run needs before it to be expected to get anywhere new
FAR_BELOW = -0.3  # skill under which a run is worse than a constant by more than the noise of its own steps
FLAT = 0.02  # skill below which a run that had two budgets has shown nothing
MOST_GROWTH = 8.0  # factor by which a quarter of the run may multiply skill when a plateau's end is extrapolated
FASTER = 1.0
MIDDLE = 0.2
TINY = 1e-30
LEAST_WINDOW = 10  # steps: fewer give no standard error worth the name


@dataclass(frozen=True)
class Budget:
    """Steps a trial may have: a short budget, and how many more of them where the verdict is open."""

    steps: int
    extend: int = 4

    @property
    def limit(self) -> int:
        """The horizon: the most steps that a trial can get."""
        return self.steps * (1 + self.extend)

    def checkpoints(self) -> tuple[int, ...]:
        """Steps after which the verdict is asked for: early ones for early deaths, then eighths of a budget,
        then quarters.
        """
        eighths = [round(self.steps * k / 8) for k in range(1, 9)]
        early = [n for n in (8, 16, 32, 64) if n < 0.7 * eighths[0]]
        quarters = [round(self.steps * k / 4) for k in range(5, 4 * (1 + self.extend) + 1)]
        return tuple(sorted({n for n in (*early, *eighths, *quarters) if n > 0}))

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out loss is taken after this step: at quarters of a budget."""
        return step in {round(self.steps * k / 4) for k in range(1, 4 * (1 + self.extend) + 1)}


@dataclass(frozen=True)
class Verdict:
    """What a run is, why in one sentence, and the numbers that decided it."""

    label: Label
    reason: str
    cause: str
    evidence: Mapping[str, float]


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


@dataclass(frozen=True)
class Evidence:
    """What the rules look at. Times are in steps, skills as in `skill_of`.

    Attributes:
        used: steps done, in short budgets.
        left: steps to the horizon.
        now: skill over the last eighth of the run.
        recent, trend: skill over the last quarter, and its gain over the quarter before.
        half: skill over the last half.
        fall: drop of log loss from the second quarter to the last; positive while a blown-up loss comes down.
        reach: largest gain of skill to first order until the horizon, at the present size of steps.
        path: length of the way that the weights will go until the horizon, relative to their size.
    """

    used: float
    left: int
    quarter: int
    now: Estimate
    recent: Estimate
    trend: Estimate
    earlier_trend: Estimate
    half: Estimate
    fall: Estimate
    log_trend: Estimate
    log_excess: float
    reach: float
    path: float
    motion: float
    swell: float
    course: Course
    log_course: Course

    @property
    def rising(self) -> bool:
        return self.trend.low > 0

    @property
    def sinking(self) -> bool:
        return self.trend.high < 0


def judge(trace: Trace, baseline: float, budget: Budget, *, whole: bool = False) -> Verdict | None:
    """The verdict on a run so far, or None where it is still open.

    At the horizon there always is one. A pure function: the same trace gets the same verdict anywhere.

    Args:
        trace: at least one step of it.
        baseline: mean loss of the best constant predictor on the training targets.
        whole: leave a run that converges open until the end of the short budget.
    """
    if trace.first_bad is not None:
        return _not_finite(trace)
    evidence = weigh(trace, baseline, budget)
    if evidence is None:
        return None
    for rule in RULES:
        verdict = rule(evidence)
        if verdict is not None:
            early = verdict.label is Label.CONVERGING and evidence.used < 1
            return None if whole and early else verdict
    return None


def skill_at_end(trace: Trace, baseline: float) -> float:
    """Skill over the last eighth of a run (ten steps at least): 0 learned nothing, 1 perfect; NaN if empty."""
    if not trace.steps:
        return float("nan")
    return skill_of(trace, baseline, trace.steps - max(LEAST_WINDOW, trace.steps // 8), trace.steps).mean


def skill_of(trace: Trace, baseline: float, start: int, end: int) -> Estimate:
    """1 - loss / constant's loss over the steps from `start` to `end`: a ratio of means.

    The standard error is that of the classical ratio estimator (Cochran, Sampling Techniques, 1977, ch. 6).
    Where the baseline is not positive (a likelihood of densities, say) it only sets the scale.
    """
    loss, constant = trace.loss[max(0, start) : end], trace.constant[max(0, start) : end]
    scale = float(constant.mean())
    if baseline > 0 and scale > 0:
        skill = 1.0 - float(loss.mean()) / scale
        rest = (loss - (1.0 - skill) * constant) / scale
    else:
        rest = (constant - loss) / max(abs(baseline), TINY)
        skill = float(rest.mean())
    return Estimate(skill, float(rest.std() / np.sqrt(len(rest))))


def weigh(trace: Trace, baseline: float, budget: Budget) -> Evidence | None:
    """The evidence of a finite run; None while it is too short for any."""
    t = trace.steps
    window, quarter = max(LEAST_WINDOW, t // 8), t // 4
    if t < 2 * window:
        return None
    left = budget.limit - t
    before = skill_of(trace, baseline, t - 2 * quarter, t - quarter)
    recent = skill_of(trace, baseline, t - quarter, t)
    logs = np.log(np.maximum(trace.loss, TINY))
    last = _mean(logs[-quarter:])
    step = float(np.median(trace.update_ratio[-quarter:]))
    start = float(trace.weight_norm[0])
    return Evidence(
        used=t / budget.steps,
        left=left,
        quarter=quarter,
        now=skill_of(trace, baseline, t - window, t),
        recent=recent,
        trend=recent.minus(before),
        earlier_trend=before.minus(skill_of(trace, baseline, t - 3 * quarter, t - 2 * quarter)),
        half=skill_of(trace, baseline, t - 2 * quarter, t),
        fall=_mean(logs[-3 * quarter : -2 * quarter]).minus(last),
        log_trend=last.minus(_mean(logs[-2 * quarter : -quarter])),
        log_excess=last.mean - float(np.log(max(abs(baseline), TINY))),
        reach=float((trace.grad_norm[-quarter:] * trace.update_norm[-quarter:]).mean())
        * left
        / max(abs(baseline), TINY),
        path=float(trace.update_ratio.sum()) + step * left,
        course=Course(recent, recent.minus(before), before.minus(skill_of(trace, baseline, t - 3 * quarter, t - 2 * quarter)), budget.limit / t),
        log_course=Course(Estimate(-last.mean + float(np.log(max(abs(baseline), TINY))), last.error), _mean(logs[-2 * quarter : -quarter]).minus(last), _mean(logs[-3*quarter:-2*quarter]).minus(_mean(logs[-2*quarter:-quarter])), budget.limit / t),
        swell=float(trace.weight_norm[-1]) / max(start, TINY),
        motion=step * left,
    )


def _mean(values: Floats) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / np.sqrt(len(values))))


def _not_finite(trace: Trace) -> Verdict:
    return Verdict(Label.NAN, "", "", {"step": float(trace.first_bad or 0)})


def _learned(e: Evidence) -> Verdict | None:
    enough = LEARNED if e.used < 1 else SOME
    if e.now.low >= enough and not e.sinking:
        return _verdict(Label.CONVERGING, "learned", e)
    return None


def _rising(e: Evidence) -> Verdict | None:
    """On its present course: a straight line while the short budget lasts; after it, growth by the same
    factor as before if it is getting faster, which is how plateaus end."""
    if not (e.used >= P["rise_t"] and e.rising and e.recent.low > 0 and e.motion >= ALIVE):
        return None
    course = e.course
    fastest = 1.0 if e.used < 1 else P["pmax"]
    if course.power(course.ratio) > 1 and e.trend.mean < P["sure"] * e.trend.error:
        fastest = 1.0
    if e.recent.mean + course.gain(course.ratio, e.trend.mean, fastest) >= LEARNED:
        return _verdict(Label.CONVERGING, f"rising p={course.power(course.ratio):.1f}", e)
    return None


def _settled(e: Evidence) -> Verdict | None:
    if e.used < P["settle_t"] or e.recent.low <= P["settle_l"] or e.trend.mean < P["settle_s"] * e.trend.error:
        return None
    course = e.course
    if course.power(course.ratio) > P["settle_p"]:
        return None
    end = e.recent.mean + course.gain(course.ratio, e.trend.mean, 1.0)
    return _verdict(Label.CONVERGING if end >= MIDDLE else Label.STALLED, "settled", e)


def _too_slow(e: Evidence) -> Verdict | None:
    if e.path < LAZY and e.recent.high + e.reach < SOME:
        return _verdict(Label.STALLED, "reach", e)
    if e.path < LAZY and e.used >= P["lazy_t"]:
        course, goal = (e.log_course, 0.0) if e.recent.high < FAR_BELOW else (e.course, MIDDLE)
        if course.last.mean + course.gain(course.ratio, max(0.0, course.trend.mean), 1.0) < goal:
            return _verdict(Label.STALLED, "lazy course", e)
    if (e.path < LAZY and e.used >= P["slow_t"]) or (e.swell >= P["swell"] and e.used >= 1):
        if e.recent.high < FAR_BELOW:
            if e.log_course.best() < 0:
                return _verdict(Label.STALLED, "log course", e)
        elif e.course.best() < SOME:
            return _verdict(Label.STALLED, "course", e)
    return None


def _blown_up(e: Evidence) -> Verdict | None:
    if e.used >= 0.5 and e.now.high < FAR_BELOW and not e.rising and e.fall.low <= 0:
        return _verdict(Label.STALLED, "blown", e)
    return None


def _flat(e: Evidence) -> Verdict | None:
    if e.rising or e.fall.low > 0:
        return None
    if e.used >= P["thrown_t"] and e.half.high < FLAT and e.swell >= P["swell"]:
        return _verdict(Label.STALLED, "thrown", e)
    if e.used >= P["weak_t"] and e.half.high < FLAT and e.reach < P["weak"]:
        return _verdict(Label.STALLED, "weak", e)
    if e.used >= P["flat_t"] and e.half.high < 0:
        return _verdict(Label.STALLED, "flat", e)
    if e.used >= P["flat2_t"] and e.now.high < FLAT:
        return _verdict(Label.STALLED, "flat2", e)
    return None


P = dict(settle_l=0.05, lazy_t=0.5, weak_t=1.0, weak=15.0, settle_t=1.0, settle_s=3.0, settle_p=1.0, plo=1.0, thrown_t=0.5, swell=1.5, flat_t=1.5, flat2_t=2.0, rise_t=0.25, pmax=3.0, sure=3.0, slow_t=0.25)
POWERS = np.linspace(-2.0, 4.0, 61)


@dataclass(frozen=True)
class Course:
    """a + b * t^p through the means of the last three quarters"""

    last: Estimate
    trend: Estimate
    earlier: Estimate
    stretch: float

    @property
    def ratio(self) -> float:
        return self.trend.mean / self.earlier.mean if self.earlier.mean > 0 else float("inf")

    def power(self, ratio: float) -> float:
        return float(np.interp(ratio, RATIOS, POWERS))

    def gain(self, ratio: float, trend: float, most: float) -> float:
        p = min(max(self.power(ratio), P["plo"] if most == 1.0 and self.stretch > 5.1 else -2.0), most) or 1e-6
        return trend * (self.stretch**p - 0.875**p) / (0.875**p - 0.625**p)

    def best(self) -> float:
        slow = max(self.earlier.low, 0.0)
        trend = max(self.trend.high, 0.0)
        ratio = trend / slow if slow > 0 else float("inf")
        return self.last.high + self.gain(ratio, trend, 1.0)


RATIOS = np.array([((0.875**p - 0.625**p) / (0.625**p - 0.375**p)) for p in np.where(POWERS == 0, 1e-6, POWERS)])


def _horizon(e: Evidence) -> Verdict | None:
    if e.left > 0:
        return None
    return _verdict(Label.CONVERGING if e.now.mean >= MIDDLE else Label.STALLED, "horizon", e)


RULES = (_learned, _rising, _settled, _too_slow, _blown_up, _flat, _horizon)


def _verdict(label: Label, reason: str, e: Evidence) -> Verdict:
    return Verdict(label, reason, "", {})
