"""What a trial recorded, step by step, and pure summaries of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLUMNS = ("loss", "constant", "grad_norm", "update_norm", "weight_change", "weight_norm", "param_norm")
LEAST_NORM = np.finfo(np.float64).tiny  # in place of a norm of zero that something is divided by


def _empty() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True)
class Trace:
    """One training run, as far as it went.

    Attributes:
        loss: mean loss of the step's batch before the update, in the loss's own unit; shape (steps,).
        constant: loss of the best constant predictor on the same batch; shape (steps,). Skill measured
            against it is free of the noise that the draw of the batch puts into both.
        grad_norm: L2 norm of the whole gradient before clipping; shape (steps,).
        update_norm: L2 norm of the step's change of all parameters; shape (steps,).
        weight_change: the same of the weights alone, the parameters with two or more dimensions; (steps,).
        weight_norm: L2 norm of the weights before the step; shape (steps,). Gains of normalization layers are
            kept out of it: beside small weights they would hide how far these move.
        param_norm: L2 norm of all parameters before the step; shape (steps,).
        heldout: (steps done, held-out loss in eval mode), at evaluations.
        first_bad: the step, counted from 1, at which the loss, the gradient or a parameter was first not
            finite; None if none was. The arrays end with that step.
        steps_run: the steps that were paid for: more than the arrays hold where a chunk was under way.
    """

    loss: Floats = field(default_factory=_empty)
    constant: Floats = field(default_factory=_empty)
    grad_norm: Floats = field(default_factory=_empty)
    update_norm: Floats = field(default_factory=_empty)
    weight_change: Floats = field(default_factory=_empty)
    weight_norm: Floats = field(default_factory=_empty)
    param_norm: Floats = field(default_factory=_empty)
    heldout: tuple[tuple[int, float], ...] = ()
    first_bad: int | None = None
    steps_run: int = 0

    def __post_init__(self) -> None:
        for name in COLUMNS:
            getattr(self, name).setflags(write=False)

    @property
    def steps(self) -> int:
        return len(self.loss)

    @property
    def update_ratio(self) -> Floats:
        """Size of each step's change relative to the weights, the usual gauge of a learning rate; (steps,)."""
        return self.weight_change / np.maximum(self.weight_norm, LEAST_NORM)

    def extended(self, chunk: Floats) -> Trace:
        """This trace with a chunk of steps added.

        Args:
            chunk: shape (steps, 8): the arrays in the order of `COLUMNS`, and whether (not 0) something was not
                finite. Steps after the first such one are paid for and dropped: they train on rubbish.
        """
        bad = chunk[:, len(COLUMNS)].nonzero()[0]
        end = int(bad[0]) + 1 if len(bad) else len(chunk)
        first_bad = self.steps + end if len(bad) else None
        parts = [part for i, name in enumerate(COLUMNS) for part in (getattr(self, name), chunk[:end, i])]
        table = np.concatenate(parts).reshape(len(COLUMNS), -1)  # at once: seven calls take longer than the copying
        arrays: dict[str, Any] = dict(zip(COLUMNS, table, strict=True))
        return Trace(**arrays, heldout=self.heldout, first_bad=first_bad, steps_run=self.steps_run + len(chunk))

    def evaluated(self, heldout_loss: float) -> Trace:
        return replace(self, heldout=(*self.heldout, (self.steps, heldout_loss)))

    def curve(self, points: int) -> list[float]:
        """The loss averaged over `points` equal stretches (fewer for a shorter run)."""
        finite = np.clip(self.loss[np.isfinite(self.loss)], -1e300, 1e300)  # so that a mean is finite, too
        if not len(finite):
            return []
        return [float(f"{mean:.4g}") for mean in _stretch_means(finite, min(points, len(finite)))]


def _stretch_means(values: Floats, parts: int) -> list[float]:
    """Means of stretches as `np.array_split` makes them: first those that are one longer, then the others."""
    length, longer = divmod(len(values), parts)
    cut = longer * (length + 1)
    stretches = values[:cut].reshape(longer, length + 1), values[cut:].reshape(parts - longer, length)
    return [mean for rows in stretches for mean in rows.mean(axis=1).tolist()]
