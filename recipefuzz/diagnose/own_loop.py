"""`recipefuzz.watch`: the first value that is not finite, found in the user's own training loop.

After each backward pass the loss and the gradients are looked at in one go. At that moment the parameters are
still those of the forward pass, so a bad step can be replayed without a copy of the model having been kept. What was
found is reported at the optimizer's step: a gradient scaler, or a loop with a check of its own, may skip that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.compiler import is_dynamo_compiling

from recipefuzz.diagnose.history import History
from recipefuzz.diagnose.moment import Moment
from recipefuzz.diagnose.own_step import Stage, Step, diagnose, message
from recipefuzz.diagnose.rerun import Calls, calls, steady, user_place
from recipefuzz.diagnosis import Diagnosis

MODEL_FRAMES = 2  # from `_WatchedCall` to who calls the model: from torch 2.6 on the other is its own
PLACE = "_compiled_call_impl"  # of a module, which its copies and checkpoints don't take along
BACKWARD_FRAMES = 2  # from `_backward` to who calls the function that it stands behind
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
        self._stage: Stage | None = None
        self._pending: Diagnosis | None = None
        self._skipped = 0
        self._in_closure = False
        self._backward_seen = False
        self._update: Calls = []
        self._frame: FrameType | None = None  # what calls it only waits: no step meets outside of it

    def __enter__(self) -> Self:
        parameters = {id(p): p for g in self._optimizer.param_groups for p in g["params"]}
        parameters |= {id(p): p for p in self._model.parameters()}
        self._frame = steady(sys._getframe(1))
        self._history = History(list(parameters.values()))
        self._moment = Moment(self._model, list(parameters.values()), self._frame, self._history.held)
        self._call = _WatchedCall(self._model, self._moment)
        self._hooks.enter_context(self._call)
        self._hooks.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)
        self._hooks.enter_context(_after_backward(self._backward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        with self._hooks:
            if kind is None and self.diagnosis is None and self._history.parameters_are_bad():
                self._report(self._find(None, "a parameter"))
        self._moment.forget()
        self._frame = None
        return False

    def _backward(self, loss: Tensor | None) -> None:
        """A backward pass is over; gradients are not yet clipped, unscaled or applied."""
        if self._stage is not None:
            self._stage.backward(loss)
        elif self.diagnosis is None:
            moment = self._moment
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

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stage is None and self.diagnosis is None:
            if self.steps % NOTED == 0:
                self._update = calls(sys._getframe(2), UPDATE_DEPTH, self._frame)
            self._in_closure = len(args) > 1 or bool(kwargs)  # the first is the optimizer
            if not (self._backward_seen or self._in_closure or self._history.add(None)):
                self._bad(None)
            if self._pending is not None and not _is_skipped(optimizer) and self._history.still_bad():
                self._report(self._pending)
            self._backward_seen = False
        self.steps += 1

    def _find(self, frame: FrameType | None, symptom: str) -> Diagnosis:
        model = getattr(self._model, "_orig_mod", self._model)  # of a compiled one
        number, optimizer = self.steps + (not self._in_closure), type(self._optimizer).__name__.lower()
        rate = float(self._optimizer.param_groups[0]["lr"])
        step = Step(model, self._moment, frame, number, optimizer, rate, user_place(self._update), self._staged)
        return diagnose(step, self._history.health(number), symptom)

    @contextmanager
    def _staged(self, stage: Stage) -> Iterator[None]:
        self._stage = self._call.stage = stage
        try:
            yield
        finally:
            self._stage = self._call.stage = None

    def _report(self, found: Diagnosis) -> None:
        self.diagnosis = found
        if self._stop:
            raise message(found)


class _WatchedCall:
    """What a model is called through while it is watched, in the place where `Module.compile` puts its own.

    A forward pre-hook would cost 5 us more a step, and would go with every copy and checkpoint of the model.

    Attributes:
        stage: of a replay, which says what the model is to be called with.
    """

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self.stage: Stage | None = None
        self._moment, self._attributes = moment, vars(model)
        self._earlier = self._attributes.get(PLACE)
        self._call = self._earlier or model._call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_dynamo_compiling():
            if self.stage is not None:
                args, kwargs = self.stage.inputs(args, kwargs)
            elif torch.is_grad_enabled():
                self._moment.enter(args, kwargs, sys._getframe(MODEL_FRAMES))
        return self._call(*args, **kwargs)

    def __enter__(self) -> None:
        self._attributes[PLACE] = self

    def __exit__(self, *_: object) -> None:
        if self._attributes.get(PLACE) is self:
            del self._attributes[PLACE]
            if self._earlier is not None:
                self._attributes[PLACE] = self._earlier

    def __deepcopy__(self, _memo: Any) -> None:
        """A copy of the module is not watched."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler leaves the skipping of bad steps to the optimizer itself, a fused one."""
    return getattr(optimizer, "found_inf", None) is not None


@contextmanager
def _after_backward(then: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Call it with the loss after each backward pass, `Tensor.backward()` and `torch.autograd.backward` alike."""
    original = torch.autograd.backward

    @wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        original(tensors, grad_tensors, *args, **kwargs)
        if not is_dynamo_compiling():
            then(tensors if grad_tensors is None and isinstance(tensors, Tensor) else _loss(tensors))

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def _loss(tensors: Any) -> Tensor | None:
    """What a backward pass began with; None if it isn't one number."""
    first = tensors if isinstance(tensors, (Tensor, GradientEdge)) else tensors[0]
    return first if isinstance(first, Tensor) and first.numel() == 1 else None
