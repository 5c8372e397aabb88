"""A trial that stalled: what was measured before and after it, the cause, the root, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recipefuzz.diagnose import remedies, stall_words
from recipefuzz.diagnose.diagnosis import Diagnosis, Fix, Root
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.overfit import Overfit, overfit
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import neighbours_skill, same_everywhere
from recipefuzz.diagnose.remedies import Remedy
from recipefuzz.diagnose.replay import Replay, replaying
from recipefuzz.diagnose.signals import Signals, signals
from recipefuzz.diagnose.symptoms import Findings, cause_in_code, helps, overflows, settled, suspects
from recipefuzz.engines.job import Outcome
from recipefuzz.targets.task import some_rows
from recipefuzz.trace import COLUMNS, LEAST_NORM, Trace
from recipefuzz.verdict import SOME, Label

BATCH = 256  # rows that signals are measured on: a unit that is 0 for all of them is as good as dead
LAST = 20  # steps that are looked at for overshooting


def stalled(patient: Patient, outcome: Outcome) -> Diagnosis:
    """Why it did not learn, and what mends it.

    Costs two replays of the trial, one run for each change of the ladder (about thirty, and two more for each of the
    smallest six that converge), about ten further ones where no single change works, and then the experiment of
    `overfit`.
    """
    assert outcome.verdict is not None
    same = same_everywhere(patient.task.train)
    if same:
        return _of_constant_data(same)
    found = _measured(patient, outcome)
    suspected = suspects(found, patient.recipe)
    fixes = _recipe_fixes(patient, suspected[0] if suspected else "")
    mended = any(fix.verdict == Label.CONVERGING for fix in fixes)
    cause = settled(suspected, fixes, patient.recipe)
    related = neighbours_skill(patient.task.train)
    case = _Case(found, fixes, None if mended else overfit(patient), related)
    if case.learnt is not None and not case.learnt.works:
        cause, root = cause_in_code(found.start), Root.CODE
    elif related < SOME and not (mended and _generalizes(patient, fixes[0])):
        cause, root = "unknown", Root.DATA
    else:
        root = Root.RECIPE
    return _diagnosis(patient, outcome.verdict.reason, case, cause, root)


@dataclass(frozen=True)
class _Case:
    """All that was found out.

    Attributes:
        learnt: the experiment with ten rows; None where another recipe converges, which shows as much.
        related: how well the targets follow from the nearest rows.
    """

    found: Findings
    fixes: tuple[Fix, ...]
    learnt: Overfit | None
    related: float


def _of_constant_data(same: str) -> Diagnosis:
    advice = stall_words.INPUTS if same == "inputs" else stall_words.TARGETS
    text = f"all training rows have the same {same}: there is nothing to learn but a constant"
    return Diagnosis(Label.STALLED, Root.DATA, "constant_output", explanation=text, advice=advice)


def _measured(patient: Patient, outcome: Outcome) -> Findings:
    trace = outcome.trace
    arguments = (patient.task, patient.recipe, patient.seed, patient.device, patient.rows)
    with replaying(*arguments) as replay:
        start = _signals(patient, replay)
    with replaying(*arguments) as replay:
        last = min(LAST, trace.steps)
        replay.run(trace.steps - last)
        overshot = replay.overshot(last) / last
        end = _signals(patient, replay)
    assert outcome.verdict is not None
    swell = float(trace.param_norm[-1] / max(trace.param_norm[0], LEAST_NORM))
    return Findings(start, end, overshot, swell, _overflowed(patient, outcome), outcome.verdict.cause)


def _signals(patient: Patient, replay: Replay) -> Signals:
    rows = patient.rows
    x, y = rows.take(some_rows(rows, BATCH).to(rows.index_device))
    return signals(replay.model, replay.task.loss, x, y, patient.device)


def _overflowed(patient: Patient, outcome: Outcome) -> str:
    """Which explosion made a gradient whose square is inf to an adaptive optimizer; empty if none did."""
    trace, recipe = outcome.trace, patient.recipe
    if not overflows(float(np.max(trace.grad_norm)), recipe.optimizer):
        return ""
    step = next(i for i, norm in enumerate(trace.grad_norm, start=1) if overflows(float(norm), recipe.optimizer))
    until = Trace(**{name: getattr(trace, name)[:step] for name in COLUMNS})
    health = Health.of(until, outcome.baseline)
    return explosion(
        "forward", health, recipe.optimizer, recipe.init_scale, recurrent=False, mended_by=frozenset({"init_scale"})
    )


def _recipe_fixes(patient: Patient, suspected: str) -> tuple[Fix, ...]:
    """All changes, those that treat the suspected cause first among equally small ones."""
    recipe, applies = patient.recipe, patient.applies

    def first(changes: list[Remedy]) -> list[Remedy]:
        return sorted(changes, key=lambda change: not helps(suspected, change.values, recipe))

    fixes = patient.remedied(first(remedies.for_stall(recipe, applies, patient.config.trial.steps)))
    if any(fix.works for fix in fixes):
        return fixes
    return tuple(sorted((*patient.remedied(first(remedies.together(recipe, applies))), *fixes), key=remedies.rank))


def _generalizes(patient: Patient, fix: Fix) -> bool:
    """Whether a run that converges is better than a constant on held-out rows, too: else it learned rows by heart."""
    outcome = replace(patient, recipe=patient.recipe.but(**fix.values)).train()
    return bool(outcome.trace.heldout) and min(loss for _, loss in outcome.trace.heldout) < outcome.baseline


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
        "ten_rows": vars(case.learnt) if case.learnt else None,
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
