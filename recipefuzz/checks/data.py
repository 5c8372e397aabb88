"""The data: values that are not finite, columns that say nothing, scales, labels, rows in both sets."""

from __future__ import annotations

from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.finding import Finding, Level

NAME = "data"


def check(patient: Patient) -> list[Finding]:
    """Look at inputs and targets of both sets."""
    harmful = harmful_rows(patient.task, patient.recipe, patient.seed)
    if harmful:
        return [Finding(NAME, Level.FAIL, f"{harmful}: {harmful.found}", "drop or fill those rows in load()")]
    return [Finding(NAME, Level.PASS, f"{len(patient.task.train)} training rows, {len(patient.task.test)} held-out")]
