"""The only place where a run is judged: nan, stalled or converging, as soon as the evidence allows.

The question is what the run will have learned by its horizon, the most steps that it can be extended to, measured by
skill. These kinds of evidence are heard, in this order:

* something is not finite: `nan`;
* skill is there and not sinking: `converging`;
* skill is rising, and on its present course will be there by the horizon: `converging`. Within the short budget the
  course is at most a straight line; after it, a curve that gets steeper is believed, which is how plateaus end;
* skill is there in part, and levels off, or has not got further in two budgets: the course decides;
* the weights hardly move, and so the loss can't get there. To first order a step changes the loss by at most
  |gradient| * |update|, and a model whose weights go less than a third of their size in all stays where that order
  holds (the "lazy" regime: Chizat, Oyallon, Bach, arXiv:1812.07956): `stalled`;
* the loss is far above the constant's and no longer comes down: `stalled`;
* nothing is learned, and the weights were thrown to a multiple of their size by the first steps: `stalled`;
* the short budget is used up, and the run is flat: `stalled`. A plateau may end later: the more a run could still move,
  the longer it is given, budget by budget, to the horizon.

The thresholds hold for all tasks. They were set by what they mean, and checked on tasks that are not those of the tests
(sparse parity, the adding problem with two recurrent nets, copying with a transformer, regression, a convolutional net,
deep tanh nets, a character model), where runs of five budgets gave the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from recipefuzz.evidence import Evidence, median, weigh
from recipefuzz.trace import LEAST_NORM, Trace


class Label(StrEnum):
    NAN = "nan"
    STALLED = "stalled"
    CONVERGING = "converging"


LEARNED = 0.3  # skill that no run reaches without having learned from its inputs
SOME = 0.1  # skill of which, at the end of the short budget, it is not doubted that something is being learned
MIDDLE = (SOME + LEARNED) / 2  # between the two a course must end on one side
SHOWN = SOME / 2  # skill that counts as a part of it: a course through less is noise
FLAT = 0.02  # skill that is none: less than batches of a hundred rows can show
FAR_BELOW = -0.3  # skill under which a run is worse than a constant by more than its own steps' noise
SURE = 3.0  # standard errors of a rise before its getting steeper is believed
ROOT = 0.5  # least power of time of a rise within the short budget: no straight line, but not yet levelling off
STEEPEST = 3.0  # power of time that the end of a plateau is extrapolated with; steeper ones need no extrapolation
LAZY = 0.3  # way of the weights, relative to their size, on which the loss is linear in them
ALIVE = 0.5  # way that a run must be able to go before it is expected to get anywhere new
SWOLLEN = 1.5  # growth of the weights that no useful run shows before it has learned anything
WEAK = 25.0  # reach under which a flat run is given up: noisy steps go one part in twenty-five downhill at best
EARLY, HALFWAY, LATE, FLAT_FOR, PATIENCE = 0.25, 0.5, 0.75, 1.5, 2.25  # short budgets after which a rule is heard
HUGE = 1e6  # times the baseline: a loss that may yet overflow
GROWTH = 3.0  # factor by which gradients are allowed to grow where the weights do move
BURST = 100.0  # times its median that a gradient norm is called to have burst
VANISHED = 1e-3  # gradient, relative to the first steps', that is called vanished


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
        """Steps after which the verdict is asked for.

        A few early ones, since most NaNs come in the first steps; then eighths of the short budget; after it,
        quarters.
        """
        return self._checkpoints

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out loss is taken after this step: at quarters of the short budget."""
        return step in self._evaluations

    @cached_property  # kept, as every trial asks for them; the evaluations at every checkpoint
    def _checkpoints(self) -> tuple[int, ...]:
        eighths = [round(self.steps * k / 8) for k in range(1, 9)]
        early = [n for n in (8, 16, 32, 64) if n < 0.7 * eighths[0]]
        quarters = [round(self.steps * k / 4) for k in range(5, 4 * (1 + self.extend) + 1)]
        return tuple(sorted({n for n in (*early, *eighths, *quarters) if n > 0}))

    @cached_property
    def _evaluations(self) -> frozenset[int]:
        return frozenset(round(self.steps * k / 4) for k in range(1, 4 * (1 + self.extend) + 1))


@dataclass(frozen=True)
class Verdict:
    """What a run is, why in one sentence, the cause where the trace alone shows it, and the numbers behind it."""

    label: Label
    reason: str
    cause: str
    evidence: Mapping[str, float]


