"""What is recorded of each training step, without reading the device: six numbers and a flag."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm


class Recorder:
    """Collects a model's steps.

    One flat copy of the parameters is kept, and a few dot products are taken at each step: on a CPU that is a tenth
    of what `isfinite(...).all()` and its like cost on a wide model, and for a small one it is a few launches.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        weights = [p for p in parameters if p.dim() >= 2]
        self._parameters = [*weights, *(p for p in parameters if p.dim() < 2)]
        self._weights = sum(p.numel() for p in weights) or sum(p.numel() for p in parameters)
        self._flat = self._copy()
        self._zeros = torch.zeros_like(self._flat)
        self._sizes = self._norms(self._flat)
        self._rows: list[Tensor] = []

    def _copy(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def _norms(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """L2 norms of the weights' part of a flat vector and of all of it."""
        return vector_norm(flat[: self._weights]), vector_norm(flat)

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Record a step that was just made: its loss and gradient norm, scalars on the device."""
        after = self._copy()
        weights_moved, moved = self._norms(after - self._flat)
        # 0 unless an element is inf or NaN; a norm could overflow with every element finite
        broken = torch.dot(after, self._zeros)
        numbers = (loss.reshape(()), grad_norm, moved, weights_moved, *self._sizes, broken)
        self._rows.append(torch.stack([n.float() for n in numbers]))
        self._flat, self._sizes = after, self._norms(after)

    def all_finite(self) -> bool:
        """Whether no step since was bad. Reads the device."""
        return not self._rows or not bool(with_bad_flag(torch.stack(self._rows))[:, -1].any())

    def take(self) -> Tensor:
        """All steps since: loss; norms of gradient, update, weights' change, weights, parameters; bad?: (steps, 7)."""
        rows = torch.stack(self._rows)
        self._rows.clear()
        return with_bad_flag(rows)


def with_bad_flag(recorded: Tensor) -> Tensor:
    """(steps, 7, ...) with the last column, NaN if a parameter is not finite, made a flag: 1 for a bad step, else 0.

    Bad is a step with a loss or a parameter that is not finite, or NaN in the gradient. A gradient norm of inf is not
    enough: the squares of finite gradients can overflow in their sum, and clipping then makes an empty step.
    """
    loss, gradient, broken = recorded[:, 0], recorded[:, 1], recorded[:, 6]
    bad = ~torch.isfinite(loss) | torch.isnan(broken) | torch.isnan(gradient)
    return torch.cat([recorded[:, :6], bad[:, None].float()], dim=1)
