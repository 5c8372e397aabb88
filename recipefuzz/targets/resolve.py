"""The `target:` section of a config -> a Task: data loaded and checked, model factory and loss found."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.config import Config
from recipefuzz.errors import RAISED, InputError, Place, RecipefuzzError, did_you_mean, user_traceback
from recipefuzz.targets.builtin.data import DATA
from recipefuzz.targets.builtin.models import MODELS
from recipefuzz.targets.imported import files_under, keyword_names, load_callable, missing_arguments
from recipefuzz.targets.losses import LOSSES, cross_entropy_last
from recipefuzz.targets.non_finite import NonFinite
from recipefuzz.targets.rows import as_rows, non_finite
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Loss, Rows, Task, read, read_targets, some_rows


def resolve(config: Config) -> Task:
    """Load what the config's target names.

    Raises:
        InputError: a name or an import path that leads nowhere, data that can't be trained on, a loss
            that does not fit them. The model is not built yet: see `engines.rehearse`, which also tells whether
            values that are not finite do harm.
    """
    train, test = _load(config)
    bad = _non_finite(config, train, "train") + _non_finite(config, test, "test")
    loss_kind = config.target.loss if config.target.loss in LOSSES else "custom"
    x, y = train.take(some_rows(train, 2))
    place = config.source.place("target", "data")
    if loss_kind != "custom" and isinstance(y, Tensor):
        with _reading("train", place):
            _check_targets(read_targets(train), loss_kind, place)
    per_position = _per_position(x, y, loss_kind)
    factory = _factory(config, train, y, per_position, x)
    _check_arguments(factory, config.target.model, config, "model_args")
    build = functools.partial(factory, **config.target.model_args)
    takes = keyword_names(build)
    return Task(
        train=train,
        test=test,
        build=build,
        loss=_loss(config, per_position),
        loss_kind=loss_kind,
        takes_norm=_takes_norm(build),
        takes=takes,
        non_finite=bad,
    )


def user_files(config: Config) -> list[Path]:
    """The user's own source files: a changed file makes other trials.

    The modules that the target names and, once it is resolved, those beside the config that they imported.
    """
    files = []
    for path in (config.target.data, config.target.model, config.target.loss):
        module = path.partition(":")[0].replace(".", "/")
        candidates = [config.folder / f"{module}.py", config.folder / module / "__init__.py"]
        files += [c for c in candidates if ":" in path and c.is_file()]
    return sorted({*files, *files_under(config.folder)})


def _load(config: Config) -> tuple[Rows, Rows]:
    place = config.source.place("target", "data")
    loader = _named(config.target.data, DATA, "data set", config.folder, place)
    _check_arguments(loader, config.target.data, config, "data_args")
    try:
        with seeded(0):
            loaded = loader(**config.target.data_args)
    except RecipefuzzError:
        raise
    except RAISED as error:
        problem = f"loading {config.target.data} raised {type(error).__name__}"
        fix = missing_arguments(error, "data_args")
        raise InputError(problem, place=place, fix=fix, detail=user_traceback(error)) from error
    return as_rows(loaded, place)


def _non_finite(config: Config, rows: Rows, name: str) -> tuple[NonFinite, ...]:
    with _reading(name, config.source.place("target", "data")):
        return non_finite(rows, name)


@contextlib.contextmanager
def _reading(name: str, place: Place) -> Iterator[None]:
    """Rows of a Dataset are the user's code, too."""
    try:
        yield
    except RecipefuzzError:
        raise
    except RAISED as error:
        problem = f"reading the {name} Dataset raised {type(error).__name__}"
        raise InputError(problem, place=place, detail=user_traceback(error)) from error


def _check_arguments(function: Callable[..., Any], name: str, config: Config, section: str) -> None:
    takes = keyword_names(function)
    for argument in getattr(config.target, section):
        if takes is not None and argument not in takes:
            raise InputError(
                f"{name} takes no argument {argument!r}",
                place=config.source.place("target", section, argument),
                expected=", ".join(sorted(takes)) or "no arguments",
                fix=did_you_mean(argument, takes) if takes else "",
            )