@np.errstate(all="ignore")  # finite runs reach 1e38, whose squares are inf: no rule decides by those
def judge(trace: Trace, baseline: float, budget: Budget, *, whole: bool = False) -> Verdict | None:
    """The verdict on a run so far, or None where it is still open.

    At the horizon there always is one. A pure function: the same trace gets the same verdict anywhere.

    Args:
        trace: at least one step of it.
        baseline: mean loss of the best constant predictor on the training targets.
        budget: what the run may have.
        whole: leave a run open until the end of the short budget, unless it is nan.
    """
    if trace.first_bad is not None:
        return _not_finite(trace)
    e = weigh(trace, baseline, budget.steps, budget.limit)
    if e is None:
        return _too_short(trace) if trace.steps >= budget.limit else None
    verdict = next((v for rule in RULES if (v := rule(e)) is not None), None)
    return None if whole and e.used < 1 else verdict


def _learned(e: Evidence) -> Verdict | None:
    enough = LEARNED if e.used < LATE else SOME
    if e.now.low < enough or e.sinking:
        return None
    return _converging(e, f"skill {e.now.mean:.2f} after {e.steps} steps")


def _rising(e: Evidence) -> Verdict | None:
    if e.used < EARLY or not e.rising or e.recent.low <= 0 or e.motion < ALIVE:
        return None
    steep = e.used >= 1 and e.skill.gain.mean >= SURE * e.skill.gain.error
    end = e.skill.at_end(most=STEEPEST) if steep else e.skill.at_end(least=ROOT, most=1.0)
    if end < LEARNED:
        return None
    return _converging(e, f"skill {e.recent.mean:.3f} after {e.steps} steps and rising: on course to learn")


def _levels_off(e: Evidence) -> Verdict | None:
    sure = e.skill.gain.mean >= SURE * e.skill.gain.error
    soon = LATE if e.recent.low > SHOWN else 1.0
    if e.used < soon or not sure or e.recent.low <= -SOME or e.skill.power > ROOT:
        return None
    end = e.skill.at_end(least=0.0)
    text = f"skill {e.recent.mean:.2f} after {e.steps} steps and levelling off at about {end:.2f}"
    if end < MIDDLE:
        return _stalled(e, text, "lr_too_low")
    return _converging(e, text) if e.recent.low > SHOWN else None


def _out_of_patience(e: Evidence) -> Verdict | None:
    """Late in its extension a run is judged by its course: however steep where a little is learned already."""
    if e.used < PATIENCE:
        return None
    text = f"skill {e.recent.mean:.3g} after {e.steps} steps, {'and rising' if e.rising else 'not rising'}"
    if e.recent.low > 0:
        end = e.skill.at_end(most=STEEPEST) if e.rising else e.recent.mean
        return _converging(e, text) if end >= MIDDLE else _stalled(e, text, "lr_too_low")
    return None if _will_get_there(e) else _stalled(e, text, "unknown")


def _hardly_moves(e: Evidence) -> Verdict | None:
    lazy = e.path < LAZY
    growth = 1.0 if lazy or e.used >= 1 else GROWTH
    out_of_reach = (lazy or e.used >= HALFWAY) and e.recent.high + growth * e.reach < SOME
    if not out_of_reach and not (lazy and _hopeless(e)):
        return None
    moved = f"the weights by {e.path:.1g} of their size" * lazy
    reached = f"the loss by {e.reach:.1g} of the baseline at most" * out_of_reach
    text = (
        f"skill {_shown(e.recent.mean)} after {e.steps} steps, and {e.horizon} such steps are too small to get "
        f"anywhere: they move {', and '.join(filter(None, (moved, reached)))}"
    )
    # far above a constant's loss, and not on its way down: it is not small steps that keep it there
    return _stalled(e, text, "unknown" if e.now.high < FAR_BELOW and not e.falling else "lr_too_low")


def _hopeless(e: Evidence) -> bool:
    return (e.used >= EARLY and not _may_get_there(e)) or (e.used >= HALFWAY and not _will_get_there(e))


def _may_get_there(e: Evidence) -> bool:
    """With every error in its favour; a loss far above the baseline must come down to it first."""
    return e.log_loss.at_best() >= 0 if e.recent.high < FAR_BELOW else e.skill.at_best() >= SOME


def _will_get_there(e: Evidence) -> bool:
    """By its mean course, if it goes up at all.

    Slow parts of a model learn after the fast ones have levelled off: no course is called flatter than a logarithm.
    """
    course, goal = (e.log_loss, 0.0) if e.recent.high < FAR_BELOW else (e.skill, MIDDLE)
    return max(course.at_end(least=0.0, most=1.0), course.last.mean) >= goal


