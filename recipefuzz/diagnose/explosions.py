"""Numbers left their range: was it the activations, the gradients or the parameters that exploded?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipefuzz.evidence import median
from recipefuzz.trace import LEAST_NORM, Trace
from recipefuzz.verdict import SWOLLEN

ADAPTIVE = ("adam", "adamw", "rmsprop")  # they move every weight by about lr, however large the gradient
THROWN = 3.0  # update, relative to the weights, that replaces them: first steps from small initial weights reach 1 or 2
EXPLODED = 100.0  # growth of the weights that no training has that is going anywhere
BURST = 30.0  # times the usual gradient norm, from weights that were still of their usual size
HOT = 1e3  # times the constant's loss that an initial loss shows activations out of range


@dataclass(frozen=True)
class Health:
    """How training was before the failing step.

    Attributes:
        step: the failing one, counted from 1.
        swell: size of the parameters before that step, relative to their first.
        first_loss, loss: of the first step, and of the last that was finite; NaN if there is none.
        constant: loss of the best constant prediction; NaN where it isn't known.
        thrown: the largest single update, relative to the weights.
        burst: the largest gradient norm while the parameters were still of their usual size, relative to the usual.
    """

    step: int
    swell: float
    first_loss: float
    loss: float
    constant: float
    thrown: float
    burst: float

    @classmethod
    @np.errstate(all="ignore")
    def of(cls, trace: Trace, baseline: float) -> Health:
        finite = trace.loss[np.isfinite(trace.loss)]
        start = max(float(trace.param_norm[0]), LEAST_NORM) if trace.steps else 1.0
        sizes = trace.param_norm / start
        usual_size = trace.grad_norm[sizes < SWOLLEN]
        usual = median(usual_size[:-1]) if len(usual_size) > 1 else float("nan")
        ratios = trace.update_ratio[:-1]
        return cls(
            step=trace.first_bad or trace.steps,
            swell=float(sizes[-1]) if trace.steps else 1.0,
            first_loss=float(finite[0]) if len(finite) else float("nan"),
            loss=float(finite[-1]) if len(finite) else float("nan"),
            constant=baseline,
            thrown=float(np.nanmax(ratios)) if len(ratios) else 0.0,
            burst=float(np.nanmax(usual_size) / max(usual, LEAST_NORM)) if len(usual_size) > 1 else 1.0,
        )

    @property
    def sound(self) -> bool:
        """Training was going well, or had not begun: what fails then is not the end of a divergence."""
        if self.step == 1:
            return not self.hot
        grown = self.loss > 10 * max(abs(self.first_loss), abs(self.constant) if np.isfinite(self.constant) else 0.0)
        return self.swell < 10 and self.thrown < THROWN and not grown

    @property
    def exploded(self) -> bool:
        """The weights had left all bounds before: the operation that failed is where a divergence ended."""
        return self.swell >= EXPLODED

    @property
    def hot(self) -> bool:
        """Whether already the first loss was far above what a model that knows nothing has."""
        return bool(self.first_loss > HOT * abs(self.constant))


def explosion(
    phase: str, health: Health, optimizer: str, init_scale: float, *, recurrent: bool, mended_by: frozenset[str]
) -> str:
    """Which quantity exploded.

    Args:
        phase: of the operation that overflowed.
        recurrent: whether one weight is applied many times over in a step.
        mended_by: the axes whose change alone was seen to make this recipe converge.
    """
    if health.step == 1:
        return "exploding_gradients" if phase == "backward" else "exploding_activations"
    if init_scale > 1 and health.hot and "init_scale" in mended_by:
        return "exploding_activations"
    if optimizer in ADAPTIVE:
        return "exploding_parameters"
    if recurrent and "clip_norm" in mended_by:
        return "exploding_gradients"
    if health.burst >= BURST and "clip_norm" in mended_by:
        return "exploding_gradients"
    if health.hot and "lr" not in mended_by and "init_scale" in mended_by:
        return "exploding_activations"
    return "exploding_parameters"
