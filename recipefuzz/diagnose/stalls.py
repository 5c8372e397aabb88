"""A trial that stalled: what was measured before and after it, the cause, the root, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipefuzz.diagnose import remedies, stall_words
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.overfit import Overfit, overfit
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import explainable, neighbours_skill, same_targets
from recipefuzz.diagnose.remedies import Remedy
from recipefuzz.diagnose.replay import Replay
from recipefuzz.diagnose.signals import Signals, signals
from recipefuzz.diagnose.symptoms import (
    SIGNS,
    Findings,
    cause_in_code,
    helps,
    overflows,
    root_of_stall,
    settled,
    suspects,
    turns,
)
from recipefuzz.diagnosis import Diagnosis, Fix, Root
from recipefuzz.engines.job import Outcome
from recipefuzz.evidence import best_heldout_skill
from recipefuzz.targets.task import some_rows
from recipefuzz.trace import COLUMNS, LEAST_NORM, Trace
from recipefuzz.verdict import SHOWN, SOME, Label

BATCH = 256  # rows that signals are measured on: a unit that is 0 for all of them is as good as dead
LAST = 20  # steps that are looked at for overshooting


def stalled(patient: Patient, outcome: Outcome) -> Diagnosis:
    """Why it did not learn, and what mends it.

    Costs two replays of the trial, one run for each change of the ladder (about thirty, and two more for each of the
    smallest six that converge), about ten further ones where no single change works, and then the experiment of
    `overfit`.
    """
    assert outcome.verdict is not None
    possible = explainable(patient.task.train)
    if possible < SOME or same_targets(patient.task.train):
        return _of_empty_data(possible)
    found = _measured(patient, outcome)
    suspected = suspects(found, patient.recipe)
    fixes = _recipe_fixes(patient, suspected[0] if suspected else "")
    learnt = None if any(fix.works for fix in fixes) else overfit(patient)
    if learnt is not None and learnt.works:
        found_fix = patient.remedied([learnt.remedy(patient.recipe)])
        fixes = tuple(sorted((*found_fix, *fixes), key=remedies.rank))
    known = patient.task.loss_kind != "custom"  # whether the loss says how far a prediction is from its target
    case = _Case(found, fixes, learnt, neighbours_skill(patient.task.train) if known else math.nan)
    root = root_of_stall(
        learnt=learnt is None or learnt.works,
        mended=case.mended,
        related=case.related,
        generalizes=case.related >= SOME
        or not case.mended
        or any(_generalizes(patient, fix) for fix in witnesses(fixes)),
        broken=any(present(found.start) for present in SIGNS.values()),
    )
    if root is Root.RECIPE:
        cause = _of_recipe(patient, outcome, case, suspected)
        case = replace(case, fixes=to_the_point(cause, fixes))
    else:
        cause = cause_in_code(found.start) if learnt is not None and not learnt.works else "unknown"
    return _diagnosis(patient, outcome.verdict.reason, case, cause, root)


@dataclass(frozen=True)
class _Case:
    """All that was found out.

    Attributes:
        learnt: the experiment with ten rows; None where another recipe converges on every seed, which shows as much.
        related: how well the targets follow from the nearest rows; NaN if that says nothing of the loss.
    """

    found: Findings
    fixes: tuple[Fix, ...]
    learnt: Overfit | None
    related: float

    @property
    def mended(self) -> bool:
        return any(fix.verdict == Label.CONVERGING for fix in self.fixes)


def _of_empty_data(possible: float) -> Diagnosis:
    if math.isnan(possible):
        text, advice = "all training rows have the same target: there is nothing to learn", stall_words.TARGETS
    else:
        text = (
            f"rows with the same inputs have different targets: no model can explain more than {possible:.0%} of them"
        )
        advice = stall_words.INPUTS
    evidence = {"explainable": possible}
    return Diagnosis(Label.STALLED, Root.DATA, "constant_output", explanation=text, evidence=evidence, advice=advice)


def _measured(patient: Patient, outcome: Outcome) -> Findings:
    trace = outcome.trace
    with patient.replaying() as replay:
        start = _signals(patient, replay)
    with patient.replaying() as replay:
        last = min(LAST, trace.steps)
        replay.run(trace.steps - last)
        overshot = replay.overshot(last) / last
        end = _signals(patient, replay)
    assert outcome.verdict is not None
    swell = float(trace.param_norm[-1] / max(trace.param_norm[0], LEAST_NORM))
    overflow = next((i for i, n in enumerate(trace.grad_norm, 1) if overflows(n, patient.recipe.optimizer)), 0)
    return Findings(start, end, overshot, swell, overflow, outcome.verdict.cause)


def _signals(patient: Patient, replay: Replay) -> Signals:
    rows = patient.rows
    x, y = rows.take(some_rows(rows, BATCH).to(rows.index_device))
    return signals(replay.model, replay.task.loss, x, y, patient.device)


def _of_recipe(patient: Patient, outcome: Outcome, case: _Case, suspected: tuple[str, ...]) -> str:
    recipe, step = patient.recipe, case.found.overflow
    if not step:
        return settled(suspected, case.fixes, recipe)
    until = Trace(**{name: getattr(outcome.trace, name)[:step] for name in COLUMNS})
    working = remedies.working_alone(case.fixes)
    health = Health.of(until, outcome.baseline)
    return explosion("forward", health, recipe.optimizer, recipe.init_scale, recurrent=False, mended_by=working)


def _recipe_fixes(patient: Patient, suspected: str) -> tuple[Fix, ...]:
    """All changes, those that treat the suspected cause first among equally small ones."""
    recipe, applies = patient.recipe, patient.applies

    def first(changes: list[Remedy]) -> list[Remedy]:
        return sorted(changes, key=lambda change: not helps(suspected, change.values, recipe))

    def expected(change: Remedy) -> bool:
        return turns(suspected, change.values)

    fixes = patient.remedied(first(remedies.for_stall(recipe, applies, patient.config.trial.steps)), expected)
    if any(fix.works for fix in fixes):
        return fixes
    return tuple(sorted((*patient.remedied(first(remedies.together(recipe, applies))), *fixes), key=remedies.rank))


def to_the_point(cause: str, fixes: tuple[Fix, ...]) -> tuple[Fix, ...]:
    """Among changes that work as well, those that turn the knob which the cause names come first.

    A step on another axis may be smaller on its ladder (ladders can't be compared), but it makes up for the fault and
    does not remove it.
    """
    return tuple(sorted(fixes, key=lambda fix: (*remedies.rank(fix), not turns(cause, fix.values))))


def witnesses(fixes: tuple[Fix, ...]) -> list[Fix]:
    """Runs that can tell what held-out rows say: the smallest change that converges, and the one that learned most.

    The smallest is often close to where training fails, and as bad on held-out rows as that.
    """
    most = max(fixes, key=lambda fix: (fix.verdict == Label.CONVERGING, fix.skill or 0.0))
    return [fixes[0], most] if most is not fixes[0] else [most]


def _generalizes(patient: Patient, fix: Fix) -> bool:
    """Whether a run that converges is ever better than a constant on held-out rows: else it learned rows by heart."""
    outcome = replace(patient, recipe=patient.recipe.but(**fix.values)).train()
    return best_heldout_skill(outcome.trace, outcome.baseline) >= SHOWN


def _diagnosis(patient: Patient, reason: str, case: _Case, cause: str, root: Root) -> Diagnosis:
    found = case.found
    clauses = [reason, stall_words.symptom(cause, found, patient.recipe)]
    if root is Root.DATA:
        clauses.append(f"the five nearest rows predict a target with skill {case.related:.2f}")
    clauses.append(stall_words.interventions(case.fixes, case.learnt))
    return Diagnosis(
        Label.STALLED,
        root,
        cause,
        phase="backward" if found.overflow else "",
        step=found.overflow,
        module=stall_words.layer(cause, found),
        explanation="; ".join(clauses),
        evidence=_evidence(case),
        advice=stall_words.advice(cause, root, found),
        fixes=case.fixes if root is Root.RECIPE else (),
    )


def _evidence(case: _Case) -> Mapping[str, Any]:
    found = case.found
    return {
        "start": _numbers(found.start),
        "end": _numbers(found.end),
        "overshot": found.overshot,
        "swell": found.swell,
        "neighbours_skill": case.related,
        "ten_rows_skill": case.learnt.skill if case.learnt else None,
    }


def _numbers(signals_: Signals) -> dict[str, Any]:
    """Plain values, layer by layer."""
    return {
        "loss": signals_.loss,
        "spread": signals_.spread,
        "descent": signals_.descent,
        "through_time": signals_.through_time,
        "backward": dict(signals_.backward),
        "gradient": {w.name: w.gradient for w in signals_.weights},
        "dead": {f"{a.layer} {a.op}": a.dead for a in signals_.activations if not math.isnan(a.dead)},
        "saturated": {f"{a.layer} {a.op}": a.saturated for a in signals_.activations if not math.isnan(a.saturated)},
    }