def _blown_up(e: Evidence) -> Verdict | None:
    if e.used < HALFWAY or e.now.high >= FAR_BELOW or e.falling or _may_overflow(e):
        return None
    times = np.exp(min(-e.log_loss.last.mean, 700.0))
    return _stalled(e, f"the loss is {times:.3g} times a constant prediction's and no longer falls", "lr_too_high")


def _may_overflow(e: Evidence) -> bool:
    """A loss so high that the short budget must show whether it stays finite."""
    return e.used < 1 and -e.log_loss.last.mean >= np.log(HUGE)


def _thrown(e: Evidence) -> Verdict | None:
    if e.swell < SWOLLEN or _may_overflow(e):
        return None
    text = f"no better than a constant prediction; the weights were thrown to {times(e.swell)} their size"
    if e.used >= HALFWAY and e.half.high < FLAT and not e.falling:
        return _stalled(e, text, "lr_too_high")
    return _stalled(e, text, "lr_too_high") if e.used >= 1 and not _may_get_there(e) else None


def _flat(e: Evidence) -> Verdict | None:
    """At the end of the short budget where there is little to hope for; later where there is more."""
    if e.falling or e.used < 1:
        return None
    weak = e.half.high < FLAT and e.reach < WEAK
    below = e.used >= FLAT_FOR and e.half.high < 0
    if not weak and not below and (e.used < PATIENCE or e.now.high >= FLAT):
        return None
    cause = "vanishing_gradients" if e.gradient < VANISHED else "unknown"
    text = f"no better than a constant prediction after {e.steps} steps: skill {_shown(e.half.mean)} and flat"
    return _stalled(e, text, cause)


def _horizon(e: Evidence) -> Verdict | None:
    if e.steps < e.horizon:
        return None
    text = f"skill {_shown(e.now.mean)} after all {e.steps} steps"
    return _converging(e, text) if e.now.mean >= MIDDLE else _stalled(e, text, "unknown")


RULES = (_learned, _rising, _levels_off, _out_of_patience, _hardly_moves, _blown_up, _thrown, _flat, _horizon)


def _shown(skill: float) -> str:
    """Of a run that blew up it has more digits than anyone reads."""
    return f"{skill:.3f}" if abs(skill) < 1e3 else f"{skill:.3g}"


def times(swell: float) -> str:
    """How often the weights' first size goes into their size; norms above 1e19 are infinite, their squares being so."""
    return f"{swell:.3g} times" if np.isfinite(swell) else "over 1e15 times"


def _not_finite(trace: Trace) -> Verdict:
    """NaN, with what the trace shows of its way there; where and why exactly needs a replay."""
    step = trace.first_bad or 0
    start, loss = float(trace.loss[0]), float(trace.loss[-1])
    before = trace.loss[-2] if trace.steps > 1 else np.nan
    swell = float(trace.param_norm[-1] / max(trace.param_norm[0], LEAST_NORM))
    what = "the loss" if not np.isfinite(loss) else "a gradient or a parameter"
    text = f"{what} is not finite at step {step}"
    evidence = {"step": float(step), "first_loss": start, "loss_before": float(before), "swell": swell}
    if swell >= SWOLLEN:
        text += f"; the weights had grown to {times(swell)} their size"
        return Verdict(Label.NAN, text, "exploding_parameters", evidence)
    known = trace.grad_norm[np.isfinite(trace.grad_norm)]
    if len(known) > 1 and float(known.max()) > BURST * median(known):
        text += f"; the gradient had burst from {median(known):.3g} to {known.max():.3g}"
        return Verdict(Label.NAN, text, "exploding_gradients", evidence)
    return Verdict(Label.NAN, f"{text}, all of a sudden", "unknown", evidence)


def _too_short(trace: Trace) -> Verdict:
    text = f"{trace.steps} steps are too few to see anything: give trial.steps 20 at least"
    return Verdict(Label.STALLED, text, "unknown", {"steps": float(trace.steps)})


def _converging(e: Evidence, reason: str) -> Verdict:
    return Verdict(Label.CONVERGING, reason, "", _numbers(e))


def _stalled(e: Evidence, reason: str, cause: str) -> Verdict:
    return Verdict(Label.STALLED, reason, cause, _numbers(e))


def _numbers(e: Evidence) -> dict[str, float]:
    return {
        "steps": float(e.steps),
        "skill": e.now.mean,
        "skill_error": e.now.error,
        "gain": e.skill.gain.mean,
        "gain_error": e.skill.gain.error,
        "path": e.path,
        "swell": e.swell,
        "reach": e.reach,
    }
