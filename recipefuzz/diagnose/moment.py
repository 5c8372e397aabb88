"""What a step of the user's own loop began with, kept at a few microseconds a step, so that it can be replayed.

Parameters need no copy: they change at the optimizer's step, and a step is looked at before that. Inputs are kept by
reference, random numbers by their generators' states; of the large buffers only those that were written are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.rerun import Calls

SMALL = 4096  # elements of a buffer that is copied at every step: batch norm's kernels write theirs unannounced
MOST = 32  # forward passes of one step that are kept


class Forward(NamedTuple):
    """One call of the model: what it was given, the random state at its start, and who called it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: tuple[Tensor, ...]
    calls: Calls


class Moment:
    """The forward passes since the last backward pass.

    Attributes:
        forwards: those kept, in their order.
        backwards: backward passes since the first of them.
        parameters: of the model and of the optimizers.
    """

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self.forwards: deque[Forward] = deque(maxlen=MOST)
        self.backwards = 0
        self.parameters = parameters
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._on_cuda = self._device.type == "cuda"
        self._buffers = list(model.buffers())
        self._versions = [b._version for b in self._buffers]
        self._copies = [b.clone() for b in self._buffers]
        self._over = True

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Calls) -> None:
        """A forward pass begins; the first after a backward pass begins another step."""
        if self._over:
            self._over, self.backwards = False, 0
            self.forwards.clear()
            if self._buffers:
                self._copy_buffers()
        self.forwards.append(Forward(args, kwargs, self.random(), calls))

    def leave(self) -> None:
        """A backward pass is over."""
        self._over = True
        self.backwards += 1

    def random(self) -> tuple[Tensor, ...]:
        """The state of the random generators that the model draws from."""
        own = torch.default_generator.get_state()
        return (own, torch.cuda.get_rng_state(self._device)) if self._on_cuda else (own,)

    def set_random(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    def _copy_buffers(self) -> None:
        if changed := self._changed():
            buffers = [self._buffers[i] for i in changed]
            torch._foreach_copy_([self._copies[i] for i in changed], buffers)
            for i, buffer in zip(changed, buffers, strict=True):
                self._versions[i] = buffer._version

    def _changed(self) -> list[int]:
        """Which buffers may have been written since they were copied."""
        return [i for i, b in enumerate(self._buffers) if b._version != self._versions[i] or b.numel() <= SMALL]

    @contextmanager
    def back(self) -> Iterator[None]:
        """The state at the step's start; on the way out, all is as it was before."""
        random, gradients = self.random(), [p.grad for p in self.parameters]
        changed = {i: self._buffers[i].clone() for i in self._changed()}
        with torch.no_grad():
            for i in changed:
                self._buffers[i].copy_(self._copies[i])
        for parameter in self.parameters:
            parameter.grad = None
        if self.forwards:
            self.set_random(self.forwards[0].random)
        try:
            yield
        finally:
            self.set_random(random)
            with torch.no_grad():
                for i, value in changed.items():
                    self._buffers[i].copy_(value)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
