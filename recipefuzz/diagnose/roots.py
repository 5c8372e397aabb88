"""Recipe, code or data: decided by what the operation is, how healthy training was, and what was run to find out."""

from __future__ import annotations

from recipefuzz.diagnose.explosions import Health
from recipefuzz.diagnosis import Root

EXPLOSIONS = ("exploding_activations", "exploding_gradients", "exploding_parameters")


def root_of(cause: str, health: Health, *, mended: bool | None, remedied: bool, in_half: bool) -> Root:
    """Where the fault lies.

    That another recipe trains proves little by itself: many bugs hide under a smaller step. An operation that is
    singular at its input is the code's, unless it was reached at the end of a divergence and another recipe mends that:
    of weights that had exploded it is enough that they don't; else keeping the operation away from its singular point
    must not make the same recipe train, and another recipe must.

    Args:
        mended: whether the same recipe trains with the one operation kept off its singular point; None if not tried.
        remedied: whether a change of the recipe alone trains; of weights that had exploded, whether it stays finite.
        in_half: whether half precision is the recipe's choice.
    """
    if cause == "data_nonfinite":
        return Root.DATA
    if cause in EXPLOSIONS:
        return Root.RECIPE
    if cause == "half_precision_overflow":
        return Root.RECIPE if in_half else Root.CODE
    if not remedied:
        return Root.CODE
    return Root.RECIPE if health.exploded or not (mended or sound_before(cause, health)) else Root.CODE


def sound_before(cause: str, health: Health) -> bool:
    """Whether the recipe had done well until then.

    An `exp` is regular everywhere: one that overflows before any update got an exponent as large as the inputs and the
    initial weights made it, which tells nothing good of the recipe.
    """
    return health.sound and not (cause == "exp_overflow" and health.step == 1)
