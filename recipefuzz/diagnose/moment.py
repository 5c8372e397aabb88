"""What a step of the user's own loop began with, kept at a few microseconds a step, so that it can be replayed.

Parameters need no copy: they change at the optimizer's step, and a step is looked at before that. Inputs are kept by
reference, random numbers by their generators' states, once a step was seen to draw some; of the large buffers only
those that were written are copied, and none of batch norm's, which it doesn't read while it trains.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from recipefuzz.diagnose.rerun import Calls, calls
from recipefuzz.diagnose.tensors import is_finite, storage
from recipefuzz.diagnose.undone import undone

SMALL = 4096  # elements of a buffer that is copied at every step: kernels, and writes to `data`, are unannounced
SYNCS = ("require_backward_grad_sync", "require_forward_param_sync")
BEGINNINGS = 4  # of a replay that are tried
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
        kept: the first of the forward passes.
        parameters: of the model and of the optimizers.
        thread: in which the model was called last.
        spent: whether the optimizer has stepped after it, too.
        asks: whether this step is asked if it draws random numbers.
        drew_anew: a replay drew random numbers that are not those of the step: their state had not been kept.
    """

    def __init__(
        self, model: nn.Module, parameters: list[Tensor], outermost: FrameType | None, held: list[Tensor]
    ) -> None:
        self.backwards = 0
        self.over = True
        self.thread = get_ident()
        self.parameters = parameters
        self.spent = self.asks = self.drew_anew = False
        self.kept: list[tuple[Any, ...]] = []
        self._outermost, self._held = outermost, held
        self._device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
        self._on_cuda = self._device.type == "cuda"
        self._model = model
        self._buffers = _Buffers(model)
        self._steps = 0
        self._draws = False

    @property
    def forwards(self) -> list[Forward]:
        """The first of them; in a replay those after them take what they are given then."""
        return [Forward(*kept) for kept in self.kept]

    @property
    def beginnings(self) -> list[list[Forward]]:
        """Those that a replay can begin with: the first, and the first of each other place in the code.

        For a loop may look at the model's outputs before its step, with gradients enabled, or have a tracer call it.
        """
        forwards, seen, found = self.forwards, set(), []
        for i, forward in enumerate(forwards):
            place = tuple(forward.calls)
            if place not in seen:
                seen.add(place)
                found.append(forwards[i:])
        return found[:BEGINNINGS]

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        """A forward pass begins, called from a frame; the first after a backward pass begins another step."""
        if self.over:
            self.over = self.spent = False
            self.backwards, self.kept = 0, []
            self.thread = get_ident()
            self._held.clear()
            self.asks = not self._draws and self._steps % DRAWS_AT == 0
            self._steps += 1
            for buffer in self._buffers.copied:
                buffer.copy()
        if len(self.kept) < MOST:
            random = self.random() if self._draws or self.asks else ()
            self.kept.append((args, kwargs, random, calls(frame, outermost=self._outermost)))

    def ask(self) -> None:
        """At its end: whether a step that is asked has drawn random numbers."""
        if self.kept:
            self._draws = not _same(self.kept[0][2], self.random())
        self.asks = False

    def forget(self) -> None:
        self.spent = False
        self.backwards, self.kept = 0, []
        self._held.clear()

    def end(self) -> None:
        """Let go of the user's function, too."""
        self.forget()
        self._outermost = None

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
    def back(self, forwards: Sequence[Forward]) -> Iterator[None]:
        """The state at the start of a step's forward passes; on the way out, all is as it was before."""
        random = self.random()
        gradients = [(p, p.grad) for p in _with_gradients() | dict.fromkeys(self.parameters)]
        values = [(p, p.data) for p in self.parameters if not is_lazy(p)]
        modules = [(m, dict(vars(m))) for m in self._model.modules()]
        for leaf, _ in gradients:
            leaf.grad = None
        kept = forwards[0].random if forwards else ()
        self.set_random(kept)
        try:
            with self._buffers.back(), _alone(), undone():
                yield
        finally:
            self.drew_anew |= not (kept or self._draws or _same(random, self.random()))
            self.set_random(random)
            for module, attributes in modules:
                vars(module).update(attributes)
            for parameter, value in values:
                if storage(parameter) != storage(value):
                    parameter.data = value
            for leaf, gradient in gradients:
                leaf.grad = gradient


@contextmanager
def _alone() -> Iterator[None]:
    """Without the other processes of a distributed model, which may not replay the step, or not as often."""
    kind = nn.parallel.DistributedDataParallel
    models = [o for o in gc.get_objects() if type(o) is kind] if _is_distributed() else []
    kept = [(m, {name: vars(m)[name] for name in SYNCS}) for m in models]
    for model in models:
        vars(model).update(dict.fromkeys(SYNCS, False))
    try:
        yield
    finally:
        for model, flags in kept:
            vars(model).update(flags)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_gradients() -> dict[Tensor, None]:
    """Leaves of graphs, wherever they are: a replay's backward pass reaches other models, too."""
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return {t: None for t in found if t.requires_grad and t.is_leaf}


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


class _Buffers:
    """A model's buffers and what they held at the step's start; a module may write them or bind them anew."""

    def __init__(self, model: nn.Module) -> None:
        held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
        owners = [(m, name) for m, name, b in held if b is not None and not is_lazy(b)]
        self._all = [_Statistic(m, name) if _is_batch_norm(m) else _Buffer(m, name) for m, name in owners]
        self.copied = [b for b in self._all if isinstance(b, _Buffer)]

    @contextmanager
    def back(self) -> Iterator[None]:
        """As they were at the step's start, in memory of their own, so that the present ones stay what they are."""
        present = [(b, b.home[b.name]) for b in self._all if b.name in b.home]
        for buffer, _ in present:
            buffer.home[buffer.name] = buffer.earlier()
        try:
            yield
        finally:
            for buffer, value in present:
                buffer.home[buffer.name] = value


class _Buffer:
    """One of them, by its place in its module."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.home: dict[str, Tensor | None] = owner._buffers
        self.name = name
        self._bind()

    def _bind(self) -> None:
        seen = self._seen = self.home.get(self.name)
        self._kept = None if seen is None else seen.detach().clone()
        unversioned = seen is not None and seen.is_inference()
        self._version = 0 if seen is None or unversioned else seen._version
        self._always = seen is not None and (unversioned or seen.numel() <= SMALL)

    def copy(self) -> None:
        now = self.home.get(self.name)
        if now is not self._seen:
            self._bind()
        elif now is not None and self._kept is not None and (self._always or now._version != self._version):
            if now.requires_grad or now.shape != self._kept.shape or now.is_inference():
                self._bind()
            else:
                self._kept.copy_(now)
                self._version = now._version

    def earlier(self) -> Tensor | None:
        """What it was; the same tensor where it has not been written since."""
        now = self.home[self.name]
        if now is self._seen and now is not None and not self._always and now._version == self._version:
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
