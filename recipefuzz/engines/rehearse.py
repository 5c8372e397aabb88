"""One step of the default recipe before the search starts: what is wrong with the user's code is said once, at once.

Before it, whether values of the data that are not finite do harm; after it, a forward pass with each other choice of
the axes whose choices can fail by themselves.
"""

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
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.errors import PACKAGE, RAISED, InputError, Place, RecipefuzzError, did_you_mean, user_traceback
from recipefuzz.recipe import AXES, Recipe
from recipefuzz.space import Choice
from recipefuzz.targets.fit import check_output
from recipefuzz.targets.imported import missing_arguments
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task, some_rows

T = TypeVar("T")
CPU = torch.device("cpu")
ROWS = 64  # of a batch, at most: enough to run the code
# A choice of one of these that fails, fails in every trial. The factory's own axes may fail in some combinations.
TRIED = ("norm", "input_norm", "target_norm", "precision")
NO_TENSOR = {float: "return the tensor, not .item()", type(None): "is a `return` missing?"}
SCALING_FIX = "leave it at none: only numbers can be scaled, and token ids and class labels are names"


def rehearse(task: Task, config: Config, recipe: Recipe | None = None) -> float:
    """Try a step and find the recipe's baseline, which is returned. By default the default recipe.

    Raises:
        InputError: as `try_step`; rows whose values are not finite and do harm; a loss that has no baseline; without
            a `recipe`, also a choice of the space that raises.
    """
    chosen = recipe or config.default_recipe()
    if finding := harmful_rows(task, chosen, config.trial.seed):
        raise finding.error(config.source.place("target", "data"))
    try_step(task, config, chosen)
    if recipe is None:
        _try_choices(task, config, chosen)
    what = "finding the best constant prediction"
    return _guarded(lambda: Baselines(task, CPU).of(chosen).loss, config, "target.loss", what)


def try_step(task: Task, config: Config, recipe: Recipe) -> None:
    """Build, forward, loss, backward on the CPU. Nothing need be finite, nor have a baseline.

    Raises:
        InputError: an axis that nothing takes, a model or loss that raises or gives something else than
            a tensor and a scalar, a model that is not fresh, labels outside the model's classes, no parameters
            to train.
    """
    _check_axes(task, config, recipe)
    with seeded(config.trial.seed):
        train, test = _guarded(lambda: _scaled_rows(task, config, recipe), config, "target.data", "scaling the data")
        model = _fresh_model(task, config, recipe)
        x, y = train.take(some_rows(train, min(recipe.batch_size, ROWS)))
        output = _guarded(lambda: model(x), config, "target.model", f"the model, given x of shape {_shape(x)},")
        check_output(task, output, y, *(config.source.place("target", key) for key in ("model", "loss")))
        what = f"the loss, given output of shape {_shape(output)} and target of shape {_shape(y)},"
        loss = _guarded(lambda: task.loss(output, y), config, "target.loss", what)
        _check_loss(loss, config)
        _guarded(lambda: loss.backward(), config, "target.loss", "the backward pass")
        _evaluate(task, config, model, test)


def _fresh_model(task: Task, config: Config, recipe: Recipe) -> nn.Module:
    """The recipe's model. A second one of the same seed must be equal, and must share nothing with it."""

    def built() -> nn.Module:
        with seeded(config.trial.seed):
            return prepare.build_model(task, recipe, CPU)

    model, again = (_guarded(built, config, "target.model", "building the model") for _ in range(2))
    _check_model(model, config)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    storages = {p.untyped_storage().data_ptr() for p in first.values()} - {0}  # 0: no memory, as of empty parameters
    shared = [n for n, p in second.items() if p.untyped_storage().data_ptr() in storages]
    if shared or first.keys() != second.keys() or not all(_equal(p, second[n]) for n, p in first.items()):
        seed = f"differ in two calls with the seed {config.trial.seed}"
        raise InputError(
            f"{config.target.model}() must return a fresh model that depends on nothing but the seed",
            place=config.source.place("target", "model"),
            found=f"two calls return the same parameter {shared[0]}" if shared else f"the initial parameters {seed}",
            expected="a new model from each call: a trial would go on with the weights of the one before",
            fix="make the layers inside the factory, and draw numbers from the generators of torch, numpy or random",
        )
    return model


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _try_choices(task: Task, config: Config, recipe: Recipe) -> None:
    """Forward pass and loss of the recipe with each other choice of the tried axes, one at a time."""
    for axis in TRIED:
        choices = dict(config.axes.axes).get(axis)
        for index, value in enumerate(choices.options if isinstance(choices, Choice) else ()):
            if value == recipe.values()[axis]:
                continue
            try:
                with seeded(config.trial.seed), torch.no_grad():
                    _forward(task, recipe.but(**{axis: value}))
            except RAISED as error:
                if not _is_lack_of_cpu(error):
                    raise _refused(error, axis, value, config.source.place("space", axis, index)) from error


def _forward(task: Task, recipe: Recipe) -> None:
    train, _ = prepare.rows_for(task, recipe)
    model = prepare.build_model(task, recipe, CPU)
    x, y = train.take(some_rows(train, min(recipe.batch_size, ROWS)))
    with prepare.autocast(recipe, CPU):
        task.loss(model(x), y)


def _is_lack_of_cpu(error: BaseException) -> bool:
    """Whether the CPU lacks an operation in half precision: a GPU may have it."""
    return "not implemented for 'Half'" in str(error) or "not implemented for 'BFloat16'" in str(error)


def _refused(error: BaseException, axis: str, value: object, place: Place) -> InputError:
    named = f"{axis} = {value!r}"
    fix = SCALING_FIX if axis in ("input_norm", "target_norm") else f"leave {value!r} out of the axis, or mend the code"
    if isinstance(error, RecipefuzzError) or (isinstance(error, ValueError) and _is_ours(error)):
        problem = str(error).removeprefix(f"{axis}: ")
        return InputError(problem if problem.startswith(named) else f"{named}: {problem}", place=place, fix=fix)
    problem = f"{named}: the default recipe with this value raised {type(error).__name__}"
    return InputError(problem, place=place, fix=fix, detail=user_traceback(error))


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
        fix = missing_arguments(error, "model_args") if key == "target.model" else ""
        raise InputError(problem, place=place, fix=fix, detail=user_traceback(error)) from error


def _evaluate(task: Task, config: Config, model: nn.Module, test: Rows) -> None:
    """One held-out batch: its rows may have another shape than the training set's."""
    x, y = test.take(some_rows(test, ROWS))
    what = f"an evaluation, given the test set's x of shape {_shape(x)} and y of shape {_shape(y)},"
    with torch.no_grad():
        _guarded(lambda: task.loss(model.eval()(x), y), config, "target.data", what)


def _scaled_rows(task: Task, config: Config, recipe: Recipe) -> tuple[Rows, Rows]:
    try:
        return prepare.rows_for(task, recipe)
    except ValueError as error:
        axis, _, problem = str(error).partition(": ")
        if axis not in AXES or not _is_ours(error):  # not of the scaling: a row that is no pair, say
            raise
        raise InputError(problem, place=_axis_place(config, axis), fix=SCALING_FIX) from error


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


def _check_loss(loss: Any, config: Config) -> None:
    place = config.source.place("target", "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 1:
        raise InputError(
            "the loss is not scalar",
            place=place,
            found=_shape(loss),
            expected="one number per batch",
            fix=NO_TENSOR.get(type(loss), "end it with .mean()"),
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
