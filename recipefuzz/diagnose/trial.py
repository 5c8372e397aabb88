"""The diagnosis of one trial: train it, find where it goes wrong, ask why by intervention, try what mends it."""

from __future__ import annotations

from recipefuzz.diagnose.diagnosis import Diagnosis
from recipefuzz.diagnose.nonfinite import not_finite
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.stalls import stalled
from recipefuzz.errors import RAISED, RunFailedError, describe_exception
from recipefuzz.verdict import Label


def diagnose_trial(patient: Patient) -> Diagnosis:
    """Train the trial and explain what became of it.

    Raises:
        RunFailedError: the user's code raised.
    """
    try:
        outcome = patient.train()
    except RAISED as error:
        raise RunFailedError(f"the trial raised {describe_exception(error)}") from error
    assert outcome.verdict is not None
    if outcome.verdict.label is Label.NAN:
        return not_finite(patient, outcome)
    if outcome.verdict.label is Label.STALLED:
        return stalled(patient, outcome)
    return Diagnosis(outcome.verdict.label, explanation=outcome.verdict.reason)
