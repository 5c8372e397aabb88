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

from recipefuzz.targets.constraint import Constraint
from recipefuzz.targets.losses import IGNORED
from recipefuzz.targets.task import Rows, Task, TensorRows, read_targets

ROWS = 1024  # targets used for a user's loss: the entropy of C classes is then right to about C / 2048 nats
STARTS = (0.0, 0.5)  # 0.5 for losses of probabilities, which are singular at 0
ITERATIONS = 25  # of L-BFGS on a few numbers: convex losses are done in 10 to 20
ROUNDS = 8  # at most, from the best point so far: a line search can get stuck where a density is nearly singular
GAIN = 1e-6  # of the loss, under which a round is the last
REFUSALS = (RuntimeError, ValueError, IndexError)  # of a constant output, by a loss: no gradient, a shape, an index
FAR = 10.0  # times as far from the start: there, a loss that has a lower bound is no longer falling,
FALLING = 0.01  # or by less than this share of its fall so far; -log(p) falls by 0.03 of it even from p = 1e30 on
ROUNDING = 1e-5  # of a loss: float32 has 1e-7, and a mean over many rows a few times that
NO_BOUND = (
    "the loss has no lower bound over constant predictions, and skill counts from the best one; does the model's "
    "output lack what the loss expects, such as the log_softmax of an nll_loss?"
)


class NoBaselineError(ValueError):
    """No constant prediction is the best one: trials of this task can be run, but not judged."""


class UnboundedLossError(NoBaselineError):
    """Over constant predictions the loss falls without end."""


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


@dataclass(frozen=True)
class Outputs:
    """What is known of a model's outputs.

    Attributes:
        like: a batch of them, of which only shape and type count.
        equality: the equation that each fulfils: a constant must, too.
        interval: where all of them were. It may be by chance, so a constant may lie outside, unless the loss has no
            lower bound there; inside, the descent may be easier, as that of `binary_cross_entropy` from 0.5 is.
    """

    like: Any
    equality: Constraint | None = None
    interval: Constraint | None = None


def best_constant(task: Task, rows: Rows, batch_size: int, outputs: Outputs) -> Constant:
    """The best constant prediction on the training targets.

    Args:
        rows: the training rows, scaled as the recipe says.
        batch_size: a user's loss is averaged over batches of this size, since some depend on it.
        outputs: what the model gives; a user's loss needs their shape and what they obey.

    Raises:
        NoBaselineError: a user's loss gives no finite value for any constant output, or has no lower bound.
    """
    if task.loss_kind == "custom":
        return _minimized(task, rows, batch_size, outputs)
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


def _minimized(task: Task, rows: Rows, batch_size: int, outputs: Outputs) -> Constant:
    """Minimum of the user's loss over outputs that are one vector, repeated over rows and positions."""
    if not isinstance(outputs.like, Tensor):
        raise NoBaselineError(f"the model's output is a {type(outputs.like).__name__}, not one tensor")
    batches = [rows.take(index)[1] for index in _batches(len(rows), batch_size)]
    sets = [outputs.equality] if outputs.equality else dict.fromkeys([None, outputs.interval])
    averages = [_Average(task, batches, batch_size, outputs.like.shape, constraint) for constraint in sets]
    found = [minimum for average in averages if (minimum := _lowest(average, outputs.like)) is not None]
    bounded = [minimum for minimum in found if minimum.bounded]
    if not bounded:
        if found:
            raise UnboundedLossError(NO_BOUND)
        raise NoBaselineError("the loss is not finite for any constant output")
    lowest = min(bounded, key=lambda minimum: minimum.loss)
    return Constant(lowest.loss, output=lowest.output)


@dataclass(frozen=True)
class _Average:
    """The user's loss of a constant, averaged over batches, as a function of free numbers."""

    task: Task
    batches: list[Any]
    rows: int
    sizes: torch.Size
    constraint: Constraint | None

    def __call__(self, free: Tensor) -> Tensor:
        output = self.output(free).expand(self.rows, *self.sizes[1:])
        return torch.stack([self.task.loss(output, y).reshape(()) for y in self.batches]).mean()

    def output(self, free: Tensor) -> Tensor:
        return self.constraint.transform(free, self.sizes) if self.constraint else free

    def start(self, shape: list[int], value: float) -> Tensor:
        return self.constraint.start(shape, value) if self.constraint else torch.full(shape, value)

    def falls_on(self, start: Tensor, point: Tensor) -> bool:
        """Whether the loss goes on falling far beyond a point on its way from a start."""
        with torch.no_grad(), contextlib.suppress(*REFUSALS):
            first, here, there = (float(self(start + times * (point - start))) for times in (0.0, 1.0, FAR))
            rounding = ROUNDING * max(abs(first), abs(here))
            return here - there > max(FALLING * (first - here), rounding)
        return False


@dataclass(frozen=True)
class _Minimum:
    loss: float
    output: Tensor
    bounded: bool


def _lowest(average: _Average, like: Tensor) -> _Minimum | None:
    """The lowest minimum over all layouts of a constant; one without a bound is the lowest of all.

    Which dimension of the output holds its features is not known, so each is tried and the lowest loss
    counts: (B, T, C) gives a vector of C for all T positions, and one of T for all C.
    """
    for value in STARTS:
        starts = [average.start(shape, value).to(like.dtype) for shape in _layouts(like)]
        finite = [minimum for minimum in (_descend(average, start) for start in starts) if minimum is not None]
        if finite:
            return min(finite, key=lambda minimum: (minimum.bounded, minimum.loss))
    return None


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


def _descend(average: _Average, start: Tensor) -> _Minimum | None:
    point = start.clone().requires_grad_()
    best: list[tuple[float, Tensor]] = []

    def closure() -> Tensor:
        point.grad = None
        loss = average(point)
        value = float(loss.detach())
        if not math.isfinite(value):  # outside the loss's domain: a wall, from which the line search turns back
            return torch.tensor(2 * abs(best[-1][0]) + 1) if best else loss
        if not best or value < best[-1][0]:
            best.append((value, point.detach().clone()))
        loss.backward()
        return loss

    with contextlib.suppress(*REFUSALS):
        for _ in range(ROUNDS):
            before = best[-1][0] if best else math.inf
            torch.optim.LBFGS([point], max_iter=ITERATIONS, line_search_fn="strong_wolfe").step(closure)
            if not best or before - best[-1][0] <= GAIN * abs(best[-1][0]):
                break
            with torch.no_grad():
                point.copy_(best[-1][1])
    if not best:
        return None
    loss, free = best[-1]
    with torch.no_grad():
        output = average.output(free).expand(1, *average.sizes[1:])
    return _Minimum(loss, output, bounded=not average.falls_on(start, free))
