"""The diagnosis of one trial: train it, find where it goes wrong, ask why by intervention, try what mends it."""

from __future__ import annotations

import math

from recipefuzz.diagnose.hazards import hazard_of
from recipefuzz.diagnose.nonfinite import ahead, not_finite, of_data
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.stalls import stalled
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.errors import RAISED, RunFailedError, describe_exception
from recipefuzz.verdict import Label

UNBOUNDED = "look for a missing minus sign, or a loss of logits where it wants probabilities (nll_loss: log_softmax)"


def diagnose_trial(patient: Patient) -> Diagnosis:
    """Train the trial and explain what became of it; data that break every trial are named without.

    Raises:
        RunFailedError: the user's code raised.
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
        text = "the trial stays finite, but can't be judged: over constant predictions the loss has no finite minimum"
        return Diagnosis("", Root.CODE, "unknown", explanation=text, advice=UNBOUNDED)
    if outcome.verdict.label is Label.STALLED:
        return stalled(patient, outcome)
    hazard = hazard_of(patient)
    return ahead(hazard, outcome) if hazard else Diagnosis(outcome.verdict.label, explanation=outcome.verdict.reason)
