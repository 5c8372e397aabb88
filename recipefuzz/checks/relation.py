"""Whether the targets follow from the inputs: shuffled labels can be learned by heart, and help on no other row."""

from __future__ import annotations

import math

from recipefuzz.diagnose.held_out import follows
from recipefuzz.diagnose.patient import Patient
from recipefuzz.evidence import best_heldout_skill
from recipefuzz.finding import Finding, Level
from recipefuzz.verdict import SHOWN

NAME = "relation"
CLEAR = 4.0  # standard errors: the best of three learners reaches it by chance in one data set of some thousands


def check(patient: Patient) -> list[Finding]:
    """Ask simple learners first; where they find nothing, the model itself, by one trial."""
    found = follows(patient.task.train)
    if found >= CLEAR:
        seen = f"targets follow from inputs: simple learners beat chance by {found:.0f} standard errors on other rows"
        return [Finding(NAME, Level.PASS, seen, evidence={"standard_errors": found})]
    outcome = patient.train()
    skill = best_heldout_skill(outcome.trace, outcome.baseline)
    evidence = {"standard_errors": found, "heldout_skill": skill}
    if skill >= SHOWN:
        seen = f"the model predicts held-out rows with skill {skill:.2f}; simple learners find no relation"
        return [Finding(NAME, Level.PASS, seen, evidence=evidence)]
    if math.isnan(found):
        seen = "not asked: rows are few, or their inputs or targets are not one tensor"
        return [Finding(NAME, Level.PASS, seen, evidence=evidence)]
    what = "the model's default recipe" + ("" if math.isnan(skill) else f" (held-out skill {skill:.2f})")
    seen = (
        "labels can be learned by heart at best: they don't follow from the inputs, as far as simple learners "
        f"({found:.1f} standard errors above chance) and {what} can tell"
    )
    return [Finding(NAME, Level.WARN, seen, "look whether inputs and targets are in the same order", evidence=evidence)]
