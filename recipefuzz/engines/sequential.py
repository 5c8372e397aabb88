"""The reference engine: one recipe at a time, in plain PyTorch. What it computes is what a trial *is*.

The step loop never asks the device a question (no `.item()`, no `if tensor`): losses, norms and flags stay there and
are read once a chunk, at the checkpoints where the verdict is asked for.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.engines.loss_scaling import LossScaler
from recipefuzz.engines.raising import raises_on_bad_values
from recipefuzz.engines.recorder import Recorder
from recipefuzz.errors import RAISED, describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant
from recipefuzz.targets.seeding import seeded, undisturbed
from recipefuzz.targets.task import Loss, Rows, Task, some_rows
from recipefuzz.trace import Floats, Trace
from recipefuzz.verdict import Budget, judge

HELDOUT_ROWS = 2048  # held-out rows an evaluation reads at most: the loss is then right to about 2 %
HELDOUT_BATCH = 512
Look = Callable[[Task, nn.Module, int], None]  # the trial's task and model after so many steps


class Stepper:
    """A model in training."""

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, device: torch.device) -> None:
        self._model, self._loss, self._recipe, self.device = model, loss, recipe, device
        self._parameters = prepare.trainable(model)
        self._optimizer = prepare.build_optimizer(self._parameters, recipe)
        self._scaler = LossScaler(device) if recipe.precision == "fp16" else None
        self._done = 0
        self.recorder = Recorder(self._parameters)

    def step(self, x: Any, y: Any) -> Tensor:
        """One optimizer step on a batch; its loss, a scalar on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = prepare.learning_rate(self._recipe, self._done)
        self._optimizer.zero_grad()
        with prepare.autocast(self._recipe, self.device):
            loss = self._loss(self._model(x), y)
        self.recorder.add(loss.detach(), self._backward_and_update(loss))
        self._done += 1
        return loss.detach()

    def give_up(self) -> None:
        """Record a step that came to nothing as one that was not finite."""
        nothing = torch.tensor(torch.nan, device=self.device)
        self.recorder.add(nothing, nothing)

    def _backward_and_update(self, loss: Tensor) -> Tensor:
        """Backward pass, clipping, update; the gradient's L2 norm before clipping, a scalar on the device."""
        if self._scaler is None:
            loss.backward()
            norm = prepare.clip_gradients(self._parameters, self._recipe)
            self._optimizer.step()
            return norm
        self._scaler.scale(loss).backward()
        overflow = self._scaler.unscale(self._parameters)
        norm = prepare.clip_gradients(self._parameters, self._recipe)
        self._scaler.step(self._optimizer, self._parameters, overflow)
        return norm


def train(
    task: Task,
    job: Job,
    budget: Budget,
    device: torch.device,
    rows: tuple[Rows, Rows],
    constant: Constant,
    look: Look | None = None,
) -> Outcome:
    """Run one trial until its verdict is known.

    Args:
        rows: training and held-out rows on the device, scaled as the recipe says.
        constant: the best constant prediction, from which skill is counted.
        look: is shown the model at every checkpoint where all is finite, and leaves it and random states as they are.

    Raises:
        Exception: whatever the user's model, loss or data raise.
    """
    started = time.perf_counter()
    trace, verdict = Trace(), None
    task, (train_rows, test_rows) = with_own_loss(task, device), rows
    with seeded(job.seed, device), flushed_denormals():
        model = prepare.build_model(task, job.recipe, device)
        stepper = Stepper(model, task.loss, job.recipe, device)
        order = prepare.BatchOrder(len(train_rows), job.recipe.batch_size, job.seed)
        for end in budget.checkpoints():
            batches = order.draw(end - trace.steps_run, train_rows.index_device)
            trace = trace.extended(_chunk(task, stepper, train_rows, batches, constant))
            if trace.first_bad is None and budget.evaluates_at(end):
                trace = trace.evaluated(evaluate(task, model, test_rows, device))
            if trace.first_bad is None and look is not None:
                look(task, model, end)
            verdict = judge(trace, constant.loss, budget, whole=job.whole)
            if verdict is not None:
                break
    return Outcome(job, trace, verdict, constant.loss, seconds=time.perf_counter() - started)


