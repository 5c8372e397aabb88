"""The diagnosis of one trial: train it, find where it goes wrong, ask why by intervention, try what mends it."""

from __future__ import annotations

import math

import numpy as np

from recipefuzz.diagnose.hazards import broken_evaluation, hazard_of
from recipefuzz.diagnose.nonfinite import ahead, not_finite, of_data
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.stalls import stalled
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.errors import RAISED, RunFailedError, describe_exception
from recipefuzz.evidence import median
from recipefuzz.targets.baseline import NoBaselineError, UnboundedLossError
from recipefuzz.trace import Floats
from recipefuzz.verdict import Label

UNBOUNDED = "look for a missing minus sign, or a loss of logits where it wants probabilities (nll_loss: log_softmax)"
SLOWED = 0.9  # of its fall before; raw logits under an nll_loss keep 0.94 or more, whatever the net and the optimizer
UNJUDGED = "not judged"  # in the place of a verdict


def diagnose_trial(patient: Patient) -> Diagnosis:
    """Train the trial and explain what became of it; data that break every trial are named without.

    Raises:
        RunFailedError: the user's code raised.
    """
    if finding := harmful_rows(patient.task, patient.recipe, patient.seed):
        return of_data(patient, finding)
    patient.say("training the trial to the end of its budget")
    try:
        outcome = patient.train()
    except RAISED as error:
        raise RunFailedError(f"the trial raised {describe_exception(error)}") from error
    assert outcome.verdict is not None
    if outcome.verdict.label is Label.NAN:
        return not_finite(patient, outcome)
    if math.isnan(outcome.baseline):
        return _of_no_skill(patient, outcome.trace.loss)
    if outcome.verdict.label is Label.STALLED:
        return stalled(patient, outcome)
    hazard = hazard_of(patient) or broken_evaluation(patient, outcome.trace)
    return ahead(hazard, outcome) if hazard else Diagnosis(outcome.verdict.label, explanation=outcome.verdict.reason)


def _of_no_skill(patient: Patient, losses: Floats) -> Diagnosis:
    """A trial that stays finite under a loss that has no zero of skill.

    Where that is for want of a minimum, it is the code, if training finds none either. The likelihood of a flow or of a
    CRF has no minimum over constants, which no model of it can give, but it levels off.
    """
    try:
        Baselines(patient.task, patient.device).of(patient.recipe)
    except NoBaselineError as error:
        unbounded = isinstance(error, UnboundedLossError) and not levels_off(losses)
        text = f"the trial stays finite, but can't be judged: {error}"
        root, cause, advice = (Root.CODE, "unknown", UNBOUNDED) if unbounded else ("", "", "")
        return Diagnosis(UNJUDGED, root, cause, explanation=text, advice=advice)
    raise AssertionError("a loss with a minimum has a zero of skill")


def levels_off(losses: Floats) -> bool:
    """Whether a loss falls slower in the end than at first: one without a minimum falls ever faster, or steadily.

    By medians over a tenth of the run, at its begin, middle and end, so that the draw of a batch counts little.
    """
    span = max(1, len(losses) // 10)
    first, middle, last = (median(losses[i : i + span]) for i in ((len(losses) - span) * np.arange(3) // 2))
    return middle - last < SLOWED * (first - middle)
