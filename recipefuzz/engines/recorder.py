"""What is recorded of each training step, without reading the device: six numbers and a flag."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BYTES = 2**26  # of parameter snapshots that are kept before they are reduced to norms; one for a large model


class Recorder:
    """Collects a model's steps.

    The parameters are copied after each step, into one vector, and norms are taken of many copies at once: for a
    small model the copy costs a few microseconds, and launching five reductions a step would cost more than
    the optimizer.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        weights = [p for p in parameters if p.dim() >= 2]
        self._parameters = [*weights, *(p for p in parameters if p.dim() < 2)]
        self._weights = sum(p.numel() for p in weights) or sum(p.numel() for p in parameters)
        self._snapshots = [self._snapshot()]
        self._most = max(1, BYTES // max(1, self._snapshots[0].nbytes))
        self._losses: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._reduced: list[Tensor] = []

    def _snapshot(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Record a step that was just made: its loss and gradient norm, scalars on the device."""
        self._losses.append(loss)
        self._gradients.append(grad_norm)
        self._snapshots.append(self._snapshot())
        if len(self._losses) >= self._most:
            self._reduce()

    def take(self) -> Tensor:
        """All steps since: loss; norms of gradient, update, weights' change, weights, parameters; bad?: (steps, 7)."""
        self._reduce()
        rows = torch.cat(self._reduced)
        self._reduced.clear()
        return rows

    def _reduce(self) -> None:
        """Turn the snapshots into norms.

        Bad is a step with a loss or a parameter that is not finite, or NaN in the gradient. A gradient norm of
        inf is not enough: the squares of finite gradients can overflow in their sum, and clipping then makes an
        empty step. Where an element is inf, the update carries it into a parameter.
        """
        if not self._losses:
            return
        parameters = torch.stack(self._snapshots)
        before, after = parameters[:-1], parameters[1:]
        change, some = after - before, slice(0, self._weights)
        loss = torch.stack(self._losses).reshape(-1).float()
        gradient = torch.stack(self._gradients).float()
        bad = ~(torch.isfinite(loss) & torch.isfinite(after).all(1)) | torch.isnan(gradient)
        norms = [v.norm(dim=1) for v in (change, change[:, some], before[:, some], before)]
        columns = [loss, gradient, *norms, bad]
        self._reduced.append(torch.stack([c.float() for c in columns], dim=1))
        self._snapshots = self._snapshots[-1:]
        self._losses.clear()
        self._gradients.clear()
