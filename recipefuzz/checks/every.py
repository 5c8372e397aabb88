"""All checks in the order in which they are made: what a later one rests on comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recipefuzz.checks import (
    batch_independence,
    data,
    determinism,
    gradients,
    initial_loss,
    input_dependence,
    loss_curves,
    overfit,
    parameters,
    reference,
    relation,
)
from recipefuzz.diagnose.patient import Patient
from recipefuzz.errors import RAISED, describe_exception
from recipefuzz.finding import Finding, Level


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        run: looks at a study's default recipe, which is a `Patient` like any trial.
        cheap: costs less than a second on a small model: a search makes it first.
    """

    name: str
    run: Callable[[Patient], list[Finding]]
    cheap: bool = False


CHECKS = (
    Check(data.NAME, data.check, cheap=True),
    Check(initial_loss.NAME, initial_loss.check, cheap=True),
    # not cheap: its optimizer steps import torch's compiler, which takes longer than they
    Check(parameters.NAME, parameters.check),
    Check(batch_independence.NAME, batch_independence.check, cheap=True),
    Check(gradients.NAME, gradients.check),
    Check(reference.NAME, reference.check),
    Check(determinism.NAME, determinism.check),
    Check(overfit.NAME, overfit.check),
    Check(relation.NAME, relation.check),
    Check(input_dependence.NAME, input_dependence.check),
    Check(loss_curves.NAME, loss_curves.check),
)


def findings(patient: Patient, *, cheap: bool = False, also: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Of all checks, or of the cheap ones, one after the other. A check that raises is a finding, too.

    Args:
        also: names of checks that are made whether they are cheap or not.
    """
    for check in CHECKS:
        if cheap and not check.cheap and check.name not in also:
            continue
        try:
            yield from check.run(patient)
        except RAISED as error:
            seen = f"it could not be made: {describe_exception(error)}"
            yield Finding(check.name, Level.WARN, seen, "look at that line: the user's code raised in a check")
