"""A trial once more, up to a step, and that step with every operation watched.

A trial is a pure function of task, recipe and seed, so nothing has to be kept while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.origin import Origin, origin_of
from recipefuzz.diagnose.tensors import Stats, is_finite, tensors
from recipefuzz.diagnose.watching import Watch
from recipefuzz.engines import prepare
from recipefuzz.engines.sequential import Stepper, flushed_denormals, heldout_batches, one_thread, with_own_loss
from recipefuzz.errors import RAISED, describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded, undisturbed
from recipefuzz.targets.task import Rows, Task

LATER = 8  # steps by which a replay's failure may come later than in lanes, whose sums round otherwise
KEPT = ("parameter", "buffer", "attribute")  # what a model keeps from step to step


@dataclass(frozen=True)
class Failure:
    """A step that went wrong.

    Attributes:
        step: counted from 1.
        symptom: what was found not finite: "loss", "gradient of NAME", "parameter NAME", "what was raised on".
        rows: indices of the training rows in its batch.
        recurrent: whether the model applies one weight many times in a step.
        raised: the exception that the step ended with, in one line; empty where it did not raise.
        built: whether it began before the first step, as the model was built.
    """

    step: int
    symptom: str
    origin: Origin
    rows: tuple[int, ...]
    recurrent: bool
    raised: str = ""
    built: bool = False


class Replay:
    """One trial, step by step. Use inside `replaying`, which holds the trial's random numbers.

    Attributes:
        done: steps made.
    """

    def __init__(self, task: Task, recipe: Recipe, seed: int, device: torch.device, rows: Rows) -> None:
        self.task, self.recipe, self.device = with_own_loss(task, device), recipe, device
        self._rows = rows
        self.model = prepare.build_model(self.task, recipe, device)
        self.stepper = Stepper(self.model, self.task.loss, recipe, device)
        self._order = prepare.BatchOrder(len(rows), recipe.batch_size, seed)
        self.done = 0

    def run(self, steps: int) -> int | None:
        """Ordinary steps; the number of the first that was not finite, counted from 1, if one was."""
        if not steps:
            return None
        start = self.done
        for batch in self._order.draw(steps, self._rows.index_device):
            self.stepper.step(*self._rows.take(batch))
            self.done += 1
        bad = self.stepper.recorder.take()[:, -1].nonzero()
        return start + int(bad[0]) + 1 if len(bad) else None

    def overshot(self, steps: int) -> int:
        """Ordinary steps, each followed by its batch's loss once more; how many of them raised it."""
        raised = 0
        for batch in self._order.draw(steps, self._rows.index_device):
            x, y = self._rows.take(batch)
            before = torch.get_rng_state()
            loss = self.stepper.step(x, y)
            self.done += 1
            with undisturbed(self.device), torch.no_grad(), prepare.autocast(self.recipe, self.device):
                torch.set_rng_state(before)
                raised += bool(self._loss(x, y) > loss)
        return raised

    def watched(self) -> Failure | None:
        """The next step, watched; None if all of it that matters is finite."""
        (batch,) = self._order.draw(1, self._rows.index_device)
        self.done += 1
        x, y = self._rows.take(batch)
        rows = tuple(batch.tolist())
        return watched_step(self.model, lambda: self.stepper.step(x, y), x, y, self.done, rows, may_raise=True)

    def watched_evaluation(self, rows: Rows) -> Failure | None:
        """The loss of held-out rows in eval mode, watched; None if it is finite."""
        self.model.eval()
        with torch.no_grad():
            for _, x, y in heldout_batches(rows):
                failure = watched_step(self.model, partial(self._loss, x, y), x, y, self.done)
                if failure is not None:
                    return failure
        return None

    def _loss(self, x: Any, y: Any) -> Tensor:
        return self.task.loss(self.model(x), y)

    def loss_and_gradients(self, batch: Tensor) -> Tensor:
        """Forward and backward pass on some rows, without an update; the loss, a scalar on the device."""
        x, y = self._rows.take(batch.to(self._rows.index_device))
        self.model.zero_grad()
        with prepare.autocast(self.recipe, self.device):
            loss = self._loss(x, y)
        loss.backward()
        return loss.detach()

    def watched_batch(self, batch: Tensor) -> Failure | None:
        """The same, watched."""
        x, y = self._rows.take(batch.to(self._rows.index_device))
        return watched_step(self.model, lambda: self.loss_and_gradients(batch), x, y, self.done, tuple(batch.tolist()))


