"""The diagnosis of one trial: train it, find where it goes wrong, ask why by intervention, try what mends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipefuzz.config import Config
from recipefuzz.diagnose import remedies, wording
from recipefuzz.diagnose.causes import OVERFLOW, cause_of
from recipefuzz.diagnose.diagnosis import Diagnosis, Fix, Root
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.patch import Mended
from recipefuzz.diagnose.remedies import Applies, Runner
from recipefuzz.diagnose.replay import Failure, first_failure
from recipefuzz.diagnose.roots import root_of
from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.engines.sequential import SequentialEngine, one_thread, train
from recipefuzz.errors import RAISED, RunFailedError, describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant
from recipefuzz.targets.norms import replace_norms
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task, TensorRows
from recipefuzz.verdict import Budget, Label


@dataclass(frozen=True)
class Patient:
    """A trial to be diagnosed, and what runs others like it.

    Attributes:
        run: trains changed recipes, side by side where that pays.
    """

    config: Config
    task: Task
    recipe: Recipe
    seed: int
    device: torch.device
    run: Runner

    @property
    def budget(self) -> Budget:
        return Budget(self.config.trial.steps, self.config.trial.extend)

    def train(self, task: Task | None = None) -> Outcome:
        """The trial itself to the end of its short budget, in this process; or the same on a changed task.

        Where no constant prediction has a finite loss, skill can't be measured; NaN still shows.
        """
        task = task or self.task
        engine = SequentialEngine(task, self.budget, self.device)
        with one_thread():
            rows = engine.rows_of(self.recipe)
            try:
                constant = Baselines(task, self.device).of(self.recipe)
            except ValueError:
                constant = Constant(float("nan"))
            job = Job(0, self.recipe, self.seed, whole=True)
            return train(task, job, self.budget, self.device, rows, constant)

    @property
    def rows(self) -> Rows:
        """Training rows as the recipe scales them, on the device."""
        return SequentialEngine(self.task, self.budget, self.device).rows_of(self.recipe)[0]

    @property
    def applies(self) -> Applies:
        x, y = self.task.train.take(torch.arange(1))
        targets = isinstance(y, Tensor) and y.is_floating_point() and self.task.loss_kind == "mse"
        return Applies(self._has_norm(), isinstance(x, Tensor) and x.is_floating_point(), targets)

    def _has_norm(self) -> bool:
        if self.task.takes_norm:
            return True
        with seeded(0):
            model = prepare.build_model(self.task, self.recipe.but(norm=None), torch.device("cpu"))
        try:
            return replace_norms(model, "layer") > 0
        except ValueError:
            return False

    def remedied(self, changes: Sequence[remedies.Remedy]) -> tuple[Fix, ...]:
        return remedies.tried(self.recipe, self.seed, changes, self.run)


def diagnose_trial(patient: Patient) -> Diagnosis:
    """Train the trial and explain what became of it.

    Raises:
        RunFailedError: the user's code raised.
    """
    try:
        outcome = patient.train()
    except RAISED as error:
        raise RunFailedError(f"the trial raised {describe_exception(error)}") from error
    assert outcome.verdict is not None
    if outcome.verdict.label is Label.NAN:
        return not_finite(patient, outcome)
    if outcome.verdict.label is Label.STALLED:
        return Diagnosis(outcome.verdict.label, Root.RECIPE, outcome.verdict.cause, explanation=outcome.verdict.reason)
    return Diagnosis(outcome.verdict.label, explanation=outcome.verdict.reason)


def not_finite(patient: Patient, outcome: Outcome) -> Diagnosis:
    """Where the first value that is not finite came from, why, and what mends it."""
    assert outcome.trace.first_bad is not None
    health = Health.of(outcome.trace, outcome.baseline)
    failure = first_failure(
        patient.task,
        patient.recipe,
        patient.seed,
        patient.device,
        patient.rows,
        outcome.trace.first_bad,
        patient.budget.limit,
    )
    if failure is None:
        text = f"not finite at step {outcome.trace.first_bad}, but not when it was run again: the code draws random "
        text += "numbers of its own, or keeps state between runs"
        return Diagnosis(Label.NAN, Root.CODE, "unknown", step=outcome.trace.first_bad, explanation=text)
    return _explained(patient, failure, health)


def _explained(patient: Patient, failure: Failure, health: Health) -> Diagnosis:
    cause = cause_of(failure.origin)
    fixes: tuple[Fix, ...] = ()
    mended: bool | None = None
    if cause == OVERFLOW:
        fixes = _recipe_fixes(patient)
        working = frozenset(axis for f in fixes if f.verdict == Label.CONVERGING and len(f.values) == 1 for axis in f.values)
        phase = failure.origin.event.spot.phase if failure.origin.event else "forward"
        recipe = patient.recipe
        cause = explosion(
            phase, health, recipe.optimizer, recipe.init_scale, recurrent=failure.recurrent, mended_by=working
        )
    elif cause == "data_nonfinite":
        mended = _without_bad_rows(patient)
    elif failure.origin.event is not None:
        mended = _with_line_mended(patient, failure)
        if not (mended or health.sound) or patient.recipe.precision != "fp32":
            fixes = _recipe_fixes(patient)
    remedied = any(f.verdict == Label.CONVERGING for f in fixes)
    root = root_of(cause, health, mended=mended, remedied=remedied, in_half=patient.recipe.precision != "fp32")
    return _diagnosis(patient, failure, health, cause, root, mended, fixes if root is Root.RECIPE else ())


def _recipe_fixes(patient: Patient) -> tuple[Fix, ...]:
    applies = patient.applies
    steps = patient.config.trial.steps
    fixes = patient.remedied(remedies.for_failure(patient.recipe, applies, steps))
    if any(f.works for f in fixes):
        return fixes
    return (*patient.remedied(remedies.together(patient.recipe, applies)), *fixes)


def _without_bad_rows(patient: Patient) -> bool | None:
    """Whether the same recipe trains on the rows that are finite."""
    rows = patient.task.train
    if not isinstance(rows, TensorRows):
        return None
    good = torch.tensor([True] * len(rows))
    for side in (rows.x, rows.y):
        if side.is_floating_point():
            good &= torch.isfinite(side).reshape(len(side), -1).all(dim=1)
    if not good.any():
        return False
    return _converges(patient, replace(patient.task, train=TensorRows(rows.x[good], rows.y[good])))


def _with_line_mended(patient: Patient, failure: Failure) -> bool | None:
    """Whether the same recipe trains with the producing line's operation kept off its singular point."""
    event = failure.origin.event
    assert event is not None
    if not event.spot.file:
        return None
    with Mended(event.spot.file, event.spot.line) as mended:
        converges = _converges(patient, patient.task)
    return converges if mended.used else None


