"""What each step of the user's own loop had for a loss and gradients: read in one go, kept as plain numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recipefuzz.diagnose.explosions import ADAPTIVE, Health
from recipefuzz.diagnose.tensors import is_finite
from recipefuzz.evidence import median
from recipefuzz.trace import LEAST_NORM

USUAL = 1000  # last sizes of the gradient that say what is usual
LARGE = 2**17  # elements from which on a gradient is summed in less time than it is written


class History:
    """The losses and the sizes of the gradients, of the steps that were finite.

    On a CPU the size is that of the large gradients' sums, or of the largest's: a norm takes three times as long.

    Args:
        parameters: whose gradients are read.
        optimizer: in lower case. The steps of an adaptive one don't grow with the gradient: no size is asked for.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: str) -> None:
        self._parameters = parameters
        self._on_cpu = all(p.device.type == "cpu" for p in parameters)
        self._summed = [p for p in parameters if p.numel() >= LARGE]
        if not self._summed and optimizer not in ADAPTIVE:
            self._summed = sorted(parameters, key=lambda p: p.requires_grad * p.numel())[-1:]
        summed = {id(p) for p in self._summed}
        self._checked = [p for p in parameters if id(p) not in summed]
        self._found, self._one = torch.zeros(()), torch.ones(())
        self._weight = self._parameter_norm()
        self._sizes: deque[float] = deque(maxlen=USUAL)
        self._first_loss = self._loss = math.nan
        self._loss_is_bad = False

    def add(self, loss: Tensor | None) -> str:
        """A step's; what is not finite in it, in words. The hot path of every watched step."""
        value = loss.item() if loss is not None and loss.numel() == 1 else math.nan
        self._loss_is_bad = not math.isfinite(value) and loss is not None and loss.numel() == 1
        size = self._size() if self._on_cpu else self._norm()
        if not math.isfinite(size) and self.gradients_are_bad():
            return "the loss" if self._loss_is_bad else "a gradient"
        if self._loss_is_bad:
            return "the loss"
        self._sizes.append(size)
        if math.isnan(self._first_loss):
            self._first_loss = value
        self._loss = value
        return ""

    def _size(self) -> float:
        """Of the gradients on a CPU; infinite where an element may not be finite.

        The smaller ones are looked through by what `GradScaler.unscale_` calls, with a scale of 1: each element is
        written as it is. That allocates nothing, and takes a third of a sum's time for a few elements.
        """
        gradients = [g for p in self._checked if (g := p.grad) is not None]
        recorded = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a fifth of the time of `torch.no_grad()`
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found, self._one)
            sums = [abs(g.sum().item()) for p in self._summed if (g := p.grad) is not None]
        except RuntimeError:  # for sparse and complex gradients, and those with several elements in one place
            self._on_cpu = False
            return self._norm()
        finally:
            torch._C._set_grad_enabled(recorded)
        if self._found.item():
            self._found.zero_()
            return math.inf
        return math.hypot(*sums)

    def _norm(self) -> float:
        """One kernel and one question for each device."""
        groups: dict[torch.device, list[Tensor]] = {}
        for gradient in _gradients(self._parameters):
            groups.setdefault(gradient.device, []).append(gradient)
        return math.hypot(*(n for group in groups.values() for n in torch.stack(torch._foreach_norm(group)).tolist()))

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
