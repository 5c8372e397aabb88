"""Ten rows by heart: what sound code learns under one recipe or another, shown as a curve and as a table."""

from __future__ import annotations

import math

from recipefuzz.checks.recital import recital
from recipefuzz.diagnose.overfit import BY_HEART, Overfit, overfit
from recipefuzz.diagnose.patient import Patient
from recipefuzz.finding import Finding, Level
from recipefuzz.report.picture import sparkline
from recipefuzz.result import CURVE_POINTS

NAME = "overfit"
SECONDS = 10.0  # of computing, that the check may take: where they are not enough, nothing is claimed
SCALED = ("input_norm", "target_norm")


def check(patient: Patient) -> list[Finding]:
    """Learn ten rows under up to eight recipes; recite them."""
    found = overfit(patient, SECONDS)
    lines: tuple[str, ...] = ()
    if found.recited:
        lines = (_curve(found), *recital(*found.recited, patient.task.loss_kind))
    evidence = {
        "skill": found.skill,
        "goal": found.goal,
        "runs": found.runs,
        "lr": found.recipe.lr,
        "steps": found.steps,
        "decided": found.decided,
        "cause": "" if found.works or not found.decided else "cannot_overfit",
    }
    if found.works:
        known = (
            "" if found.skill >= BY_HEART else f", where {found.goal:g} is enough for a loss whose least isn't known"
        )
        seen = f"ten rows are learned in {found.steps} steps (skill {found.skill:.2f}{known}; {_recipe(found)})"
        return [Finding(NAME, Level.PASS, seen, lines=lines, evidence=evidence)]
    best = "no run was finite" if math.isnan(found.skill) else f"best skill {found.skill:.2f} of {found.goal:g}"
    if not found.decided:
        seen = f"not decided in {SECONDS:g} s of computing: {best} after {found.runs} recipes ({_recipe(found)})"
        return [Finding(NAME, Level.PASS, seen, lines=lines, evidence=evidence)]
    seen = f"ten rows can't be learned by heart under any of {found.runs} recipes ({best}; {_recipe(found)})"
    todo = "suspect the code or the labels, not the recipe: what lies between rows, output and loss (cannot_overfit)"
    return [Finding(NAME, Level.FAIL, seen, todo, lines, evidence)]


def _recipe(found: Overfit) -> str:
    scaled = [f"{axis} {value}" for axis in SCALED if (value := found.recipe.values()[axis]) != "none"]
    return ", ".join([f"adam, lr {found.recipe.lr:g}", *scaled])


def _curve(found: Overfit) -> str:
    return f"loss {found.curve[0]:.3g} {sparkline(found.curve, CURVE_POINTS)} {found.curve[-1]:.3g}"
