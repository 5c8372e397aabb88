"""Whether a model's output fits the targets under a built-in loss: shapes and labels, checked before training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recipefuzz.errors import InputError, Place
from recipefuzz.targets.losses import (
    IGNORED,
    class_dim,
    cross_entropy,
    cross_entropy_last,
    is_ambiguous,
    is_like,
    mismatch,
)
from recipefuzz.targets.task import Task, read

CLASSES_LAST = "return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())"


def check_output(task: Task, output: Any, target: Any, model: Place, loss: Place) -> None:
    """Check one batch's output.

    Raises:
        InputError: at `model` or `loss`, what does not fit. A user's own loss takes what it likes.
    """
    if task.loss_kind == "cross_entropy":
        _check_logits(task, output, target, model, loss)
    elif task.loss_kind in ("mse", "bce") and isinstance(target, Tensor):
        _check_like(task.loss_kind, output, target, loss)


def _check_like(kind: str, output: Any, target: Tensor, place: Place) -> None:
    if not isinstance(output, Tensor):
        problem, found = f"{kind} needs a model whose output is one tensor", type(output)
        raise InputError(problem, place=place, found=found, fix="return a tensor, or name a loss of your own")
    if not is_like(output, target):
        rows, columns = len(target), target.shape[1:].numel()
        raise InputError(
            mismatch(output, target),
            place=place,
            found=f"{kind} of the two",
            expected=f"an output of shape {tuple(target.shape)}" + (f" or ({rows},)" if columns == 1 else ""),
            fix=f"give the model {columns} output{'s' if columns > 1 else ''} a row, or name a loss of your own",
        )


def _check_logits(task: Task, output: Any, target: Any, model: Place, loss: Place) -> None:
    if not isinstance(output, Tensor) or output.dim() < 2:
        found = f"output {tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
        raise InputError("cross_entropy needs logits", place=model, found=found, expected="(batch, classes, ...)")
    if not isinstance(target, Tensor) or target.is_floating_point():
        return
    if task.loss is cross_entropy and is_ambiguous(output, target):
        raise InputError(
            f"which dimension of the output holds the classes? Both have {output.shape[-1]}",
            place=loss,
            found=f"output {tuple(output.shape)}, target {tuple(target.shape)}",
            expected="another number of positions than of classes, or a loss of your own",
            fix=f"def loss(output, target): {CLASSES_LAST}  # for classes in the last dimension",
        )
    last = task.loss is cross_entropy_last
    _check_labels(task, output.shape[-1 if last else class_dim(output, target)], model)


def _check_labels(task: Task, classes: int, place: Place) -> None:
    """Labels outside the classes kill a GPU with a device-side assertion: found here, with the row."""
    for rows, name in ((task.train, "y_train"), (task.test, "y_test")):
        first, count, most = "", 0, 0
        for index, _, y in read(rows):
            if not isinstance(y, Tensor) or y.is_floating_point():
                break
            wrong = ((y < 0) & (y != IGNORED)) | (y >= classes)
            count, most = count + int(wrong.sum()), max(most, int(y.max()))
            if not first and bool(wrong.any()):
                first = f"{name}: label {int(y[wrong][0])} in row {int(index[wrong.nonzero()[0][0]])}"
        if first:
            raise InputError(
                f"a label outside the model's {classes} classes",
                place=place,
                found=f"{first}; {count} such labels",
                expected=f"labels from 0 to {classes - 1}",
                fix=f"give the model {most + 1} outputs, or renumber the labels from 0",
            )
