"""The loss of the untrained model is what chance predicts; far off, its output has the wrong scale or form.

Chance is an output of zeros (ln of the classes for cross-entropy) or the best constant, whichever is worse: an
untrained model knows neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from recipefuzz.checks import loss_form
from recipefuzz.checks.untrained import Untrained, as_tensor, untrained
from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines.baselines import Baselines
from recipefuzz.errors import RAISED
from recipefuzz.finding import Finding, Level
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.targets.baseline import NoBaselineError

NAME = "initial loss"
FAR = 2.0  # times chance: as much above it as there is to be learned below it
FAR_SQUARED = 4.0  # the same in the unit of the output, where the loss is a square or a user's own
OFFSET = 10.0  # times the variance: with targets three standard deviations from zero, a first phase learns their mean


def check(patient: Patient) -> list[Finding]:
    """Compare the loss on some training rows with chance; look at what the loss makes of the output."""
    with untrained(patient) as seen:
        x, y = seen.batch()
        output = seen.output(x)
        loss = seen.loss(output, y)
        if not math.isfinite(loss):
            todo = "`recipefuzz diagnose` names the operation; see the data's own line first"
            return [_finding(Level.FAIL, f"{loss} before the first step", todo, loss, math.nan)]
        wrong = list(loss_form.wrong_forms(seen, x, y, output))
        if wrong:
            return [Finding(NAME, Level.FAIL, text, todo, evidence={"loss": loss}) for text, todo in wrong]
        constant, chance = _chance(patient, seen, output, y)
    return list(_compared(patient, loss, constant, chance))


def _chance(patient: Patient, seen: Untrained, output: Any, y: Any) -> tuple[float, float]:
    """Loss of the best constant, and of chance; NaN where there is none."""
    try:
        constant = Baselines(patient.task, patient.device).of(patient.recipe).loss
    except NoBaselineError:
        return math.nan, math.nan
    numbers = as_tensor(output)
    zeros = constant
    # of a user's loss only where zero lies among the outputs: probabilities have no such zero
    if numbers is not None and (patient.task.loss_kind != "custom" or float(numbers.min()) < 0 < float(numbers.max())):
        zeros = seen.loss(torch.zeros_like(numbers), y)
    return constant, max(constant, zeros) if math.isfinite(zeros) else constant


def _compared(patient: Patient, loss: float, constant: float, chance: float) -> Iterator[Finding]:
    if not chance > 0:  # a density's logarithm may have any sign: factors mean nothing
        what = (
            f"the best constant reaches {constant:.4g}" if not math.isnan(constant) else "no constant is the best one"
        )
        yield _finding(Level.PASS, f"{loss:.4g}; {what}", "", loss, chance)
        return
    words = f"{loss:.4g} before the first step, {chance:.4g} by chance{_named(patient, chance)}"
    factor = loss / chance
    if factor > far(patient.task.loss_kind):
        yield _finding(Level.WARN, f"{words}: {factor:.3g} times that", _mend(patient), loss, chance)
    elif loss < min(constant, chance) / FAR:
        todo = "look whether the inputs hold the targets, and whether the loss averages over what it should"
        yield _finding(Level.WARN, f"{words}: the untrained model knows the answers", todo, loss, chance)
    elif patient.task.loss_kind == "mse" and chance > OFFSET * constant:
        seen = f"{words}, of which the targets' distance from zero is all but {constant:.4g}"
        yield _finding(Level.WARN, seen, "recipe: {target_norm: standardize}", loss, chance)
    else:
        yield _finding(Level.PASS, words, "", loss, chance)


def far(loss_kind: str) -> float:
    """How many times chance is far off."""
    return FAR if loss_kind in ("cross_entropy", "bce") else FAR_SQUARED


def _named(patient: Patient, chance: float) -> str:
    if patient.task.loss_kind == "bce":
        return " (ln 2)"
    return (
        f" (ln {math.exp(chance):.3g})" if patient.task.loss_kind == "cross_entropy" and chance < math.log(1e6) else ""
    )


def _mend(patient: Patient) -> str:
    """The first change of the recipe that brings the loss near chance: tried, on the untrained model."""
    recipe, applies = patient.recipe, patient.applies
    changes: list[dict[str, Scalar]] = []
    if applies.inputs and recipe.input_norm == "none":
        changes.append({"input_norm": "standardize"})
    if recipe.init_scale != 1:
        changes.append({"init_scale": 1.0})
    for change in changes:
        if _is_near(patient, recipe.but(**change)):
            shown = ", ".join(f"{k}: {v}" for k, v in change.items())
            return f"recipe: {{{shown}}}: with it, the initial loss is near chance"
    return "the output is too large: give the last layer smaller initial weights, or lower init_scale"


def _is_near(patient: Patient, recipe: Recipe) -> bool:
    try:
        with untrained(patient, recipe) as seen:
            x, y = seen.batch()
            output = seen.output(x)
            chance = _chance(patient, seen, output, y)[1]
            return seen.loss(output, y) <= far(patient.task.loss_kind) * chance
    except RAISED:
        return False


def _finding(level: Level, seen: str, todo: str, loss: float, chance: float) -> Finding:
    return Finding(NAME, level, seen, todo, evidence={"loss": loss, "chance": chance})