def _converges(patient: Patient, task: Task) -> bool:
    try:
        outcome = patient.train(task)
    except RAISED:
        return False
    return outcome.verdict is not None and outcome.verdict.label is Label.CONVERGING


def _diagnosis(
    patient: Patient,
    failure: Failure,
    health: Health,
    cause: str,
    root: Root,
    mended: bool | None,
    fixes: tuple[Fix, ...],
) -> Diagnosis:
    origin = failure.origin
    event = origin.event
    spot = event.spot if event else None
    data = cause == "data_nonfinite"
    operation = (event.forward.op if event.forward else event.spot.op) if event else ""
    return Diagnosis(
        Label.NAN,
        root,
        cause,
        phase="data" if data else spot.phase if spot else "forward",
        op=operation,
        module=spot.module if spot else "",
        file=spot.file if spot else "",
        line=spot.line if spot else 0,
        step=failure.step,
        explanation=f"{wording.happened(origin, cause, failure.step, failure.symptom, failure.rows)}; "
        f"{wording.health_words(health)}",
        evidence={**vars(health), "symptom": failure.symptom, "mended": mended},
        chain=tuple(wording.place(e) for e in origin.chain),
        advice=wording.ADVICE.get(cause, "") if root is not Root.RECIPE else "",
        fixes=fixes,
    )