def _chunk(task: Task, stepper: Stepper, rows: Rows, batches: Tensor, constant: Constant) -> Floats:
    """Train on some batches, (steps, batch); read the device once. Columns as in `Trace.extended`.

    What is raised after a step that was not finite is that step's doing, and what is raised on a value that is not
    finite makes a step that is not. The chunk then ends there.
    """
    known = constant.of_rows(batches)
    constants = []
    for batch in batches:
        x, y = rows.take(batch)
        try:
            stepper.step(x, y)
        except RAISED as error:
            if stepper.recorder.all_finite():
                if is_lack_of_memory(error) or not raises_on_bad_values(partial(stepper.step, x, y)):
                    raise
                stepper.give_up()
                constants.append(torch.tensor(torch.nan))
            break
        if known is None:
            with undisturbed(stepper.device):
                constants.append(constant.of_targets(task, y, len(batch)).float())
    numbers = stepper.recorder.take()
    column = (torch.stack(constants) if known is None else known[: len(numbers)])[:, None].to(numbers.device)
    return torch.cat([numbers[:, :1], column, numbers[:, 1:]], dim=1).cpu().numpy().astype(np.float64)


def evaluate(task: Task, model: nn.Module, rows: Rows, device: torch.device) -> float:
    """Held-out loss in eval mode, in fp32. The trial's random numbers go on as if it had not been asked."""
    model.eval()
    with torch.no_grad(), seeded(0, device):
        losses = [task.loss(model(x), y).float() * share for share, x, y in heldout_batches(rows)]
    model.train()
    return float(torch.stack(losses).sum())


def heldout_batches(rows: Rows) -> Iterator[tuple[float, Any, Any]]:
    """What an evaluation reads: inputs and targets of some rows, and which share they are of all that it reads."""
    index = some_rows(rows, HELDOUT_ROWS).to(rows.index_device)
    for part in index.split(HELDOUT_BATCH):
        yield (len(part) / len(index), *rows.take(part))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below 1e-38 count as zero: a diverged run makes many, and each costs a trap on a CPU.

    The setting belongs to the thread; it is put back to what the user had.
    """
    was_on = bool(torch.tensor(1e-38) / 1e3 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


@contextmanager
def one_thread() -> Iterator[None]:
    """Add in one order: two threads round sums otherwise than one, and a trial would depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def with_own_loss(task: Task, device: torch.device) -> Task:
    """The task with a loss of the trial's own: a module's state starts anew, and its buffers are on the device."""
    if not isinstance(task.loss, nn.Module):
        return task
    return replace(task, loss=copy.deepcopy(task.loss).to(device))


class SequentialEngine:
    """Trains jobs one after the other in this very process: for debugging, and for the processes of the pool."""

    lanes = 0

    def __init__(self, task: Task, budget: Budget, device: torch.device) -> None:
        self._task, self._budget, self._device = task, budget, device
        self._baselines = Baselines(task, device)
        self._rows: dict[tuple[str, str], tuple[Rows, Rows]] = {}
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    @property
    def load(self) -> int:
        """Jobs that are not done."""
        return len(self._waiting)

    def advance(self) -> list[Outcome]:
        """Train the next job."""
        return [self.train(self._waiting.popleft())] if self._waiting else []

    collect = advance

    def close(self) -> None:
        self._waiting.clear()

    def train(self, job: Job) -> Outcome:
        """Train now. An exception of the user's code, or a lack of memory, is an outcome too."""
        try:
            with one_thread():
                constant = self._baselines.of(job.recipe)
                rows = self.rows_of(job.recipe)
                return train(self._task, job, self._budget, self._device, rows, constant)
        except RAISED as error:
            kind = "out of memory: " if is_lack_of_memory(error) else ""
            return Outcome(job, Trace(), None, error=kind + describe_exception(error))

    def rows_of(self, recipe: Recipe) -> tuple[Rows, Rows]:
        """Scaled and moved once for all recipes that scale alike."""
        key = (recipe.input_norm, recipe.target_norm)
        if key not in self._rows:
            with seeded(0, self._device):
                train_rows, test_rows = prepare.rows_for(self._task, recipe)
                self._rows[key] = train_rows.to(self._device), test_rows.to(self._device)
        return self._rows[key]


def is_lack_of_memory(error: BaseException) -> bool:
    """Python's own, a GPU's, or torch's on the CPU, which has no class of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
