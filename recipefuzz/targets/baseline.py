"""The best constant predictor: its loss is the zero of skill.

A constant predictor ignores its input. What it reaches is what can be had from the targets alone: the entropy of the
label frequencies for a cross-entropy, the variance for a squared error. A model is learning only below it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recipefuzz.targets.losses import IGNORED
from recipefuzz.targets.task import Rows, Task, TensorRows, read_targets

ROWS = 1024  # targets used for a user's loss: the entropy of C classes is then right to about C / 2048 nats
STARTS = (0.0, 0.5)  # 0.5 for losses of probabilities, which are singular at 0
ITERATIONS = 25  # of L-BFGS on a few numbers: convex losses are done in 10 to 20
ROUNDS = 8  # at most, from the best point so far: a line search can get stuck where a density is nearly singular
GAIN = 1e-6  # of the loss, under which a round is the last


@dataclass(frozen=True)
class Constant:
    """The best constant prediction for a set of targets.

    Attributes:
        loss: its mean loss over them, in the loss's own unit.
        per_row: its loss on each training row, shape (N,), where a batch's loss is the mean over rows.
        output: the prediction, to be expanded over rows, for losses that are not such a mean.
    """

    loss: float
    per_row: Tensor | None = None
    output: Tensor | None = None

    def to(self, device: torch.device) -> Constant:
        move = [t.to(device) if t is not None else None for t in (self.per_row, self.output)]
        return Constant(self.loss, *move)

    def of_rows(self, index: Tensor) -> Tensor | None:
        """Loss on each of many batches, (steps, batch) -> (steps,), on the device; None if it needs targets."""
        return None if self.per_row is None else self.per_row[index].mean(-1)

    def of_targets(self, task: Task, target: Any, rows: int) -> Tensor:
        """Loss on one batch of so many rows, a scalar on the device."""
        if self.output is None:
            return torch.tensor(self.loss)
        with torch.no_grad():
            return task.loss(self.output.expand(rows, *self.output.shape[1:]), target).reshape(())


def best_constant(task: Task, rows: Rows, batch_size: int, output: Any) -> Constant:
    """The best constant prediction on the training targets.

    Args:
        rows: the training rows, scaled as the recipe says.
        batch_size: a user's loss is averaged over batches of this size, since some depend on it.
        output: what the model gives for a batch; a user's loss needs its shape.

    Raises:
        ValueError: a user's loss gives no finite value for any constant output.
    """
    if task.loss_kind == "custom":
        return _minimized(task, rows, batch_size, output)
    losses = {"cross_entropy": _cross_entropy, "bce": _bce, "mse": _mse}[task.loss_kind](read_targets(rows))
    whole = isinstance(rows, TensorRows) and not bool(losses.isnan().any())
    return Constant(float(losses.nanmean()), losses.flatten(1).mean(1).float() if whole else None)


def _cross_entropy(targets: Tensor) -> Tensor:
    """Loss of the label frequencies, (N, positions); NaN where there is no label."""
    if targets.is_floating_point():  # class probabilities, (N, C, ...)
        shares = targets.double().flatten(2) if targets.dim() > 2 else targets.double()[..., None]
        share = shares.mean((0, 2), keepdim=True)
        return -shares.xlogy(share).sum(1)
    labelled = targets != IGNORED
    count = torch.bincount(targets[labelled].flatten()).double()
    losses = -(count / count.sum()).log()[targets.clamp_min(0)]
    return torch.where(labelled, losses, torch.nan).reshape(len(targets), -1)


def _bce(targets: Tensor) -> Tensor:
    """Loss of the share of ones in each column, (N, columns)."""
    columns = targets.double().reshape(len(targets), -1)
    share = columns.mean(0, keepdim=True).expand(columns.shape)
    return functional.binary_cross_entropy(share, columns, reduction="none")


def _mse(targets: Tensor) -> Tensor:
    """Squared distance from the mean of each column, (N, columns)."""
    columns = targets.double().reshape(len(targets), -1)
    return (columns - columns.mean(0)) ** 2


def _minimized(task: Task, rows: Rows, batch_size: int, output: Any) -> Constant:
    """Minimum of the user's loss over outputs that are one vector, repeated over rows and positions.

    Which dimension of the output holds its features is not known, so each is tried and the lowest loss
    counts: (B, T, C) gives a vector of C for all T positions, and one of T for all C.
    """
    if not isinstance(output, Tensor):
        raise ValueError(f"the model's output is a {type(output).__name__}, not one tensor")
    batches = [rows.take(index)[1] for index in _batches(len(rows), batch_size)]
    for start in STARTS:
        found = [_descend(task, batches, batch_size, output, torch.full(s, start)) for s in _layouts(output)]
        finite = [constant for constant in found if constant is not None]
        if finite:
            return min(finite, key=lambda constant: constant.loss)
    raise ValueError("the loss is not finite for any constant output")


def _batches(rows: int, batch_size: int) -> Tensor:
    """Whole batches of rows that are evenly spread, since data may be sorted, and shuffled; (batches, batch_size)."""
    count = math.lcm(rows, batch_size) // batch_size  # then every row is there as often as any other
    if count * batch_size > 4 * ROWS:
        count = max(1, ROWS // batch_size)
    spread = torch.arange(count * batch_size) * rows // (count * batch_size)
    order = torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))
    return spread[order].view(count, batch_size)


def _layouts(output: Tensor) -> list[list[int]]:
    """Shapes of a constant that broadcasts over all dimensions but one (a scalar for outputs (B,))."""
    shapes = [[1] * output.dim() for _ in range(1, max(2, output.dim()))]
    for dim, shape in enumerate(shapes[: output.dim() - 1], start=1):
        shape[dim] = output.shape[dim]
    return shapes


def _descend(task: Task, batches: list[Any], rows: int, output: Tensor, start: Tensor) -> Constant | None:
    point = start.to(output.dtype).requires_grad_()
    best: list[tuple[float, Tensor]] = []

    def closure() -> Tensor:
        point.grad = None
        loss = torch.stack([task.loss(point.expand(rows, *output.shape[1:]), y).reshape(()) for y in batches]).mean()
        value = float(loss.detach())
        if not math.isfinite(value):  # outside the loss's domain: a wall, from which the line search turns back
            return torch.tensor(2 * abs(best[-1][0]) + 1) if best else loss
        if not best or value < best[-1][0]:
            best.append((value, point.detach().clone()))
        loss.backward()
        return loss

    # a loss may refuse a constant output: no gradient, a shape, an index
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        for _ in range(ROUNDS):
            before = best[-1][0] if best else math.inf
            torch.optim.LBFGS([point], max_iter=ITERATIONS, line_search_fn="strong_wolfe").step(closure)
            if not best or before - best[-1][0] <= GAIN * abs(best[-1][0]):
                break
            with torch.no_grad():
                point.copy_(best[-1][1])
    return Constant(best[-1][0], output=best[-1][1].expand(1, *output.shape[1:])) if best else None
