"""What a step of the user's own loop began with, kept at a few microseconds a step, so that it can be replayed.

Parameters need no copy: they change at the optimizer's step, and a step is looked at before that. Inputs are kept by
reference, random numbers by their generators' states, once a step was seen to draw some; of the large buffers only
those that were written are copied, and none of batch norm's, which it doesn't read while it trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from recipefuzz.diagnose.rerun import Calls, calls
from recipefuzz.diagnose.tensors import is_finite

SMALL = 4096  # elements of a buffer that is copied at every step: kernels, and writes to `data`, are unannounced
MOST = 32  # forward passes of one step whose inputs are kept
DRAWS_AT = 64  # of so many steps one is asked whether it draws random numbers, until one does


class Forward(NamedTuple):
    """One call of the model: what it was given, the random state at its start if that was kept, and who called it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: tuple[Tensor, ...]
    calls: Calls


class Moment:
    """The forward passes since the last backward pass.

    Args:
        outermost: the function whose callers are of no interest.
        held: what is to be let go of when a step begins.

    Attributes:
        backwards: backward passes since the first of them.
        over: whether there was one, so that the next forward pass begins another step.
        parameters: of the model and of the optimizers.
        asks: whether this step is asked if it draws random numbers.
        drew_anew: a replay drew random numbers that are not those of the step: their state had not been kept.
    """

    def __init__(
        self, model: nn.Module, parameters: list[Tensor], outermost: FrameType | None, held: list[Tensor]
    ) -> None:
        self.backwards = 0
        self.over = True
        self.parameters = parameters
        self.asks = self.drew_anew = False
        self._forwards: list[tuple[Any, ...]] = []
        self._outermost, self._held = outermost, held
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._on_cuda = self._device.type == "cuda"
        self._model = model
        self._buffers = _Buffers(model)
        self._steps = 0
        self._draws = False

    @property
    def forwards(self) -> list[Forward]:
        """The first of them; in a replay those after them take what they are given then."""
        return [Forward(*kept) for kept in self._forwards]

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        """A forward pass begins, called from a frame; the first after a backward pass begins another step."""
        if self.over:
            self.over, self.backwards, self._forwards = False, 0, []
            self._held.clear()
            self.asks = not self._draws and self._steps % DRAWS_AT == 0
            self._steps += 1
            for buffer in self._buffers.copied:
                buffer.copy()
        if len(self._forwards) < MOST:
            random = self.random() if self._draws or self.asks else ()
            self._forwards.append((args, kwargs, random, calls(frame, outermost=self._outermost)))

    def ask(self) -> None:
        """At its end: whether a step that is asked has drawn random numbers."""
        if self._forwards:
            self._draws = not _same(self._forwards[0][2], self.random())
        self.asks = False

    def forget(self) -> None:
        self._forwards, self._outermost = [], None
        self._held.clear()

    def random(self) -> tuple[Tensor, ...]:
        """The state of the random generators that the model draws from."""
        own = torch.default_generator.get_state()
        return (own, torch.cuda.get_rng_state(self._device)) if self._on_cuda else (own,)

    def set_random(self, states: tuple[Tensor, ...]) -> None:
        if states:
            torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    @contextmanager
    def back(self) -> Iterator[None]:
        """The state at the step's start; on the way out, all is as it was before."""
        random, gradients = self.random(), [p.grad for p in self.parameters]
        modules = [(m, dict(vars(m))) for m in self._model.modules()]
        for parameter in self.parameters:
            parameter.grad = None
        kept = self.forwards[0].random if self.forwards else ()
        self.set_random(kept)
        try:
            with self._buffers.back():
                yield
        finally:
            self.drew_anew |= not kept and not _same(random, self.random())
            self.set_random(random)
            for module, attributes in modules:
                vars(module).update(attributes)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


class _Buffers:
    """A model's buffers and what they held at the step's start; a module may write them or bind them anew."""

    def __init__(self, model: nn.Module) -> None:
        owners = [(m, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._all = [_Statistic(m, name) if _is_batch_norm(m) else _Buffer(m, name) for m, name in owners]
        self.copied = [b for b in self._all if isinstance(b, _Buffer)]

    @contextmanager
    def back(self) -> Iterator[None]:
        """As they were at the step's start, in memory of their own, so that the present ones stay what they are."""
        present = [b.home[b.name] for b in self._all]
        for buffer in self._all:
            buffer.home[buffer.name] = buffer.earlier()
        try:
            yield
        finally:
            for buffer, value in zip(self._all, present, strict=True):
                buffer.home[buffer.name] = value


class _Buffer:
    """One of them, by its place in its module."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.home: dict[str, Tensor | None] = owner._buffers
        self.name = name
        self._bind()

    def _bind(self) -> None:
        self._seen = self.home[self.name]
        self._kept = None if self._seen is None else self._seen.clone()
        self._version = 0 if self._seen is None else self._seen._version
        self._small = self._seen is not None and self._seen.numel() <= SMALL

    def copy(self) -> None:
        now = self.home[self.name]
        if now is not self._seen:
            self._bind()
        elif now is not None and self._kept is not None and (self._small or now._version != self._version):
            self._kept.copy_(now)
            self._version = now._version

    def earlier(self) -> Tensor | None:
        """What it was; the same tensor where it has not been written since."""
        now = self.home[self.name]
        if now is self._seen and now is not None and now._version == self._version and not self._small:
            return now
        return None if self._kept is None else self._kept.clone()


class _Statistic:
    """A running statistic of batch norm: as it is now, or as it was at first where the failing batch has spoilt it."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.home: dict[str, Tensor | None] = owner._buffers
        self.name = name
        self._owner, self._first = owner, owner.get_buffer(name).clone()

    def earlier(self) -> Tensor:
        now = self._owner.get_buffer(self.name)
        return (self._first if self._owner.training and not is_finite(now) else now).clone()


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it writes its buffers in training and reads them in evaluation only: not so in a class of the user's."""
    return isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward
