"""The reference engine: one recipe at a time, in plain PyTorch. What it computes is what a trial *is*.

The step loop never asks the device a question (no `.item()`, no `if tensor`): losses, norms and flags stay on the device
and are read once a chunk, at the checkpoints where the verdict is asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.engines.loss_scaling import LossScaler
from recipefuzz.errors import describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Loss, Rows, Task, some_rows
from recipefuzz.trace import Trace
from recipefuzz.verdict import Budget, judge

HELDOUT_ROWS = 2048  # held-out rows an evaluation reads at most: the loss is then right to about 2 %


class Stepper:
    """A model in training: makes steps, and records three numbers and a flag for each."""

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, device: torch.device) -> None:
        self._model, self._loss, self._recipe, self._device = model, loss, recipe, device
        self._parameters = prepare.trainable(model)
        self._optimizer = prepare.build_optimizer(self._parameters, recipe)
        self._scaler = LossScaler(device) if recipe.precision == "fp16" else None
        self._flat = parameters_to_vector(self._parameters).detach()
        self._done = 0

    def step(self, x: Any, y: Any) -> Tensor:
        """One optimizer step on a batch; (loss, gradient norm, update ratio, bad?) on the device, (4,)."""
        for group in self._optimizer.param_groups:
            group["lr"] = prepare.learning_rate(self._recipe, self._done)
        self._optimizer.zero_grad()
        with prepare.autocast(self._recipe, self._device):
            loss = self._loss(self._model(x), y)
        norm = self._backward_and_update(loss)
        self._done += 1
        return self._record(loss.detach(), norm)

    def _backward_and_update(self, loss: Tensor) -> Tensor:
        if self._scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            norm = prepare.clip_gradients(self._parameters, self._recipe)
            self._optimizer.step()
            return norm
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        overflow = self._scaler.unscale(self._parameters)
        norm = prepare.clip_gradients(self._parameters, self._recipe)
        self._scaler.step(self._optimizer, self._parameters, overflow)
        return norm

    def _record(self, loss: Tensor, norm: Tensor) -> Tensor:
        """The flag: loss not finite, a parameter not finite, or NaN in the gradient.

        A gradient norm of inf is not enough: the squares of finite gradients can overflow in their sum, and
        clipping then makes an empty step. Where an element is inf, the update carries it into a parameter.
        """
        before, after = self._flat, parameters_to_vector(self._parameters).detach()
        self._flat = after
        ratio = (after - before).norm() / before.norm()
        largest = torch.linalg.vector_norm(after, torch.inf)
        bad = ~(torch.isfinite(loss) & torch.isfinite(largest)) | torch.isnan(norm)
        return torch.stack([loss.float(), norm.float(), ratio.float(), bad.float()])


def train(
    task: Task,
    job: Job,
    budget: Budget,
    device: torch.device,
    baseline: float,
    at_checkpoint: Callable[[], None],
) -> Outcome:
    """Run one trial until its verdict is known.

    Args:
        baseline: loss of the best constant predictor, from which skill is counted.
        at_checkpoint: called between chunks; may raise to end the trial.

    Raises:
        Exception: whatever the user's model, loss or data raise.
    """
    started = time.perf_counter()
    trace, verdict = Trace(), None
    with seeded(job.seed, device), flushed_denormals():
        train_rows, test_rows = (rows.to(device) for rows in prepare.rows_for(task, job.recipe))
        torch.manual_seed(job.seed)  # the rows may have drawn random numbers; the model's weights come first
        model = prepare.build_model(task, job.recipe, device)
        stepper = Stepper(model, task.loss, job.recipe, device)
        order = prepare.BatchOrder(len(train_rows), job.recipe.batch_size, job.seed)
        for end in budget.checkpoints():
            at_checkpoint()
            batches = order.draw(end - trace.steps_run, device)
            chunk = torch.stack([stepper.step(*train_rows.take(rows)) for rows in batches])
            trace = trace.extended(chunk.cpu().numpy().astype(np.float64))
            if trace.first_bad is None and budget.evaluates_at(end):
                trace = trace.evaluated(evaluate(task, model, test_rows, device))
            verdict = judge(trace, baseline, budget, whole=job.whole)
            if verdict is not None:
                break
    return Outcome(job, trace, verdict, baseline, seconds=time.perf_counter() - started)


def evaluate(task: Task, model: nn.Module, rows: Rows, device: torch.device) -> float:
    """Held-out loss in eval mode, in fp32. The trial's random numbers go on as if it had not been asked."""
    model.eval()
    index = some_rows(rows, HELDOUT_ROWS).to(device)
    with torch.no_grad(), seeded(0, device):
        losses = [task.loss(model(x), y).float() * len(part) for part in index.split(512) for x, y in [rows.take(part)]]
    model.train()
    return float(torch.stack(losses).sum() / len(index))


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


class SequentialEngine:
    """Trains jobs one after the other in this very process: for debugging, and for the processes of the pool."""

    def __init__(
        self, task: Task, budget: Budget, device: torch.device, at_checkpoint: Callable[[], None] | None = None
    ) -> None:
        self._task, self._budget, self._device = task, budget, device
        self._at_checkpoint = at_checkpoint or _nothing
        self._baselines = Baselines(task)
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def collect(self) -> list[Outcome]:
        return [self.train(self._waiting.popleft())] if self._waiting else []

    def close(self) -> None:
        self._waiting.clear()

    def train(self, job: Job) -> Outcome:
        """Train now. An exception of the user's code, or a lack of memory, is an outcome too."""
        try:
            baseline = self._baselines.of(job.recipe)
            return train(self._task, job, self._budget, self._device, baseline, self._at_checkpoint)
        except MemoryError as error:
            return Outcome(job, Trace(), None, error=f"out of memory: {describe_exception(error)}")
        except Exception as error:
            kind = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
            return Outcome(job, Trace(), None, error=kind + describe_exception(error))


def _nothing() -> None: ...
