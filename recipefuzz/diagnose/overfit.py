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
from recipefuzz.targets.task import Task, only
from recipefuzz.verdict import Budget

ROWS = 10
BY_HEART = 0.9  # skill: a tenth of what a constant leaves open
HALF_WAY = 0.5  # where the least loss need not be 0: label smoothing, soft targets, a user's own loss with a penalty
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
    """

    skill: float
    goal: float
    recipe: Recipe
    runs: int

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
    rows = patient.task.train
    index = varied(rows, ROWS).to(rows.index_device)
    few = only(rows, index)
    y = few.take(torch.arange(len(index), device=rows.index_device))[1]
    engine = SequentialEngine(replace(patient.task, train=few, test=few), Budget(STEPS, 0), patient.device)
    best = Overfit(math.nan, _goal(patient.task, y), patient.recipe, 0)
    for runs, recipe in enumerate(gentle_recipes(patient), start=1):
        skill = _skill(engine.train(Job(0, recipe, patient.seed, whole=True)))
        better = replace(best, skill=skill, recipe=recipe) if not best.skill >= skill else best
        best = replace(better, runs=runs)
        if best.works:
            break
    return best


def _goal(task: Task, y: Any) -> float:
    hard = isinstance(y, Tensor) and (not y.is_floating_point() or bool(((y == 0) | (y == 1)).all()))
    return BY_HEART if task.loss_kind == "mse" or (task.loss_kind != "custom" and hard) else HALF_WAY


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
