"""What a trial recorded, step by step, and pure summaries of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _empty() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True)
class Trace:
    """One training run, as far as it went.

    Attributes:
        loss: mean loss of the step's batch before the update, in the loss's own unit; shape (steps,).
        grad_norm: L2 norm of the whole gradient before clipping; shape (steps,).
        update_ratio: L2 norm of the step's parameter change over that of the parameters before it; (steps,).
        heldout: (steps done, held-out loss in eval mode), at evaluations.
        first_bad: the step, counted from 1, at which the loss, the gradient or a parameter was first not
            finite; None if none was. The arrays end with that step.
        steps_run: the steps that were paid for: more than the arrays hold where a chunk was under way.
    """

    loss: Floats = field(default_factory=_empty)
    grad_norm: Floats = field(default_factory=_empty)
    update_ratio: Floats = field(default_factory=_empty)
    heldout: tuple[tuple[int, float], ...] = ()
    first_bad: int | None = None
    steps_run: int = 0

    def __post_init__(self) -> None:
        for array in (self.loss, self.grad_norm, self.update_ratio):
            array.setflags(write=False)

    @property
    def steps(self) -> int:
        return len(self.loss)

    def extended(self, chunk: Floats) -> Trace:
        """This trace with a chunk of steps added.

        Args:
            chunk: shape (steps, 4): loss, gradient norm, update ratio, and whether (not 0) something was not
                finite. Steps after the first such one are paid for and dropped: they train on rubbish.
        """
        bad = chunk[:, 3] != 0
        end = int(bad.argmax()) + 1 if bad.any() else len(bad)
        return replace(
            self,
            loss=np.concatenate([self.loss, chunk[:end, 0]]),
            grad_norm=np.concatenate([self.grad_norm, chunk[:end, 1]]),
            update_ratio=np.concatenate([self.update_ratio, chunk[:end, 2]]),
            first_bad=self.steps + end if bad.any() else None,
            steps_run=self.steps_run + len(bad),
        )

    def evaluated(self, heldout_loss: float) -> Trace:
        return replace(self, heldout=(*self.heldout, (self.steps, heldout_loss)))

    def curve(self, points: int) -> list[float]:
        """The loss averaged over `points` equal stretches (fewer for a shorter run)."""
        finite = self.loss[np.isfinite(self.loss)]
        if not len(finite):
            return []
        parts = np.array_split(finite, min(points, len(finite)))
        return [float(f"{part.mean():.4g}") for part in parts]
