"""Rows that hold values that are not finite: do they do harm? Decided by experiment, at the initial weights.

A label that is NaN may be one that the loss leaves out, and an input that is -inf one that the model masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.engines import prepare
from recipefuzz.engines.sequential import with_own_loss
from recipefuzz.errors import RAISED
from recipefuzz.recipe import Recipe
from recipefuzz.targets.non_finite import NonFinite
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task, some_rows

CPU = torch.device("cpu")
BATCH = 64  # rows, at most: enough to tell
SEARCHED = 1024  # rows among which healthy ones are looked for


def harmful_rows(task: Task, recipe: Recipe, seed: int) -> NonFinite | None:
    """The first of the task's findings whose rows make a step, or an evaluation, of the recipe not finite.

    Such rows are at most half of a batch; the others are healthy. Only where the healthy ones alone make a finite
    step is it the rows that are to blame, and not the model or the loss. Raises nothing: code that fails on
    healthy rows, too, proves nothing about the others.
    """
    recipe = recipe.but(init_scale=1.0)  # the question is about the rows: no overflow is to answer it
    for finding in task.non_finite:
        try:
            with seeded(seed):
                harmful = _is_harmful(finding, task, recipe, seed)
        except RAISED:  # data that can't be scaled or read
            continue
        if harmful:
            return finding
    return None


def _is_harmful(finding: NonFinite, task: Task, recipe: Recipe, seed: int) -> bool:
    """Whether a batch with the finding's rows is not finite, and one without is."""
    train, test = prepare.rows_for(task, recipe)
    rows, passes = (train, _trains) if finding.name.endswith("_train") else (test, _evaluates)

    def is_finite(x: Any, y: Any) -> bool:
        return _runs_finite(passes, task, recipe, seed, x, y)

    size = min(recipe.batch_size, BATCH)
    bad = torch.tensor(finding.rows)[: max(1, size // 2)]
    healthy = _healthy(rows, size)
    batch = rows.take(torch.cat([bad, healthy[: size - len(bad)]]))
    if is_finite(*batch):
        return False
    return is_finite(*(rows.take(healthy) if len(healthy) else map(_filled, batch)))


def _healthy(rows: Rows, most: int) -> Tensor:
    """Indices of rows that are finite."""
    index = some_rows(rows, SEARCHED)
    finite = torch.ones(len(index), dtype=torch.bool)
    for values in rows.take(index):
        if isinstance(values, Tensor):
            finite &= values.isfinite().reshape(len(index), -1).all(1).cpu()
    return index[finite][:most]


def _filled(values: Any) -> Any:
    """Where no row is healthy: the same batch with zeros in place of what is not finite."""
    return values.nan_to_num(0.0, 0.0, 0.0) if isinstance(values, Tensor) else values


def _runs_finite(passes: Callable[..., bool], task: Task, recipe: Recipe, seed: int, x: Any, y: Any) -> bool:
    """Whether a batch passes through a fresh model; one that raises (as a check of its inputs may) does not."""
    try:
        with seeded(seed):
            return passes(with_own_loss(task, CPU), prepare.build_model(task, recipe, CPU), x, y)
    except RAISED:
        return False


def _trains(task: Task, model: nn.Module, x: Any, y: Any) -> bool:
    """Whether the loss and all gradients are finite."""
    loss = task.loss(model(x), y)
    gradients = torch.autograd.grad(loss, prepare.trainable(model), allow_unused=True)
    return all(bool(t.isfinite().all()) for t in (loss, *gradients) if t is not None)


def _evaluates(task: Task, model: nn.Module, x: Any, y: Any) -> bool:
    with torch.no_grad():
        return bool(task.loss(model.eval()(x), y).isfinite().all())
