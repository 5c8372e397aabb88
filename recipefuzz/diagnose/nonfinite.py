"""A trial that went NaN: the operation it began with, the cause, the root, and what mends it."""

from __future__ import annotations

from dataclasses import replace

import torch

from recipefuzz.diagnose import remedies, wording
from recipefuzz.diagnose.causes import OVERFLOW, cause_of
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.patch import Mended
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.replay import Failure, first_failure
from recipefuzz.diagnose.roots import root_of, sound_before
from recipefuzz.diagnosis import Diagnosis, Fix, Root
from recipefuzz.engines.job import Outcome
from recipefuzz.targets.non_finite import NonFinite
from recipefuzz.targets.task import Task, only
from recipefuzz.verdict import Label


def of_data(patient: Patient, finding: NonFinite) -> Diagnosis:
    """Rows that break any recipe, found before training."""
    trains = finding.name.endswith("_train")
    side = patient.task.train if trains else patient.task.test
    text = f"{finding}: {finding.found}"
    if trains and patient.converges(_without_bad_rows(patient.task)):
        text += f"; {wording.MENDED[True]}"
    return Diagnosis(
        Label.NAN if trains else "",
        Root.DATA,
        "data_nonfinite",
        phase="data",
        explanation=text,
        evidence={"name": finding.name, "rows": finding.rows, "column": finding.column, "count": finding.count},
        advice=wording.ADVICE_OF_ALL_ROWS if finding.total_rows == len(side) > 1 else wording.ADVICE["data_nonfinite"],
    )


def not_finite(patient: Patient, outcome: Outcome) -> Diagnosis:
    """Where the first value that is not finite came from, why, and what mends it."""
    assert outcome.trace.first_bad is not None
    health = Health.of(outcome.trace, outcome.baseline)
    patient.say(
        f"not finite at step {outcome.trace.first_bad}: replaying up to there, with that step's operations watched"
    )
    failure = first_failure(patient.replaying, outcome.trace.first_bad, patient.budget.limit)
    if failure is None:
        text = f"not finite at step {outcome.trace.first_bad}, but not when it was run again: the code draws random "
        text += "numbers of its own, or keeps state between runs"
        return Diagnosis(Label.NAN, Root.CODE, "unknown", step=outcome.trace.first_bad, explanation=text)
    return _explained(patient, failure, health)


def ahead(failure: Failure, outcome: Outcome) -> Diagnosis:
    """A trial that converges, and a batch of the user's own epochs that would break it, or the held-out loss."""
    cause = cause_of(failure.origin)
    health = Health.of(outcome.trace, outcome.baseline)
    root = Root.DATA if cause == "data_nonfinite" else Root.CODE
    found = diagnosis_of(failure, health, cause if cause != OVERFLOW else "exploding_activations", root, None, ())
    rows = len(failure.rows)
    batch = f"an epoch over all rows meets a batch of {rows} {'row' if rows == 1 else 'rows'} that"
    text = f"the trial itself converges, but {batch if rows else 'in eval mode the held-out loss'} is not finite: "
    return replace(found, verdict=Label.CONVERGING, explanation=text + found.explanation)


def _explained(patient: Patient, failure: Failure, health: Health) -> Diagnosis:
    cause = cause_of(failure.origin)
    fixes: tuple[Fix, ...] = ()
    mended: bool | None = None
    if cause == OVERFLOW:
        fixes = _recipe_fixes(patient)
        working = remedies.working_alone(fixes)
        phase = failure.origin.event.spot.phase if failure.origin.event else "forward"
        recipe = patient.recipe
        cause = explosion(
            phase, health, recipe.optimizer, recipe.init_scale, recurrent=failure.recurrent, mended_by=working
        )
    elif failure.origin.outside in ("x", "y"):
        mended = patient.converges(_without_bad_rows(patient.task))
    elif failure.origin.event is not None:
        mended = _with_line_mended(patient, failure)
        if not (mended or sound_before(cause, health)) or health.exploded or patient.recipe.precision != "fp32":
            fixes = _recipe_fixes(patient)
    remedied = any(f.verdict == Label.CONVERGING or (health.exploded and f.verdict != Label.NAN) for f in fixes)
    root = root_of(cause, health, mended=mended, remedied=remedied, in_half=patient.recipe.precision != "fp32")
    return diagnosis_of(failure, health, cause, root, mended, fixes if root is Root.RECIPE else ())


def _recipe_fixes(patient: Patient) -> tuple[Fix, ...]:
    applies = patient.applies
    steps = patient.config.trial.steps
    fixes = patient.remedied(remedies.for_failure(patient.recipe, applies, steps))
    if any(f.works for f in fixes):
        return remedies.barely_last(fixes)
    return (*remedies.barely_last(patient.remedied(remedies.together(patient.recipe, applies))), *fixes)


def _without_bad_rows(task: Task) -> Task:
    """The task with those training rows alone that are finite."""
    good = torch.ones(len(task.train), dtype=torch.bool)
    good[sorted(task.bad_rows)] = False
    return replace(task, train=only(task.train, good.nonzero()[:, 0]))


def _with_line_mended(patient: Patient, failure: Failure) -> bool | None:
    """Whether the same recipe trains with the producing line's operation kept off its singular point."""
    event = failure.origin.event
    assert event is not None
    if not event.spot.file:
        return None
    with Mended(event.spot.file, event.spot.line) as mended:
        converges = patient.converges(patient.task)
    return converges if mended.used else None


def diagnosis_of(
    failure: Failure,
    health: Health,
    cause: str,
    root: Root,
    mended: bool | None = None,
    fixes: tuple[Fix, ...] = (),
) -> Diagnosis:
    """A failure in words."""
    origin = failure.origin
    event = origin.place
    spot = event.spot if event else None
    unread = spot is not None and spot.phase == "optimizer"  # weights that only their update was seen to read
    data = cause == "data_nonfinite" and (unread or not origin.is_models)
    operation = (event.forward.op if event.forward else event.spot.op) if event else ""
    return Diagnosis(
        Label.NAN,
        root,
        cause,
        phase="data" if data else spot.phase if spot else "forward",
        op=operation,
        module=spot.module if spot else "",
        file=spot.file if spot else "",
        line=spot.line if spot else 0,
        step=failure.step,
        explanation="; ".join(
            [
                wording.happened(failure, cause),
                wording.health_words(health),
                *([wording.MENDED[cause == "data_nonfinite"]] if mended else []),
                *([f"then the code raised {failure.raised}"] if failure.raised else []),
            ]
        ),
        evidence={**vars(health), "symptom": failure.symptom, "mended": mended},
        chain=tuple(wording.place(e) for e in origin.chain),
        advice=wording.advice(cause, origin) if root is not Root.RECIPE else "",
        fixes=fixes,
    )