def watched_step(
    model: nn.Module,
    step: Callable[[], Tensor],
    x: Any,
    y: Any,
    number: int,
    rows: tuple[int, ...] = (),
    *,
    may_raise: bool = False,
) -> Failure | None:
    """Make one training step with every operation watched.

    Args:
        step: makes the step on the batch x, y; returns the loss.
        number: of the step, for the result.
        rows: which training rows the batch is made of, for the result.
        may_raise: take what the step raises for a failure, too, where something not finite had been made before.

    Raises:
        Exception: whatever else the step raises.
    """
    watch = Watch(model)
    for name, value in (("x", x), ("y", y)):
        for tensor in tensors([value]):
            watch.name(tensor, name)
    for name, tensor in state_of(model):
        watch.name(tensor, name)
    raised = ""
    with watch.active():
        try:
            loss = step()
        except RAISED as error:
            found, raised = _raised_on(watch) if may_raise else None, describe_exception(error)
            if found is None:
                raise
        else:
            found = _symptom(watch, model, loss)
    if found is None:
        return None
    symptom, writers = found
    origin = origin_of(watch.events, writers)
    return None if origin is None else Failure(number, symptom, origin, rows, watch.recurrent, raised)


def _symptom(watch: Watch, model: nn.Module, loss: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """What should be finite and is not, the first in the order of a step; which operations wrote it."""
    if not is_finite(loss):
        return "loss", watch.writers_of(loss)
    if watch.gradients:
        first = next(name for name, p in model.named_parameters() if id(p) in watch.gradients)
        reached = {w for found in watch.gradients.values() for w in found}
        return f"gradient of {first}", tuple(sorted(reached))
    for name, tensor in state_of(model):
        if not is_finite(tensor) and (writers := watch.writers_of(tensor)):
            return name, writers
    return None


def _raised_on(watch: Watch) -> tuple[str, tuple[int, ...]] | None:
    """What was not finite when the step raised: the last that was made, infinities that were meant aside."""
    last = next((event.index for event in reversed(watch.events) if not event.meant), None)
    return None if last is None else ("what was raised on", (last,))


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model keeps from step to step: parameters, buffers, plain attributes."""
    for name, parameter in model.named_parameters():
        yield f"parameter {name}", parameter
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", buffer
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"attribute {f'{name}.{key}' if name else key}", value


@contextmanager
def replaying(task: Task, recipe: Recipe, seed: int, device: torch.device, rows: Rows) -> Iterator[Replay]:
    """A trial at its start, with its own random numbers, which the caller's don't notice."""
    with seeded(seed, device), flushed_denormals(), one_thread():
        yield Replay(task, recipe, seed, device, rows)


Begin = Callable[[], AbstractContextManager[Replay]]


def first_failure(begin: Begin, step: int, limit: int) -> Failure | None:
    """The first step that is not finite, and where in it that begins.

    Costs one replay up to the step; a second one where what the model keeps had gone bad in an earlier step, which its
    loss did not show, or was so from the start: weights that are frozen are not looked at from step to step.

    Args:
        begin: a replay of the trial.
        step: at which the trial failed, counted from 1.
        limit: steps after which to give up.
    """
    with begin() as replay:
        early = replay.run(step - 1)
        failure = None
        while early is None and failure is None and replay.done < min(step + LATER, limit):
            failure = replay.watched()
    if early is not None:  # in lanes it failed later
        return first_failure(begin, early, limit)
    if failure is not None and failure.origin.event is None and failure.origin.outside.startswith(KEPT):
        return _of_state(begin, failure) or failure
    return failure


def _of_state(begin: Begin, failure: Failure) -> Failure | None:
    """The earlier step that left a tensor of the model not finite, or the building of the model."""
    name = failure.origin.outside

    def broken(replay: Replay) -> bool:
        return any(n == name and not is_finite(t) for n, t in state_of(replay.model))

    with begin() as replay:
        while not broken(replay) and replay.done < failure.step:
            replay.run(1)
        step = replay.done
    if not step:
        return replace(failure, origin=_of_building(begin, failure.origin), rows=(), built=True)
    with begin() as replay:
        replay.run(step - 1)
        return replay.watched()


def _of_building(begin: Begin, origin: Origin) -> Origin:
    """The operation that made a tensor of the model not finite; where it came from a file, say, what is in it."""
    watch = Watch(nn.Module())
    with watch.active(), begin() as replay:
        tensor = next(t for name, t in state_of(replay.model) if name == origin.outside)
        made = origin_of(watch.events, watch.writers_of(tensor))
    if made and made.event:
        return made
    return replace(origin, outside=f"{origin.outside} ({Stats.of(tensor)}), which was so before the first step")
