"""Can the code learn at all? A handful of rows, by heart.

A model of working code learns ten rows by heart, whatever they hold, under one learning rate or another. One that
can't has something between its rows, its output and its loss that no recipe mends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines.job import Job
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.evidence import skill_at_end
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.targets.task import TensorRows, some_rows
from recipefuzz.verdict import Budget

ROWS = 10
LEARNED = 0.9  # skill from which the rows count as known by heart: a tenth of what a constant leaves open
RATES = (1e-3, 1e-2, 1e-4, 1e-1)  # of Adam, likeliest first
STEPS = 300


@dataclass(frozen=True)
class Overfit:
    """What became of the experiment.

    Attributes:
        skill: the best at the end of a run, against the best constant for these rows; NaN if none was finite.
        lr: Adam's, of that run.
        runs: that were made: it ends with the first that learns the rows.
    """

    skill: float
    lr: float
    runs: int

    @property
    def works(self) -> bool:
        return self.skill >= LEARNED


def overfit(patient: Patient) -> Overfit:
    """Train on ten rows with Adam at several rates and the model's own initial weights, scaled data and not.

    Costs at most eight runs of 300 steps on batches of no more than 32 rows, in this process.
    """
    rows = patient.task.train
    x, y = rows.take(some_rows(rows, ROWS).to(rows.index_device))
    few = TensorRows(x, y)
    engine = SequentialEngine(replace(patient.task, train=few, test=few), Budget(STEPS, 0), patient.device)
    best = Overfit(float("nan"), RATES[0], 0)
    for runs, recipe in enumerate(_recipes(patient), start=1):
        outcome = engine.train(Job(0, recipe, patient.seed, whole=True))
        skill = skill_at_end(outcome.trace, outcome.baseline)
        best = Overfit(skill, recipe.lr, runs) if not best.skill >= skill else replace(best, runs=runs)
        if best.works:
            break
    return best


def _recipes(patient: Patient) -> list[Recipe]:
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
