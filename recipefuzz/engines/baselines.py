"""The zero of skill for each recipe, found once for all recipes that share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipefuzz.engines import prepare
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant, best_constant
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task, some_rows


class Baselines:
    """Best constant predictions for a task's training targets, by the recipe's scaling of them.

    A user's loss may depend on the batch size and is minimized over outputs shaped like the model's, so there
    a model is built and called, apart from every trial, for each setting of the factory's own axes.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._outputs: dict[tuple[Any, ...], Any] = {}
        self._known: dict[tuple[Any, ...], Constant] = {}

    def of(self, recipe: Recipe) -> Constant:
        """The constant for a recipe, on the device.

        Raises:
            ValueError: a user's loss gives no finite value for any constant output.
        """
        output: Any = None
        key: tuple[Any, ...] = (recipe.target_norm,)
        if self._task.loss_kind == "custom":
            output = self._output(recipe)
            key = (recipe.target_norm, recipe.batch_size, getattr(output, "shape", None))
        if key not in self._known:
            with seeded(0):
                train_rows, _ = prepare.rows_for(self._task, recipe)
                self._known[key] = best_constant(self._task, train_rows, recipe.batch_size, output).to(self._device)
        return self._known[key]

    def _output(self, recipe: Recipe) -> Any:
        """What the model gives for a batch; of a tensor only shape and type, without its memory."""
        key = (recipe.extra, recipe.batch_size)
        if key not in self._outputs:
            rows = self._task.train
            with seeded(0), torch.no_grad():
                model = prepare.build_model(self._task, recipe, torch.device("cpu")).eval()
                output = model(rows.take(some_rows(rows, recipe.batch_size))[0])
            self._outputs[key] = output.new_zeros(()).expand(output.shape) if isinstance(output, Tensor) else output
        return self._outputs[key]
