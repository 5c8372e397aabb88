"""One step of the default recipe before the search starts: what is wrong with the user's code is said once, at once."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recipefuzz.config import Config
from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.errors import PACKAGE, RAISED, InputError, Place, RecipefuzzError, did_you_mean, user_traceback
from recipefuzz.recipe import AXES, Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task, TensorRows, some_rows

T = TypeVar("T")
IGNORED = -100  # torch's ignore_index: a position that has no label


def rehearse(task: Task, config: Config, recipe: Recipe | None = None) -> float:
    """Build, forward, loss, backward on the CPU; the recipe's baseline. By default the default recipe.

    Raises:
        InputError: an axis that nothing takes, a model or loss that raises or gives something else than
            a tensor and a scalar, labels outside the model's classes, no parameters to train.
    """
    recipe = recipe or config.default_recipe()
    _check_axes(task, config, recipe)
    cpu = torch.device("cpu")
    with seeded(config.trial.seed):
        train, test = _guarded(lambda: _scaled_rows(task, config, recipe), config, "target.data", "scaling the data")
        model = _guarded(lambda: prepare.build_model(task, recipe, cpu), config, "target.model", "building the model")
        _check_model(model, config)
        x, y = train.take(some_rows(train, min(recipe.batch_size, 64)))
        output = _guarded(lambda: model(x), config, "target.model", f"the model, given x of shape {_shape(x)},")
        if task.loss_kind == "cross_entropy":
            _check_labels(task, output, config)
        what = f"the loss, given output of shape {_shape(output)} and target of shape {_shape(y)},"
        loss = _guarded(lambda: task.loss(output, y), config, "target.loss", what)
        _check_loss(loss, config)
        _guarded(lambda: loss.backward(), config, "target.loss", "the backward pass")
        _evaluate(task, config, model, test)
    return _guarded(
        lambda: Baselines(task, cpu).of(recipe).loss,
        config,
        "target.loss",
        "finding the best constant prediction",
    )


def _guarded(call: Callable[[], T], config: Config, key: str, what: str) -> T:
    """Run the user's code; what it raises is their traceback, at the key that names the code."""
    place = config.source.place(*key.split("."))
    try:
        return call()
    except RecipefuzzError:
        raise
    except ValueError as error:
        if _is_ours(error):
            raise InputError(str(error), place=place) from error
        raise InputError(f"{what} raised ValueError", place=place, detail=user_traceback(error)) from error
    except RAISED as error:
        problem = f"{what} raised {type(error).__name__}"
        raise InputError(problem, place=place, detail=user_traceback(error)) from error


def _evaluate(task: Task, config: Config, model: nn.Module, test: Rows) -> None:
    """One held-out batch: its rows may have another shape than the training set's."""
    x, y = test.take(some_rows(test, 64))
    what = f"an evaluation, given the test set's x of shape {_shape(x)} and y of shape {_shape(y)},"
    with torch.no_grad():
        _guarded(lambda: task.loss(model.eval()(x), y), config, "target.data", what)


def _scaled_rows(task: Task, config: Config, recipe: Recipe) -> tuple[Rows, Rows]:
    try:
        return prepare.rows_for(task, recipe)
    except ValueError as error:
        if not _is_ours(error):
            raise
        axis, _, problem = str(error).partition(": ")
        fix = "leave it at none: only numbers can be scaled, and token ids and class labels are names"
        raise InputError(problem, place=_axis_place(config, axis), fix=fix) from error


def _axis_place(config: Config, axis: str) -> Place:
    return config.source.place("recipe" if axis in config.recipe else "space", axis)


def _is_ours(error: BaseException) -> bool:
    """Whether the exception was raised by recipefuzz itself: its message is then all there is to say."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _check_axes(task: Task, config: Config, recipe: Recipe) -> None:
    """Every axis beyond the known ones must be an argument of the model factory."""
    for name, _ in recipe.extra:
        if task.takes is not None and name not in task.takes:
            known = sorted({*AXES, *task.takes})
            raise InputError(
                f"nothing takes the axis {name!r}",
                place=_axis_place(config, name),
                expected=f"an axis of recipefuzz, or an argument of the model factory {config.target.model}"
                f" ({', '.join(sorted(task.takes)) or 'it takes none'})",
                fix=did_you_mean(name, known),
            )
        if name in config.target.model_args:
            problem = f"{name} is an axis and stands in target.model_args"
            raise InputError(problem, place=_axis_place(config, name), fix="keep one of them")


def _check_model(model: nn.Module, config: Config) -> None:
    place = config.source.place("target", "model")
    if not prepare.trainable(model):
        expected = "parameters with requires_grad"
        raise InputError("the model has no parameters to train", place=place, found=model, expected=expected)


def _check_labels(task: Task, output: Any, config: Config) -> None:
    """Labels outside the classes kill a GPU with a device-side assertion: found here, with the row."""
    place = config.source.place("target", "model")
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise InputError(
            "cross_entropy needs logits",
            place=place,
            found=f"output {_shape(output)}",
            expected="(batch, classes, ...)",
        )
    for rows, name in ((task.train, "y_train"), (task.test, "y_test")):
        index = some_rows(rows, len(rows) if isinstance(rows, TensorRows) else 10_000)
        y = rows.y if isinstance(rows, TensorRows) else rows.take(index)[1]
        if not isinstance(y, Tensor) or y.is_floating_point():
            continue
        classes = output.shape[-1] if output.shape[1:-1] == y.shape[1:] else output.shape[1]
        wrong = ((y < 0) & (y != IGNORED)) | (y >= classes)
        if bool(wrong.any()):
            row = int(index[wrong.nonzero()[0][0]])
            raise InputError(
                f"a label outside the model's {classes} classes",
                place=place,
                found=f"{name}: label {int(y[wrong][0])} in row {row}; {int(wrong.sum())} such labels",
                expected=f"labels from 0 to {classes - 1}",
                fix=f"give the model {int(y.max()) + 1} outputs, or renumber the labels from 0",
            )


def _check_loss(loss: Any, config: Config) -> None:
    place = config.source.place("target", "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 1:
        raise InputError(
            "the loss is not scalar",
            place=place,
            found=_shape(loss),
            expected="one number per batch",
            fix="end it with .mean()",
        )
    if not loss.requires_grad:
        raise InputError(
            "the loss does not depend on the model's parameters",
            place=place,
            expected="a differentiable loss",
            fix="look for .detach(), .item() or torch.no_grad() between model and loss",
        )


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
