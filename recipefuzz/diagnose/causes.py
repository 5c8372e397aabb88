"""What it means that an operation gave something not finite: the cause, by its inputs. Pure rules over an `Event`.

An operation is *singular* at its input where exact arithmetic has no finite answer either (0 / 0, the log of 0); it
*overflows* where only the number format is too small. Singular operations have causes of their own; an overflow of
ordinary arithmetic is the end of an explosion, and which one is told by the run's history (see `explosions`).
"""

from __future__ import annotations

import math

from recipefuzz.diagnose.origin import Origin
from recipefuzz.diagnose.watching import Event

OVERFLOW = "overflow"  # no cause yet: `explosions` tells which
TINY = 1e-30  # a divisor under it is a zero that rounding missed: 1 / 1e-30 leaves float32's range with any numerator
LARGE = 1e6  # a base that is itself exploding: squares of smaller numbers are far from the end of float32's range
HALF = ("float16", "bfloat16")

DIVISIONS = ("div", "divide", "true_divide", "floor_divide", "reciprocal", "rsqrt", "remainder", "fmod", "addcdiv")
WEIGHTED_LOGS = ("xlogy", "xlog1py", "special_xlog1py")  # the weight comes first, then what the log is taken of
LOGS = ("log", "log2", "log10", "log1p", "logit", "special_entr", *WEIGHTED_LOGS)
EXPONENTIALS = ("exp", "exp2", "expm1", "cosh", "sinh", "logaddexp", "special_i0")
DOMAINS = ("sqrt", "rsqrt", "acos", "asin", "acosh", "atanh", "erfinv", "lgamma", "digamma", "tan")
SPREADS = ("std", "var", "std_mean", "var_mean")
LOSSES = ("nll_loss_forward", "nll_loss2d_forward", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy")
REDUCTIONS = ("mean", "median", "nanmedian", *SPREADS, *LOSSES)
SOFTMAXES = ("softmax", "log_softmax", "masked_softmax", "safe_softmax")


def cause_of(origin: Origin) -> str:
    """The cause, or `OVERFLOW`."""
    event = origin.event
    if event is None:  # rows, weights that were loaded so, a constant
        return "data_nonfinite"
    if _is_half(event):
        return "half_precision_overflow"
    if any(not o.stats.finite for o in event.operands) or (event.makes_nan and any(map(math.isinf, event.scalars))):
        return _of_meant_infinity(event)
    if event.forward is not None:
        return _of_derivative(event)
    return _of_values(event)


def _is_half(event: Event) -> bool:
    """Whether wider numbers would do. An optimizer in half precision divides by second moments that became 0."""
    if not any(r.dtype in HALF for r in event.results):
        return False
    return bool(event.finite_in_double) or event.spot.phase == "optimizer"


def _of_meant_infinity(event: Event) -> str:
    op = event.forward.op if event.forward else event.spot.op
    if op in SOFTMAXES or "attention" in op or "softmax" in event.spot.op or op == "logsumexp":
        return "fully_masked_softmax"
    if op in ("sub", "rsub") and all(o.stats.negative for o in event.operands):  # scores - scores.max(), by hand
        return "fully_masked_softmax"
    return "zero_times_inf"


def _of_derivative(event: Event) -> str:
    """Of a backward operation: the forward result was finite, its derivative is not."""
    assert event.forward is not None
    op = event.forward.op
    if op in LOGS:
        return "log_of_zero"
    if op in REDUCTIONS and _is_empty(event):
        return "empty_reduction"
    if event.finite_in_double and not _divides_by_zero(event):
        return OVERFLOW
    if op in DIVISIONS:
        return "division_by_zero"
    if op in EXPONENTIALS or (event.finite_in_double is None and event.spot.op not in DIVISIONS):
        return OVERFLOW
    return "sqrt_gradient_at_zero"


def _of_values(event: Event) -> str:
    op, value = event.spot.op, event.witness[0] if event.witness else _extreme(event)
    if op in WEIGHTED_LOGS and len(event.witness) == 2:
        value = event.witness[1]
    if event.writes_nan:
        return "domain_error"
    if _is_empty(event):
        return "empty_reduction"
    if op in LOGS:
        return _of_log(op, value)
    if op == "pow":
        return _of_power(event)
    if op in DOMAINS and event.makes_nan:
        return "domain_error"
    if op in DIVISIONS:
        return "division_by_zero" if _divides_by_zero(event) else OVERFLOW
    if op in DOMAINS:
        return "domain_error"
    if op in EXPONENTIALS:
        return "exp_overflow"
    return _of_kernel(op) if _is_singular(event) else OVERFLOW


def _is_singular(event: Event) -> bool:
    """Whether a kernel of many operations has no answer at numbers of a usual size, in float64 either.

    Sums and products of such numbers are finite there, unless there are dozens of factors: those give inf, not NaN.
    """
    small = all(o.stats.magnitude < LARGE for o in event.operands)
    return event.finite_in_double is False and small and (event.makes_nan or "ctc_loss" in event.spot.op)


def _of_kernel(op: str) -> str:
    """What happens inside: a spread or a length of 0 is divided by, the log of an impossible alignment is taken."""
    if "ctc_loss" in op:
        return "log_of_zero"
    return "division_by_zero" if "norm" in op else "domain_error"


def _of_log(op: str, value: float) -> str:
    if op == "logit":
        return "log_of_zero" if value in (0.0, 1.0) else "log_of_negative"
    edge = -1.0 if op in ("log1p", "xlog1py", "special_xlog1py") else 0.0
    return "log_of_negative" if value < edge else "log_of_zero"


def _of_power(event: Event) -> str:
    base, exponent = _base_and_exponent(event)
    if event.makes_nan:
        return "domain_error"
    if abs(base) < TINY and exponent < 0:
        return "division_by_zero"
    return OVERFLOW if abs(base) > LARGE else "exp_overflow"


def _base_and_exponent(event: Event) -> tuple[float, float]:
    """At the first bad element; one of the two may be a plain number."""
    if len(event.witness) == 2:
        return event.witness[0], event.witness[1]
    value = event.witness[0] if event.witness else _extreme(event)
    number = event.scalars[0] if event.scalars else 1.0
    return value, number


def _extreme(event: Event) -> float:
    """Stands in for the operand at the bad element where shapes don't tell which it was."""
    if not event.operands:
        return math.nan
    stats = event.operands[0].stats
    return stats.low if event.makes_nan else 0.0 if stats.zeros else stats.high


def _divides_by_zero(event: Event) -> bool:
    """Whether the divisor at the first bad element is zero, or as good as."""
    op = event.spot.op
    if op not in DIVISIONS:
        return False
    if op in ("reciprocal", "rsqrt"):
        return abs(event.witness[0] if event.witness else event.operands[0].stats.least) < TINY
    divisors = list(event.witness[1:]) or [o.stats.least for o in event.operands[1:]]
    return abs(divisors[-1]) < TINY if divisors else any(s == 0 for s in event.scalars)


def _is_empty(event: Event) -> bool:
    """A mean over nothing, a spread of one element, a loss over rows that are all ignored."""
    if any(o.stats.size == 0 for o in event.operands):
        return event.makes_nan
    if event.spot.op not in REDUCTIONS or not event.makes_nan:
        return False
    return max((o.stats.magnitude for o in event.operands), default=0.0) < LARGE
