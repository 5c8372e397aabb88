"""What each step of the user's own loop had for a loss and gradients: read in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from recipefuzz.diagnose.explosions import Health
from recipefuzz.diagnose.tensors import is_finite
from recipefuzz.trace import LEAST_NORM

finite_loss: Callable[[Tensor | None, list[Tensor], list[Tensor]], float | None] | None
try:
    from recipefuzz.diagnose._finite import finite_loss
except ImportError:  # it was not compiled, or this torch is older than 2.10
    finite_loss = None

NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # numbers that torch has a norm of
SMALL = 65536  # elements of a gradient: larger ones are summed by torch, which shares them among its threads


class History:
    """The losses of the steps that were finite, and whether one is.

    On a CPU the loss and small gradients are read by a function in C, in one call for all: torch's own operations cost
    several microseconds each between two steps. What it doesn't read is summed; on other devices norms are asked for.

    Args:
        parameters: whose gradients are read.

    Attributes:
        held: the small gradients that were read last. Asking a parameter for its gradient makes a Python object; while
            these live, the optimizer finds its own made, which saves what reading cost.
        waits: whether some of them get their shapes in the first forward pass.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._first_loss: float | None = None
        self._loss = math.nan
        self._loss_is_bad = False
        self.held: list[Tensor] = []
        self.follow(parameters)

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Read those gradients from now on; the weights are compared with what they are now."""
        self._parameters = parameters
        self._present = [p for p in parameters if not (is_lazy(p) or p.is_meta)]
        self.waits = len(self._present) < len(parameters)
        self._weight = self._parameter_norm()
        self._sound = [p for p in self._present if is_finite(p.detach())]
        self._on_cpu = all(p.device.type == "cpu" for p in self._present)
        self._small = [p for p in self._present if p.numel() <= SMALL]
        small = {id(p) for p in self._small}
        self._large = [p for p in parameters if id(p) not in small]

    def add(self, loss: Tensor | None) -> bool:
        """Whether a step's loss and gradients are finite. The hot path of every watched step, so all is in one place.

        Args:
            loss: None where there is none, or it isn't one number.
        """
        self.held.clear()
        value = finite_loss(loss, self._small, self.held) if finite_loss and self._on_cpu else None
        unread = self._large if value is not None else self._parameters
        if value is None:
            value = 0.0 if loss is None else loss.item()
        total = value
        if self._on_cpu:
            for p in unread:
                if (gradient := p.grad) is not None:
                    total += gradient.sum().item()
        else:
            total += self._norm()
        if total - total != 0:
            self._loss_is_bad = not math.isfinite(value)
            if self._loss_is_bad or self.gradients_are_bad():
                return False
        if self._first_loss is None:
            self._first_loss = value
        self._loss = value
        return True

    @property
    def symptom(self) -> str:
        """What was not finite in the last step that was not, in words."""
        return "the loss" if self._loss_is_bad else "a gradient"

    def _norm(self) -> float:
        """Of gradients on any devices: one kernel and one question for each; it can overflow where no element does."""
        groups: dict[torch.device, list[Tensor]] = {}
        for p in self._parameters:
            if p.grad is not None:
                groups.setdefault(p.device, []).append(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
        norms = (n for group in groups.values() for n in torch.stack(torch._foreach_norm(group)).tolist())
        return math.hypot(*norms)

    def gradients_are_bad(self) -> bool:
        """Looked at one by one."""
        return any(not is_finite(p.grad) for p in self._parameters if p.grad is not None)

    def still_bad(self) -> bool:
        """Whether what was found is so still, or the user's loop has mended its gradients."""
        return self._loss_is_bad or self.gradients_are_bad()

    def parameters_are_bad(self) -> bool:
        """But for those that were when the watch began: a mask of -inf."""
        return any(not is_finite(p.detach()) for p in self._sound)

    def _parameter_norm(self) -> float:
        return math.hypot(*(float(p.detach().norm()) for p in self._present if p.dtype in NORMED))

    def health(self, step: int) -> Health:
        """How training was before a step; the weights are as that step found them."""
        swell = self._parameter_norm() / max(self._weight, LEAST_NORM)
        thrown = (swell - 1) / max(1, step - 1)  # of the largest update this is the least that it can have been
        first = math.nan if self._first_loss is None else self._first_loss
        return Health(step, swell, first, self._loss, math.nan, thrown, 1.0)
