"""A diagnosis in words: what happened, and for code and data what to change."""

from __future__ import annotations

from pathlib import Path

from recipefuzz.diagnose.explosions import Health
from recipefuzz.diagnose.origin import Origin
from recipefuzz.diagnose.replay import Failure
from recipefuzz.diagnose.watching import Event
from recipefuzz.verdict import times

ADVICE = {
    "data_nonfinite": "drop or fill those rows where the data are loaded",
    "division_by_zero": "keep the divisor away from zero: add an epsilon (x / (d + 1e-8)), or clamp it",
    "log_of_zero": "keep the argument above zero: make a rate or a variance positive by softplus(z) + 1e-6, not by a "
    "relu; take logsumexp for the log of a sum of densities; or clamp it: torch.log(x.clamp(min=1e-7))",
    "log_of_negative": "the argument must be positive: make it so with softplus or exp, or clamp it",
    "sqrt_gradient_at_zero": "its derivative is infinite there: add an epsilon inside, as in torch.sqrt(x + 1e-8), or "
    "keep the argument off the edge with clamp; torch.where afterwards does not help, since 0 * inf is NaN",
    "domain_error": "the argument has left the function's domain, often by rounding alone: clamp it, as in "
    "x.clamp(min=0).sqrt() or x.clamp(-1 + 1e-6, 1 - 1e-6).acos()",
    "exp_overflow": "bound the exponent (logvar.clamp(-10, 10), or softplus for a scale); before a normalizing sum, "
    "subtract the maximum, or use the stable form: softmax, log_softmax, logsumexp, sigmoid, softplus",
    "empty_reduction": "nothing is left to average: skip such batches or divide by clamp(min=1); "
    "std(unbiased=False) for a single element; drop_last=True for a last partial batch",
    "fully_masked_softmax": "a row whose every entry is masked has no softmax: mask with a large negative number "
    "(-1e9), or leave such rows out",
    "zero_times_inf": "an intended infinity meets a zero or another infinity: fill it with 0 before that operation "
    "(masked_fill, torch.where on the operand)",
    "half_precision_overflow": "the value is out of half precision's range: compute this operation in float32, or in "
    "bfloat16",
}

DECOMPOSITIONS = ("linalg_eigh", "linalg_eig", "linalg_svd")
ADVICE_OF_VECTORS = (
    "vectors of equal eigenvalues or singular values have no derivative: tell these apart (add a small diagonal of "
    "different numbers, such as 1e-4 * torch.arange(n).diag()), or use the values alone (torch.linalg.eigvalsh)"
)
ADVICE_OF_PROBABILITIES = (
    "give the loss logits instead (cross_entropy, log_softmax, logsigmoid, binary_cross_entropy_with_logits); of a "
    "product of many, add up the logs; or clamp the argument: torch.log(p.clamp(min=1e-7))"
)
ADVICE_OF_CTC = (
    "a target that needs more frames than its input has (a label that repeats the one before it needs one more) has "
    "probability 0: leave such rows out, or take zero_infinity=True"
)
ADVICE_OF_NORM = (
    "a normalization divides by the spread or length of its input, which is 0 for one that is constant or all zeros: "
    "give it an eps above 0, or start a weight that is normalized from other values than zeros"
)
ADVICE_OF_XLOGY = (
    "a weight other than 0 times the log of 0: keep a rate or probability above 0 (softplus(z) + 1e-6, no relu), and "
    "the targets of a density off its edge (y.clamp(1e-6, 1 - 1e-6) under a Beta, y.clamp(min=1e-6) under a Gamma)"
)
ADVICE_OF_NAN = (
    "a NaN is written there, not computed: torch.logdet gives it for a negative determinant "
    "(torch.linalg.slogdet(w).logabsdet), else the code fills it in"
)
ADVICE_OF_ALL_ROWS = (
    "no row is spared: look for a statistic that was computed with one missing value (use nanmean, nanstd), or a "
    "division by a range or standard deviation of 0 (a column that never changes: leave it out)"
)
ADVICE_OF_GIVEN = (
    "look at where these values come from: a file that was saved after a NaN, a division by a count, norm or standard "
    "deviation of 0"
)
ADVICE_OF_GIVEN_INFINITY = (
    "the infinity is in a tensor that was there before this step: if it is not meant, look at where it comes from (a "
    "weight of 1 / count for a count of 0); if it is, fill it with 0 before this operation"
)
IN_HALF = "; in float16 an epsilon below 6e-8 is 0: take 1e-4, or compute this in float32"

