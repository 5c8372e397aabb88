"""The loss of the best constant predictor: the zero of skill.

A constant predictor ignores its input. What it reaches is what can be had from the targets alone: the entropy of the
label frequencies for a cross-entropy, the variance for a squared error. A model is learning only below it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipefuzz.targets.task import Rows, Task, TensorRows, some_rows

ROWS = 1024  # targets used for a user's loss: the entropy of C classes is then right to about C / 2048 nats
STARTS = (0.0, 0.5)  # 0.5 for losses of probabilities, which are singular at 0
ITERATIONS = 25  # of L-BFGS on a few numbers: convex losses are done in 10 to 20


def constant_loss(task: Task, rows: Rows, batch_size: int, output: Any) -> float:
    """Loss of the best constant prediction on the training targets, in the loss's own unit.

    Args:
        rows: the training rows, scaled as the recipe says.
        batch_size: a user's loss is averaged over batches of this size, since some depend on it.
        output: what the model gives for a batch; a user's loss needs its shape.

    Raises:
        ValueError: a user's loss gives no finite value for any constant output.
    """
    if task.loss_kind == "custom":
        return _minimized(task, rows, batch_size, output)
    targets = _targets(rows)
    if task.loss_kind == "cross_entropy":
        return _entropy(targets)
    if task.loss_kind == "bce":
        share = targets.double().mean(0)
        return float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())
    return float(targets.double().var(0, correction=0).mean())


def _targets(rows: Rows) -> Tensor:
    if isinstance(rows, TensorRows):
        return rows.y
    y = rows.take(some_rows(rows, 10 * ROWS))[1]
    return y  # type: ignore[no-any-return]


def _entropy(targets: Tensor) -> float:
    if targets.is_floating_point():  # class probabilities, (N, C, ...)
        share = targets.double().transpose(0, 1).flatten(1).mean(1)
    else:
        share = torch.bincount(targets[targets >= 0].flatten()).double()  # -100 marks ignored positions
        share = share / share.sum()
    return float(torch.special.entr(share).sum())


def _minimized(task: Task, rows: Rows, batch_size: int, output: Any) -> float:
    """Minimum of the user's loss over outputs that are one vector, repeated over rows and positions.

    Which dimension of the output holds its features is not known, so each is tried and the lowest loss
    counts: (B, T, C) gives a vector of C for all T positions, and one of T for all C.
    """
    if not isinstance(output, Tensor):
        raise ValueError(f"the model's output is a {type(output).__name__}, not one tensor")
    index = some_rows(rows, max(ROWS, batch_size))
    whole = min(batch_size, len(index))
    batches = [rows.take(part.to(output.device))[1] for part in index.split(batch_size) if len(part) == whole]
    for start in STARTS:
        found = [_descend(task, batches, output, torch.full(s, start)) for s in _layouts(output)]
        finite = [value for value in found if value is not None]
        if finite:
            return min(finite)
    raise ValueError("the loss is not finite for any constant output")


def _layouts(output: Tensor) -> list[list[int]]:
    """Shapes of a constant that broadcasts over all dimensions but one (a scalar for outputs (B,))."""
    shapes = [[1] * output.dim() for _ in range(1, max(2, output.dim()))]
    for dim, shape in enumerate(shapes[: output.dim() - 1], start=1):
        shape[dim] = output.shape[dim]
    return shapes


def _descend(task: Task, batches: list[Any], output: Tensor, constant: Tensor) -> float | None:
    constant = constant.to(output.dtype).to(output.device).requires_grad_()
    optimizer = torch.optim.LBFGS([constant], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def mean_loss() -> Tensor:
        losses = []
        for y in batches:
            rows = len(y) if isinstance(y, Tensor) else len(output)
            losses.append(task.loss(constant.expand(rows, *output.shape[1:]), y))
        return torch.stack(losses).mean()

    best: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = mean_loss()
        value = float(loss.detach())
        if value == value and abs(value) != float("inf"):
            best.append(value)
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, IndexError):  # a loss may refuse a constant output: no gradient, a shape
        return min(best, default=None)
    return min(best, default=None)

