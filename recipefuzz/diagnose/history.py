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

USUAL = 1000  # last sizes of the gradient that say what is usual


class History:
    """The losses and the sizes of the gradients, of the steps that were finite.

    On a CPU the size is that of the gradients' sums, which cost a third less than norms.

    Args:
        parameters: whose gradients are read.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._on_cpu = all(p.device.type == "cpu" for p in parameters)
        self._weight = self._parameter_norm()
        self._sizes: deque[float] = deque(maxlen=USUAL)
        self._first_loss = self._loss = math.nan
        self._loss_is_bad = False

    def add(self, loss: Tensor | None) -> str:
        """A step's; what is not finite in it, in words. The hot path of every watched step."""
        value = loss.item() if loss is not None and loss.numel() == 1 else math.nan
        self._loss_is_bad = not math.isfinite(value) and loss is not None and loss.numel() == 1
        if self._on_cpu:
            sums = [gradient.sum().item() for p in self._parameters if (gradient := p.grad) is not None]
        else:
            sums = self._norms()
        size = math.hypot(*map(abs, sums))
        if not math.isfinite(size) and self.gradients_are_bad():
            return "the loss" if self._loss_is_bad else "a gradient"
        if self._loss_is_bad:
            return "the loss"
        self._sizes.append(size)
        if math.isnan(self._first_loss):
            self._first_loss = value
        self._loss = value
        return ""

    def _norms(self) -> list[float]:
        """One kernel and one question for each device."""
        groups: dict[torch.device, list[Tensor]] = {}
        for gradient in _gradients(self._parameters):
            groups.setdefault(gradient.device, []).append(gradient)
        return [n for group in groups.values() for n in torch.stack(torch._foreach_norm(group)).tolist()]

    def gradients_are_bad(self) -> bool:
        """Looked at closely: a sum can overflow where no element does."""
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
        burst = max(self._sizes) / max(median(np.array(self._sizes)), LEAST_NORM) if self._sizes else 1.0
        swell = self._parameter_norm() / max(self._weight, LEAST_NORM)
        thrown = (swell - 1) / max(1, step - 1)  # of the largest update this is the least that it can have been
        return Health(step, swell, self._first_loss, self._loss, math.nan, thrown, burst)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]
