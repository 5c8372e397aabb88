"""Loss scaling for fp16 without asking the device a question at every step.

`torch.amp.GradScaler` reads its overflow flag on the host before each optimizer step, which makes a GPU wait. Here the
step is always made, and taken back on the device where the flag is set. Same schedule as GradScaler: the scale starts
at 2**16, halves after an overflow, and doubles after 2,000 steps without one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

INITIAL, BACKOFF, GROWTH, GROWTH_INTERVAL = 65536.0, 0.5, 2.0, 2000


class LossScaler:
    def __init__(self, device: torch.device) -> None:
        self._scale = torch.full((), INITIAL, device=device)
        self._clean_steps = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._scale.to(loss.dtype) if loss.dtype != torch.float16 else loss.float() * self._scale

    def unscale(self, parameters: list[nn.Parameter]) -> Tensor:
        """Divide the gradients by the scale, zero them all if one is not finite; return that flag.

        At a scale of 1 or below it is no longer the scale that overflows: all become NaN, and the step is a bad one.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self._scale)
        overflow = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf))
        instead = torch.where(self._scale <= 1, torch.nan, 0.0)
        for gradient in gradients:
            gradient.copy_(torch.where(overflow, instead, gradient))
        return overflow

    def step(self, optimizer: Optimizer, parameters: list[nn.Parameter], overflow: Tensor) -> None:
        """Make the optimizer's step and, after an overflow, put parameters and state back as they were."""
        before = [p.detach().clone() for p in parameters]
        state = {
            (p, key): value.clone()
            for p in parameters
            for key, value in optimizer.state[p].items()
            if isinstance(value, Tensor)
        }
        optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(torch.where(overflow, old, parameter))
            for p in parameters:
                for key, value in optimizer.state[p].items():
                    if isinstance(value, Tensor):
                        _restore(value, state.get((p, key)), overflow)
        self._update(overflow)

    def _update(self, overflow: Tensor) -> None:
        self._scale, self._clean_steps = next_scale(self._scale, self._clean_steps, overflow)


def next_scale(scale: Tensor, clean_steps: Tensor, overflow: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and the steps since an overflow, after a step with one or without: of one trial, or of lanes."""
    clean = torch.where(overflow, 0.0, clean_steps + 1)
    grow = clean >= GROWTH_INTERVAL
    scaled = scale * torch.where(overflow, BACKOFF, torch.where(grow, GROWTH, 1.0))
    return torch.where(torch.isfinite(scaled), scaled, scale), torch.where(grow, 0.0, clean)


def _restore(value: Tensor, old: Tensor | None, overflow: Tensor) -> None:
    """State made by this very step goes back to zero, which is what torch.optim starts it from."""
    start = torch.zeros_like(value) if old is None else old
    value.copy_(torch.where(overflow.to(value.device), start, value))