ADVICE_FOR_RECIPE = "lower the learning rate, clip the gradient's norm, or scale inputs and initial weights down"
MENDED = {  # by whether it was the data
    True: "without those rows the same recipe converges",
    False: "with this operation kept off its singular point, the same recipe converges",
}


def advice(cause: str, origin: Origin) -> str:
    """What to change in code or data; empty for the causes that are the recipe's."""
    event = origin.event
    if cause == "data_nonfinite" and origin.is_models:
        return ADVICE_OF_GIVEN
    if cause not in ADVICE or event is None:
        return ADVICE.get(cause, "")
    op = event.forward.op if event.forward else event.spot.op
    if cause == "sqrt_gradient_at_zero" and op in DECOMPOSITIONS:
        return ADVICE_OF_VECTORS
    if cause == "log_of_zero" and op == "xlogy":
        return ADVICE_OF_XLOGY
    if cause == "log_of_zero" and "ctc_loss" in op:
        return ADVICE_OF_CTC
    if cause == "division_by_zero" and "norm" in op:
        return ADVICE_OF_NORM
    if event.writes_nan:
        return ADVICE_OF_NAN
    if cause == "zero_times_inf" and any(o.meant and not o.writers for o in event.operands):
        return ADVICE_OF_GIVEN_INFINITY
    advises_epsilon = cause in ("division_by_zero", "sqrt_gradient_at_zero", "log_of_zero")
    probabilities = cause == "log_of_zero" and all(0 <= o.stats.low <= o.stats.high <= 1 for o in event.operands)
    text = ADVICE_OF_PROBABILITIES if probabilities else ADVICE[cause]
    return text + (IN_HALF if advises_epsilon and any(r.dtype == "float16" for r in event.results) else "")


def place(event: Event) -> str:
    """Such as "log at model.py:31 in blocks.0"."""
    spot = event.spot
    where = f" at {Path(spot.file).name}:{spot.line}" if spot.file else ""
    inside = f" in {spot.module}" if spot.module else ""
    what = f"the derivative of {event.forward.op}" if event.forward else spot.op
    return f"{what}{where}{inside}"


def happened(failure: Failure, cause: str) -> str:
    """Where it began and what went in."""
    event = failure.origin.event
    seen = f"step {failure.step}: {failure.symptom} is not finite; "
    if event is None:
        return f"{seen}it came in with {failure.origin.outside}"
    given = "; ".join(str(o.stats) for o in event.operands[:3])
    text = f"{seen}as the model was built, " if failure.built else f"step {failure.step}: "
    text += f"{place(event)} gave {_what(event)}"
    text += f", given {given}" if given else ", which was written there, not computed"
    if event.witness:
        text += f" (at the first bad element: {', '.join(f'{w:.4g}' for w in event.witness)})"
    touched = training_rows(event, failure.rows)
    if touched and cause not in ("exploding_activations", "exploding_gradients", "exploding_parameters"):
        text += f"; training {'row' if len(touched) == 1 else 'rows'} {', '.join(map(str, touched))}"
    return text


def _what(event: Event) -> str:
    result = next(r for r in event.results if not r.finite)
    kind = "NaN" if result.nans else "inf" if result.positive else "-inf"
    count = result.nans or result.infinite
    return f"{kind} in {count} of {result.size} elements" if result.size > 1 else kind


def training_rows(event: Event, rows: tuple[int, ...]) -> list[int]:
    """The training rows that a bad result belongs to, where its first dimension is the batch and not all are bad."""
    for result in event.results:
        if result.rows and result.shape and result.shape[0] == len(rows) and len(result.rows) < len(rows):
            return [rows[i] for i in result.rows]
    return []


def health_words(health: Health) -> str:
    """How training was before."""
    if health.step == 1:
        return "before any update"
    words = f"before it the weights were {times(health.swell)} their first size and the loss {health.loss:.3g}"
    return f"{words} (at first {health.first_loss:.3g})"
