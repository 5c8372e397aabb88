"""The optimizers of torch.optim for lanes: each lane's parameters are one row, with settings of its own.

The same formulas as torch's (`torch/optim/sgd.py`, `adam.py`, `adamw.py`, `rmsprop.py`, with their defaults), on
(lanes, parameters) and with columns (lanes, 1) where torch has numbers. Optimizers of one family share a program: plain
SGD is momentum 0, and Adam differs from AdamW in what its weight decay is added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recipefuzz.engines import prepare
from recipefuzz.recipe import Recipe

MOMENTUM = float(prepare.OPTIMIZERS["momentum"][1]["momentum"])
BETA1, BETA2, ALPHA, EPS, ADAMW_DECAY = 0.9, 0.999, 0.99, 1e-8, 0.01  # torch's defaults


class LaneUpdate:
    """State and settings of the lanes' optimizers.

    Args:
        family: a value of `job.FAMILIES`.
        size: parameters of a lane.
        used: 1 for parameters that get gradients and 0 for those that torch.optim would leave alone, (size,);
            None where all do.
    """

    def __init__(self, family: str, size: int, used: Tensor | None, device: torch.device) -> None:
        self._family, self._used, self._device = family, used, device
        self.state = [torch.zeros(0, size, device=device) for _ in range(2 if family == "adam" else 1)]
        self.steps = torch.zeros(0, 1, dtype=torch.float64, device=device)

    def keep(self, index: Tensor, kept: Sequence[Recipe], new: Sequence[Recipe]) -> None:
        """Go on with some lanes, in this order, and with new ones after them."""
        self.state = [with_zeros(s, index, len(new)) for s in self.state]
        self.steps = with_zeros(self.steps, index, len(new))
        self._set([*kept, *new])

    def _set(self, recipes: Sequence[Recipe]) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]

        usual = [ADAMW_DECAY if r.optimizer == "adamw" else 0.0 for r in recipes]
        decays = [u if r.weight_decay is None else r.weight_decay for r, u in zip(recipes, usual, strict=True)]
        apart = [r.optimizer == "adamw" for r in recipes]
        added = [0.0 if a else d for a, d in zip(apart, decays, strict=True)]
        shrunk = [d if a else 0.0 for a, d in zip(apart, decays, strict=True)]
        self._decay = self._on_used(column(added)) if any(added) else None
        self._shrink = self._on_used(column(shrunk)) if any(shrunk) else None
        self._momentum = column([MOMENTUM if r.optimizer == "momentum" else 0.0 for r in recipes])

    def _on_used(self, decay: Tensor) -> Tensor:
        return decay if self._used is None else decay * self._used

    def apply(self, parameters: Tensor, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """One step: (lanes, size) parameters and gradients, learning rates (lanes, 1); the result is written to `out`.

        `gradient` may be overwritten.
        """
        if self._decay is not None:
            gradient = torch.addcmul(gradient, parameters, self._decay, out=gradient)
        if self._shrink is not None:
            parameters = parameters * (1 - rate * self._shrink)
        if self._family == "sgd":
            (buffer,) = self.state
            torch.addcmul(gradient, buffer, self._momentum, out=buffer)
            torch.addcmul(parameters, buffer, -rate, out=out)
        elif self._family == "rmsprop":
            (square,) = self.state
            square.mul_(ALPHA).addcmul_(gradient, gradient, value=1 - ALPHA)
            torch.addcdiv(parameters, gradient * -rate, square.sqrt().add_(EPS), out=out)
        else:
            self.steps += 1
            mean, square = self.state
            mean.lerp_(gradient, 1 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            spread = square.sqrt().div_((1 - BETA2**self.steps).sqrt().float()).add_(EPS)
            size = (-rate / (1 - BETA1**self.steps)).float()
            torch.addcdiv(parameters, mean * size, spread, out=out)

    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.state, self.steps]


def with_zeros(tensor: Tensor, index: Tensor, new: int) -> Tensor:
    """Some rows of a tensor, and new ones of zeros after them."""
    return torch.cat([tensor[index], tensor.new_zeros(new, *tensor.shape[1:])])
