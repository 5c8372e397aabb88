"""The zero of skill for each recipe, found once for all recipes that share it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.engines import prepare
from recipefuzz.errors import RAISED
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant, Outputs, best_constant
from recipefuzz.targets.constraint import equality, interval
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task, some_rows

OTHER_WEIGHTS = -100.0  # times the initial ones: what stays in an interval under both is made to, more likely than not


class Baselines:
    """Best constant predictions for a task's training targets, by the recipe's scaling of them.

    A user's loss may depend on the batch size and is minimized over outputs shaped like the model's, so there
    a model is built and called, apart from every trial, for each setting of the factory's own axes.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._outputs: dict[tuple[Any, ...], Outputs] = {}
        self._known: dict[tuple[Any, ...], Constant] = {}

    def of(self, recipe: Recipe) -> Constant:
        """The constant for a recipe, on the device.

        Raises:
            NoBaselineError: a user's loss gives no finite value for any constant output, or has no lower bound.
        """
        outputs = Outputs(None)
        key: tuple[Any, ...] = (recipe.target_norm,)
        if self._task.loss_kind == "custom":
            outputs = self._outputs_of(recipe)
            shape = getattr(outputs.like, "shape", None)
            key = (recipe.target_norm, recipe.batch_size, shape, outputs.equality, outputs.interval)
        if key not in self._known:
            with seeded(0):
                train_rows, _ = prepare.rows_for(self._task, recipe)
                self._known[key] = best_constant(self._task, train_rows, recipe.batch_size, outputs).to(self._device)
        return self._known[key]

    def _outputs_of(self, recipe: Recipe) -> Outputs:
        """What the model gives for a batch; of a tensor only what is to be known, without its memory.

        It must not depend on which recipe came first, so all that the key leaves out is the default's.
        """
        key = (recipe.extra, recipe.batch_size, recipe.norm)
        if key not in self._outputs:
            rows = self._task.train
            with seeded(0), torch.no_grad():
                model = prepare.build_model(self._task, recipe.but(init_scale=1.0), torch.device("cpu")).eval()
                x = rows.take(some_rows(rows, recipe.batch_size))[0]
                self._outputs[key] = _known_of(model, x)
        return self._outputs[key]


def _known_of(model: nn.Module, x: Any) -> Outputs:
    first = model(x)
    if not isinstance(first, Tensor) or not first.is_floating_point() or not first.numel():
        return Outputs(first)
    outputs = [first]
    for parameter in model.parameters():
        parameter.mul_(OTHER_WEIGHTS)
    with contextlib.suppress(*RAISED):  # these may be no weights that the model can have
        outputs.append(model(x))
    like = first.new_zeros(()).expand(first.shape)
    return Outputs(like, equality(first), interval(outputs))
