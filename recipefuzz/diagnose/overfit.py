"""Can the code learn at all? A handful of rows, by heart.

A model of working code learns ten rows by heart, whatever they hold, under one learning rate or another. One that
can't has something between its rows, its output and its loss that no recipe mends.

All ten rows are a batch, so that nothing but the rate decides. Recipes are tried for a third of the steps first, and
the whole length goes to the most promising before the others (as in successive halving: Jamieson & Talwalkar, AISTATS
2016), first among the two likeliest rates. None is left out: the answer "it can't" rests on all of them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import varied
from recipefuzz.diagnose.remedies import Remedy
from recipefuzz.diagnose.replay import Replay
from recipefuzz.engines.baselines import Baselines
from recipefuzz.errors import RAISED
from recipefuzz.evidence import below
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.targets.task import Rows, Task, only
from recipefuzz.verdict import SOME

ROWS = 10
BY_HEART = 0.9  # skill: a tenth of what a constant leaves open
HALF_WAY = 0.5  # where the least loss need not be 0: label smoothing, soft targets
ANY = SOME  # of a user's own loss, whose least value isn't known: that of a VAE is far above 0
RATES = (1e-3, 1e-2, 1e-4, 1e-1)  # of Adam, likeliest first
STEPS = 300
LIKELY = 2  # rates that nearly all models learn with
TRIED = 3  # part of the steps that all recipes get first: one third
EVERY = 10  # steps from one look at all rows to the next


@dataclass(frozen=True)
class Overfit:
    """What became of the experiment.

    Attributes:
        skill: the best at the end of a run, in training or in eval mode, against the best constant for these rows; NaN
            if none was finite.
        goal: skill from which the rows count as known by heart.
        recipe: of that run.
        runs: recipes that were tried.
        steps: of that run, which ends when it knows the rows.
        curve: of that run's loss, at every tenth step, in training mode.
        recited: what the model gave at its end, and the targets, both as the recipe scales them; None without a run.
        decided: whether there was time for all that the answer rests on.
    """

    skill: float
    goal: float
    recipe: Recipe
    runs: int
    steps: int = 0
    curve: tuple[float, ...] = ()
    recited: tuple[Any, Any] | None = None
    decided: bool = True

    @property
    def works(self) -> bool:
        return self.skill >= self.goal

    def remedy(self, trial: Recipe) -> Remedy:
        """The step from a trial to this recipe, batches left as they were."""
        mine, its = self.recipe.values(), trial.values()
        return Remedy({k: v for k, v in mine.items() if v != its[k] and k != "batch_size"}, 1)


def overfit(patient: Patient, seconds: float = math.inf) -> Overfit:
    """Train on ten rows with Adam at several rates and the model's own initial weights, scaled data and not.

    Costs at most eight runs of 400 steps on ten rows, in this process.

    Args:
        seconds: of computing, not of waiting for other processes, after which no answer is better than a late one.
    """
    task, until = _on_few_rows(patient.task), time.process_time() + seconds
    baselines, goal = Baselines(task, patient.device), _goal(patient.task, _all(task.train)[1])
    best = Overfit(math.nan, goal, patient.recipe, 0)
    recipes = gentle_recipes(patient)
    likely = [recipe for recipe in recipes if recipe.lr in RATES[:LIKELY]]
    for part in (likely, [recipe for recipe in recipes if recipe not in likely]):
        skills = dict.fromkeys(part, 0.0)
        for steps in (STEPS // TRIED, STEPS):
            for recipe in sorted(part, key=lambda r: -skills[r]):  # stable: as they are, at first
                run = _learned(replace(patient, task=task, recipe=recipe), baselines, steps, until)
                best = _better(best, run, new=steps < STEPS)
                if best.works and (best.skill >= BY_HEART or steps == STEPS):  # a low goal is not all there is
                    return best
                if time.process_time() > until:
                    return replace(best, decided=best.works)
                skills[recipe] = -math.inf if run is None else run.skill
    return best


def _better(best: Overfit, run: Overfit | None, *, new: bool) -> Overfit:
    """The one or the other, with one more recipe counted if it is new."""
    chosen = best if run is None or run.skill <= best.skill else run
    return replace(chosen, goal=best.goal, runs=best.runs + new)


def _learned(patient: Patient, baselines: Baselines, steps: int, until: float) -> Overfit | None:
    """One run, up to where it knows the rows; None where it can't be made, or does not stay finite."""
    skills: list[float] = []
    curve: list[float] = []
    output: Any = None
    try:
        baseline = baselines.of(patient.recipe).loss
        with patient.replaying() as replay:
            x, y = _all(patient.rows)
            for _ in range(steps // EVERY):
                _stretch(replay, patient.rows)
                losses, outputs = _looked_at(replay, x, y)
                curve.append(losses[0])
                loss, output = min(zip(losses, outputs, strict=True), key=lambda one: (math.isnan(one[0]), one[0]))
                skills.append(below(baseline, loss, baseline))
                if not math.isfinite(loss) or min(skills[-2:]) >= BY_HEART or time.process_time() > until:
                    break
    except RAISED:
        return None
    if not skills or not math.isfinite(skills[-1]):
        return None
    skill = min(skills[-2:])  # of two looks: weights bounce
    return Overfit(skill, BY_HEART, patient.recipe, 1, EVERY * len(skills), tuple(curve), (output, y))


def _stretch(replay: Replay, rows: Rows) -> None:
    """Some steps on all rows, or, where a batch holds fewer, on all in turn."""
    batches = torch.arange(len(rows), device=rows.index_device).split(replay.recipe.batch_size)
    for step in range(EVERY):
        replay.stepper.step(*rows.take(batches[step % len(batches)]))
    replay.stepper.recorder.take()


def _looked_at(replay: Replay, x: Any, y: Any) -> tuple[list[float], list[Any]]:
    """Losses and outputs in training and in eval mode: dropout keeps the one high, short running means the other."""
    with torch.no_grad():
        outputs = [replay.model.train(mode)(x) for mode in (True, False)]
        losses = [float(replay.task.loss(output, y)) for output in outputs]
    replay.model.train()
    return losses, outputs


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
        batch_size=min(patient.recipe.batch_size, ROWS),
    )
    applies = patient.applies
    scaling: dict[str, Scalar] = {}
    if applies.inputs:
        scaling["input_norm"] = "standardize"
    if applies.targets:
        scaling["target_norm"] = "standardize"
    scaled = [plain, plain.but(**scaling)] if scaling else [plain]
    return [recipe.but(lr=lr) for recipe in scaled for lr in RATES]
