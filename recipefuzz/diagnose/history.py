"""What each step of the user's own loop had for a loss and gradients: read in one go, kept as plain numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recipefuzz.diagnose.explosions import Health
from recipefuzz.diagnose.tensors import is_finite
from recipefuzz.evidence import median
from recipefuzz.trace import LEAST_NORM

USUAL = 1000  # last gradient norms that say what is usual


class History:
    """The losses and gradient norms of the steps that were finite.

    Args:
        parameters: whose gradients are read.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._groups: dict[torch.device, list[Tensor]] = {}
        for parameter in parameters:
            self._groups.setdefault(parameter.device, []).append(parameter)
        self._size = self._parameter_norm()
        self._norms: deque[float] = deque(maxlen=USUAL)
        self._first_loss = self._loss = math.nan
        self._loss_is_bad = False

    def add(self, loss: Tensor | None) -> str:
        """A step's; what is not finite in it, in words."""
        values = self._read(loss)
        scalar = loss is not None and loss.numel() == 1
        self._loss_is_bad = scalar and not math.isfinite(values[-1])
        norm = math.hypot(*(values[:-1] if scalar else values))
        if math.isfinite(norm):
            self._norms.append(norm)
        elif self.gradients_are_bad():
            return "the loss" if self._loss_is_bad else "a gradient"
        if self._loss_is_bad:
            return "the loss"
        if scalar:
            self._loss = values[-1]
            if math.isnan(self._first_loss):
                self._first_loss = self._loss
        return ""

    def _read(self, loss: Tensor | None) -> list[float]:
        """The norms of the gradients, then the loss if it is a scalar; the device is asked once."""
        values: list[float] = []
        last = None if loss is None or loss.numel() != 1 else loss.reshape(())
        for device, group in self._groups.items():
            norms = list(torch._foreach_norm(gradients)) if (gradients := _gradients(group)) else []
            if last is not None and device == last.device and len(self._groups) == 1:
                norms, last = [*norms, last], None
            if norms:
                values += torch.stack(norms).tolist()
        return values if last is None else [*values, float(last)]

    def gradients_are_bad(self) -> bool:
        """Looked at closely: a norm can overflow where no element does."""
        return any(not is_finite(g) for g in _gradients(self._parameters))

    def still_bad(self) -> bool:
        """Whether what was found is so still, or the user's loop has mended its gradients."""
        return self._loss_is_bad or self.gradients_are_bad()

    def parameters_are_bad(self) -> bool:
        return any(not is_finite(p.detach()) for p in self._parameters)

    def _parameter_norm(self) -> float:
        return math.hypot(*(float(p.detach().norm()) for p in self._parameters if p.is_floating_point()))

    def health(self, step: int) -> Health:
        """How training was before a step; the weights are as that step found them."""
        burst = max(self._norms) / max(median(np.array(self._norms)), LEAST_NORM) if self._norms else 1.0
        swell = self._parameter_norm() / max(self._size, LEAST_NORM)
        return Health(step, swell, self._first_loss, self._loss, math.nan, 0.0, burst)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]
