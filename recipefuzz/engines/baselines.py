"""The zero of skill for each recipe, found once for all recipes that share it."""

from __future__ import annotations

import torch

from recipefuzz.engines import prepare
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant, best_constant
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task, some_rows


class Baselines:
    """Best constant predictions for a task's training targets, by the recipe's scaling of them.

    A user's loss may depend on the batch size and is minimized over outputs shaped like the model's, so there
    a model is built and called once, apart from every trial.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._known: dict[tuple[str, int], Constant] = {}

    def of(self, recipe: Recipe) -> Constant:
        """The constant for a recipe, on the device.

        Raises:
            ValueError: a user's loss gives no finite value for any constant output.
        """
        custom = self._task.loss_kind == "custom"
        key = (recipe.target_norm, recipe.batch_size if custom else 0)
        if key not in self._known:
            self._known[key] = self._find(recipe, custom).to(self._device)
        return self._known[key]

    def _find(self, recipe: Recipe, custom: bool) -> Constant:
        cpu = torch.device("cpu")
        with seeded(0):
            train_rows, _ = prepare.rows_for(self._task, recipe)
            output = None
            if custom:
                model = prepare.build_model(self._task, recipe, cpu).eval()
                with torch.no_grad():
                    output = model(train_rows.take(some_rows(train_rows, recipe.batch_size))[0])
            return best_constant(self._task, train_rows, recipe.batch_size, output)
