"""Can the code learn at all? A handful of rows, by heart.

A model of working code learns ten rows by heart, whatever they hold, under one learning rate or another. One that
can't has something between its rows, its output and its loss that no recipe mends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import varied
from recipefuzz.diagnose.remedies import Remedy
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.evidence import below, skill_at_end
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.result import CURVE_POINTS
from recipefuzz.targets.task import Rows, Task, only
from recipefuzz.verdict import SOME, Budget

ROWS = 10
BY_HEART = 0.9  # skill: a tenth of what a constant leaves open
HALF_WAY = 0.5  # where the least loss need not be 0: label smoothing, soft targets
ANY = SOME  # of a user's own loss, whose least value isn't known: that of a VAE is far above 0
RATES = (1e-3, 1e-2, 1e-4, 1e-1)  # of Adam, likeliest first
STEPS = 300


@dataclass(frozen=True)
class Overfit:
    """What became of the experiment.

    Attributes:
        skill: the best at the end of a run, in training or in eval mode, against the best constant for these rows; NaN
            if none was finite.
        goal: skill from which the rows count as known by heart.
        recipe: of that run.
        runs: that were made: it ends with the first that learns the rows.
        curve: of that run's loss, in 32 stretches.
    """

    skill: float
    goal: float
    recipe: Recipe
    runs: int
    curve: tuple[float, ...] = ()

    @property
    def works(self) -> bool:
        return self.skill >= self.goal

    def remedy(self, trial: Recipe) -> Remedy:
        """The step from a trial to this recipe, batches left as they were."""
        mine, its = self.recipe.values(), trial.values()
        return Remedy({k: v for k, v in mine.items() if v != its[k] and k != "batch_size"}, 1)


def overfit(patient: Patient) -> Overfit:
    """Train on ten rows with Adam at several rates and the model's own initial weights, scaled data and not.

    Costs at most eight runs of 300 steps on batches of no more than 32 rows, in this process.
    """
    task = _on_few_rows(patient.task)
    y = _all(task.train)[1]
    engine = SequentialEngine(task, Budget(STEPS, 0), patient.device)
    best = Overfit(math.nan, _goal(patient.task, y), patient.recipe, 0)
    for runs, recipe in enumerate(gentle_recipes(patient), start=1):
        outcome = engine.train(Job(0, recipe, patient.seed, whole=True))
        skill, curve = _skill(outcome), tuple(outcome.trace.curve(CURVE_POINTS))
        better = best
        if skill > best.skill or math.isnan(best.skill):
            better = replace(best, skill=skill, recipe=recipe, curve=curve)
        best = replace(better, runs=runs)
        if best.works:
            break
    return best


def recited(patient: Patient, found: Overfit) -> tuple[Any, Any]:
    """What the model gives for the rows at the end of the best run, and their targets; both as the recipe scales them.

    In training or in eval mode, as the loss is lower. Costs that run once more.
    """
    patient = replace(patient, task=_on_few_rows(patient.task), recipe=found.recipe)
    x, y = _all(patient.rows)
    with patient.replaying() as replay, torch.no_grad():
        with torch.enable_grad():
            replay.run(STEPS)
        outputs = [replay.model.train(mode)(x) for mode in (True, False)]
        losses = [float(replay.task.loss(output, y)) for output in outputs]
        return outputs[0 if losses[0] < losses[1] else 1], y


def _on_few_rows(task: Task) -> Task:
    few = only(task.train, varied(task.train, ROWS).to(task.train.index_device))
    return replace(task, train=few, test=few)


def _all(rows: Rows) -> tuple[Any, Any]:
    return rows.take(torch.arange(len(rows), device=rows.index_device))


def _goal(task: Task, y: Any) -> float:
    hard = isinstance(y, Tensor) and (not y.is_floating_point() or bool(((y == 0) | (y == 1)).all()))
    if task.loss_kind == "custom":
        return ANY
    return BY_HEART if task.loss_kind == "mse" or hard else HALF_WAY


def _skill(outcome: Outcome) -> float:
    """At the end, in training or in eval mode: dropout keeps the one from 1, short running means the other."""
    skill = skill_at_end(outcome.trace, outcome.baseline)
    if not outcome.trace.heldout or math.isnan(skill):
        return skill
    return max(skill, below(outcome.baseline, outcome.trace.heldout[-1][1], outcome.baseline))


def gentle_recipes(patient: Patient) -> list[Recipe]:
    """The trial's recipe with what keeps a sound model from learning a few rows left out, likeliest first."""
    plain = patient.recipe.but(
        optimizer="adam",
        init_scale=1.0,
        clip_norm=None,
        clip_value=None,
        weight_decay=None,
        warmup_steps=0,
        precision="fp32",
        batch_size=min(patient.recipe.batch_size, 32),
    )
    applies = patient.applies
    scaling: dict[str, Scalar] = {}
    if applies.inputs:
        scaling["input_norm"] = "standardize"
    if applies.targets:
        scaling["target_norm"] = "standardize"
    scaled = [plain, plain.but(**scaling)] if scaling else [plain]
    return [recipe.but(lr=lr) for recipe in scaled for lr in RATES]
