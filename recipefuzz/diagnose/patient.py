"""A trial under diagnosis, and the means to run it and others like it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from recipefuzz.config import Config
from recipefuzz.diagnose import remedies
from recipefuzz.diagnose.remedies import Applies, Remedy, Runner
from recipefuzz.diagnose.replay import Replay, replaying
from recipefuzz.diagnosis import Fix
from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.engines.sequential import Look, SequentialEngine, one_thread, train
from recipefuzz.errors import RAISED
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant, NoBaselineError
from recipefuzz.targets.norms import replace_norms
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task
from recipefuzz.verdict import Budget, Label


@dataclass(frozen=True)
class Patient:
    """A trial to be diagnosed, and what runs others like it.

    Attributes:
        run: trains changed recipes, side by side where that pays.
        say: hears what is being done.
    """

    config: Config
    task: Task
    recipe: Recipe
    seed: int
    device: torch.device
    run: Runner
    say: Callable[[str], None] = field(default=lambda _: None)

    @property
    def budget(self) -> Budget:
        return Budget(self.config.trial.steps, self.config.trial.extend)

    def train(self, look: Look | None = None) -> Outcome:
        """The trial itself to the end of its short budget, in this process.

        Where no constant prediction has a finite loss, skill can't be measured; NaN still shows.

        Args:
            look: is shown the model at every checkpoint.
        """
        with one_thread():
            try:
                constant = Baselines(self.task, self.device).of(self.recipe)
            except NoBaselineError as error:
                self.say(f"skill can't be measured: {error}")
                constant = Constant(float("nan"))
            job = Job(0, self.recipe, self.seed, whole=True)
            return train(self.task, job, self.budget, self.device, self._scaled, constant, look)

    def replaying(self) -> AbstractContextManager[Replay]:
        """The trial at its start, to be made step by step."""
        return replaying(self.task, self.recipe, self.seed, self.device, self.rows)

    @cached_property
    def _scaled(self) -> tuple[Rows, Rows]:
        return SequentialEngine(self.task, self.budget, self.device).rows_of(self.recipe)

    @property
    def rows(self) -> Rows:
        """Training rows as the recipe scales them, on the device."""
        return self._scaled[0]

    @property
    def heldout_rows(self) -> Rows:
        return self._scaled[1]

    @cached_property
    def applies(self) -> Applies:
        x, y = self.task.train.take(torch.arange(1))
        targets = isinstance(y, Tensor) and y.is_floating_point() and self.task.loss_kind in ("mse", "custom")
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

    def converges(self, task: Task) -> bool:
        """Whether the same recipe does on a changed task."""
        try:
            outcome = replace(self, task=task).train()
        except RAISED:
            return False
        return outcome.verdict is not None and outcome.verdict.label is Label.CONVERGING

    def fails(self, recipes: Sequence[Recipe]) -> list[bool]:
        """Whether each of some recipes does not converge with the trial's seed; one that can't be run tells nothing."""
        jobs = [Job(i, recipe, self.seed, whole=True) for i, recipe in enumerate(recipes)]
        labels = {o.job.key: o.verdict.label for o in self.run(jobs) if o.verdict is not None}
        return [labels.get(i, Label.CONVERGING) is not Label.CONVERGING for i in range(len(recipes))]

    def remedied(
        self, changes: Sequence[Remedy], expected: Callable[[Remedy], bool] = lambda _: False
    ) -> tuple[Fix, ...]:
        """What becomes of changes of the recipe, as in `remedies.tried`."""
        self.say(f"running {len(changes)} changes of the recipe, and those that converge on further seeds")
        return remedies.tried(self.recipe, self.seed, changes, self.run, expected)
