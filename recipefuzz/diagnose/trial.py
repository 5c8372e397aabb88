"""The diagnosis of one trial: train it, find where it goes wrong, ask why by intervention, try what mends it."""

from __future__ import annotations

import math

from recipefuzz.diagnose.hazards import hazard_of
from recipefuzz.diagnose.nonfinite import ahead, not_finite, of_data
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.stalls import stalled
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.errors import RAISED, RunFailedError, describe_exception
from recipefuzz.verdict import Label


def diagnose_trial(patient: Patient) -> Diagnosis:
    """Train the trial and explain what became of it; data that break every trial are named without.

    Raises:
        RunFailedError: the user's code raised, or its loss has no zero that skill could count from.
    """
    if finding := harmful_rows(patient.task, patient.recipe, patient.seed):
        return of_data(patient, finding)
    try:
        outcome = patient.train()
    except RAISED as error:
        raise RunFailedError(f"the trial raised {describe_exception(error)}") from error
    assert outcome.verdict is not None
    if outcome.verdict.label is Label.NAN:
        return not_finite(patient, outcome)
    if math.isnan(outcome.baseline):
        raise RunFailedError("the trial stays finite, but can't be judged: no constant prediction has a finite loss")
    if outcome.verdict.label is Label.STALLED:
        return stalled(patient, outcome)
    hazard = hazard_of(patient)
    return ahead(hazard, outcome) if hazard else Diagnosis(outcome.verdict.label, explanation=outcome.verdict.reason)
