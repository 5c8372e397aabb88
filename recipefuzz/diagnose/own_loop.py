"""`recipefuzz.watch`: the first value that is not finite, found in the user's own training loop.

After each backward pass the loss and the gradients are looked at in one go. At that moment the parameters are
still those of the forward pass, so a bad step can be replayed without a copy of the model having been kept. What was
found is reported at the optimizer's step: a gradient scaler, or a loop with a check of its own, may skip that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.history import History
from recipefuzz.diagnose.listeners import BACKWARD_FRAMES, STEP_FRAMES, after_backward, before_steps
from recipefuzz.diagnose.moment import Moment
from recipefuzz.diagnose.own_step import Aside, Stage, Step, diagnose, message
from recipefuzz.diagnose.rerun import Calls, calls, is_user_frame, steady, user_place
from recipefuzz.diagnose.watched_call import WatchedCall
from recipefuzz.diagnosis import Diagnosis

NOTED = 16  # of so many of the optimizer's steps one is looked at where it is called: it's nearly always there
UPDATE_DEPTH = 2  # frames from the optimizer's wrapper to the user's loop: a scheduler's
SKIPS = 30  # bad steps in a row that a gradient scaler may skip: after them its scale is 1e9 times smaller


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, *, stop: bool = True) -> LoopWatch:
    """Find the first value that is not finite in a training loop of your own.

        with recipefuzz.watch(model, optimizer) as w:
            for x, y in loader:
                ...

    A failing step is run a second time, from the statement that calls the model to the one that calls `backward()`,
    with every operation watched. What those statements print or append is printed or appended twice then.

    Args:
        stop: raise at the optimizer's step that would be made with bad gradients; else go on, unwatched from there.

    Raises:
        NonFiniteError: in the loop, with the operation, its line, the cause and what to do.
    """
    return LoopWatch(model, optimizer, stop=stop)


class LoopWatch:
    """A training loop that is watched.

    Attributes:
        steps: optimizer steps made, one that has begun included.
        diagnosis: of the first failure, if there was one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, stop: bool) -> None:
        self.steps = 0
        self.diagnosis: Diagnosis | None = None
        self._model, self._optimizer, self._stop = model, optimizer, stop
        self._hooks = ExitStack()
        self._stage: Stage | Aside | None = None
        self._pending: Diagnosis | None = None
        self._skipped = 0
        self._in_closure = False
        self._backward_seen = False
        self._update: Calls = []
        self._frame: FrameType | None = None  # what calls it only waits: no step meets outside of it
        self._thread = get_ident()

    def __enter__(self) -> Self:
        frame = sys._getframe(1)
        self._frame, self._home = steady(frame), _home(frame)
        self._thread = get_ident()
        self._members = self._members_now()
        parameters = self._parameters()
        self._history = History(parameters)
        self._moment = Moment(self._model, parameters, self._frame, self._history.held)
        self._call = WatchedCall(self._model, self._moment)
        with ExitStack() as hooks:
            hooks.enter_context(self._call)
            _watching[id(self)] = self
            hooks.callback(_watching.pop, id(self))
            hooks.enter_context(before_steps(self._before_step))
            hooks.enter_context(after_backward(self._backward))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        with self._hooks:
            if kind is None and self.diagnosis is None and self._history.parameters_are_bad():
                self._report(self._pending or self._find(None, "a parameter"))
        self._moment.end()
        self._frame = None
        return False

    def _members_now(self) -> dict[Tensor, None]:
        """What the optimizer steps; of a wrapper that has no groups of its own, the model's parameters."""
        return _members(self._optimizer) or dict.fromkeys(self._model.parameters())

    def _parameters(self) -> list[Tensor]:
        return list({id(p): p for p in (*self._members, *self._model.parameters())}.values())

    def _backward(self, loss: Tensor | None) -> None:
        """A backward pass is over; gradients are not yet clipped, unscaled or applied."""
        if (here := get_ident()) != self._thread and here != self._moment.thread:
            return  # of another model, which another thread trains
        if self._stage is not None:
            self._stage.backward(loss)
        elif self.diagnosis is None:
            moment = self._moment
            if moment.spent:  # a model that isn't called itself: its methods are, or its parts
                moment.forget()
            moment.over = self._backward_seen = True
            moment.backwards += 1
            if moment.asks:
                moment.ask()
            if self._history.add(loss):
                self._pending, self._skipped = None, 0
            else:
                self._bad(sys._getframe(BACKWARD_FRAMES))

    def _bad(self, frame: FrameType | None) -> None:
        """Something is not finite.

        Args:
            frame: what has called `backward()`.
        """
        self._skipped += 1
        if self._pending is None:
            self._pending = self._find(frame, self._history.symptom)
        if self._in_closure or self._skipped >= SKIPS:
            self._report(self._pending)

    def _takes_over(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether another optimizer has taken the place of the watched one: made anew in the loop, or in a wrapper."""
        if self._in_closure or not (self._backward_seen or self.diagnosis):
            return False
        if self._members.keys().isdisjoint(_members(optimizer)):
            return False
        self._optimizer = optimizer
        return True

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer, not always the watched one, begins a step."""
        if self._stage is not None or not (optimizer is self._optimizer or self._takes_over(optimizer)):
            return
        if self.diagnosis is None:
            if self.steps % NOTED == 0:
                self._note(sys._getframe(STEP_FRAMES))
            self._moment.spent = self._moment.over
            self._in_closure = len(args) > 1 or bool(kwargs)  # the first is the optimizer
            if not (self._backward_seen or self._in_closure):
                self._moment.over = True
                if not self._history.add(None):
                    self._bad(sys._getframe(STEP_FRAMES))
            if self._pending is not None and not _is_skipped(optimizer) and self._history.still_bad():
                self._report(self._pending)
            self._backward_seen = False
        self.steps += 1

    def _note(self, frame: FrameType) -> None:
        """Where the optimizer's step is called, and parameters that it was given meanwhile."""
        self._update = calls(frame, UPDATE_DEPTH, self._frame)
        members = self._members_now()
        if len(members) != len(self._members) or (not self.steps and self._history.waits):
            self._members = members
            self._moment.parameters = parameters = self._parameters()
            self._history.follow(parameters)

    def _find(self, frame: FrameType | None, symptom: str) -> Diagnosis:
        model = getattr(self._model, "_orig_mod", self._model)  # of a compiled one
        number, optimizer = self.steps + (not self._in_closure), type(self._optimizer).__name__.lower()
        groups = getattr(self._optimizer, "param_groups", None) or [{}]
        rate = float(groups[0].get("lr", math.nan))
        update = user_place(self._update)
        step = Step(model, self._moment, frame, self._home, number, optimizer, rate, update, self._staged)
        return diagnose(step, self._history.health(number), symptom)

    @contextmanager
    def _staged(self, stage: Stage) -> Iterator[None]:
        beside = [w for w in _watching.values() if w is not self and w._is_here(get_ident())]
        for watch in beside:
            watch._set_stage(Aside())
        self._set_stage(stage)
        try:
            yield
        finally:
            for watch in (self, *beside):
                watch._set_stage(None)

    def _set_stage(self, stage: Stage | Aside | None) -> None:
        self._stage = self._call.stage = stage

    def _is_here(self, thread: int) -> bool:
        return thread in (self._thread, self._moment.thread)

    def _report(self, found: Diagnosis) -> None:
        self.diagnosis = found
        self._call.__exit__()
        self._moment.forget()
        if self._stop:
            raise message(found)


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler leaves the skipping of bad steps to the optimizer itself, a fused one."""
    return getattr(optimizer, "found_inf", None) is not None


_watching: dict[int, LoopWatch] = {}  # those that have begun and not ended


def _members(optimizer: Any) -> dict[Tensor, None]:
    """An optimizer's parameters."""
    return {p: None for g in getattr(optimizer, "param_groups", ()) for p in g["params"]}


def _home(frame: FrameType | None) -> CodeType | None:
    """The user's function that watches: it may do so through an `ExitStack`."""
    while frame is not None and not is_user_frame(frame):
        frame = frame.f_back
    return None if frame is None else frame.f_code