def _named(name: str, registry: dict[str, Any], kind: str, folder: Path, place: Place) -> Callable[..., Any]:
    if ":" in name:
        return load_callable(name, folder, place)
    if name not in registry:
        raise InputError(
            f"no built-in {kind} of that name",
            place=place,
            found=name,
            expected=f"{', '.join(registry)}, or an import path such as my_code:name",
            fix=f"did you mean {':'.join(name.rsplit('.', 1))!r}?" if "." in name else did_you_mean(name, registry),
        )
    return registry[name]  # type: ignore[no-any-return]


def _factory(config: Config, train: Rows, y: Any, per_position: bool, x: Any) -> Callable[..., nn.Module]:
    place = config.source.place("target", "model")
    factory = _named(config.target.model, MODELS, "model", config.folder, place)
    if ":" in config.target.model:
        return factory
    if not isinstance(x, Tensor):
        raise InputError("a built-in model takes one tensor", place=place, found=type(x))
    outputs = _outputs(train, y, config.target.loss, per_position)
    return functools.partial(factory, x, outputs, vocab=_vocabulary(train, x), per_position=per_position)


def _vocabulary(train: Rows, x: Tensor) -> int | None:
    return None if x.is_floating_point() else max(int(part.max()) for _, part, _ in read(train)) + 1


def _outputs(train: Rows, y: Tensor, loss: str, per_position: bool) -> int:
    """Units of the model's last layer: classes for labels, columns for numbers."""
    if not y.is_floating_point() and loss != "bce":
        return int(read_targets(train).max()) + 1
    return y.shape[-1] if y.dim() > 1 and not per_position else 1


def _per_position(x: Any, y: Any, loss_kind: str) -> bool:
    """Whether every position of a sequence has a target of its own: x (N, T, ...), integer y (N, T)."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or loss_kind in ("mse", "bce"):
        return False
    return x.dim() >= 2 and y.dim() == 2 and y.shape[1] == x.shape[1] and not y.is_floating_point()


def _loss(config: Config, per_position: bool) -> Loss:
    name = config.target.loss
    if name == "cross_entropy" and per_position and config.target.model in MODELS:
        return cross_entropy_last
    place = config.source.place("target", "loss")
    loss = _named(name, dict(LOSSES), "loss", config.folder, place)
    if not inspect.isclass(loss):
        return loss
    if not issubclass(loss, nn.Module):
        raise InputError("a class that is no torch.nn.Module", place=place, found=name)
    try:
        return loss()  # nn.MSELoss and its like: a class to be instantiated
    except RAISED as error:
        fix = f"name an instance: loss = {loss.__name__}(...)"
        problem = f"making a {name} raised {type(error).__name__}"
        raise InputError(problem, place=place, fix=fix, detail=user_traceback(error)) from error


def _takes_norm(build: Callable[..., nn.Module]) -> bool:
    """By name, or by trying where the factory takes any keyword and hands it on."""
    names = keyword_names(build)
    if names is not None:
        return "norm" in names
    with contextlib.suppress(TypeError, ValueError):  # something that has no signature
        if "norm" in inspect.signature(build).parameters:
            return True
    try:
        with seeded(0):
            build(norm="none")
    except RAISED:
        return False
    return True


def _check_targets(y: Tensor, loss_kind: str, place: Place) -> None:
    if loss_kind == "mse" and not y.is_floating_point():
        raise InputError(
            "mse needs targets that are numbers",
            place=place,
            found=y.dtype,
            expected="floating-point targets",
            fix="loss: cross_entropy for class labels, or convert the targets with .float()",
        )
    if loss_kind == "cross_entropy" and y.is_floating_point() and y.dim() == 1:
        raise InputError(
            "class labels must be integers",
            place=place,
            found=y.dtype,
            expected="int64 labels from 0 to classes - 1",
            fix="convert the targets with .long(), or use loss: mse for numbers",
        )
    if loss_kind == "bce" and bool(((y < 0) | (y > 1)).any()):
        fix = "rescale the targets in load(), or use loss: mse for numbers"
        raise InputError("bce needs targets of 0 to 1", place=place, found=f"{y.min():g} to {y.max():g}", fix=fix)
    if torch.equal(y, y[:1].expand_as(y)):
        raise InputError(
            "every training target is the same: there is nothing to learn",
            place=place,
            found=f"y_train is {y[0].tolist()} in all {len(y)} rows",
            fix="look at load(): was a file that is sorted by class cut in two?",
        )
