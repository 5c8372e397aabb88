"""Causes of small programs in several spellings, and the rules for the root and for what exploded."""

# ruff: noqa: ARG001, ARG005 - every function of a table takes the input and the weight, needed or not

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_diagnose_watching import INF, MASK, ONES, X, failure_of
from torch import nn
from torch.distributions import Poisson
from torch.nn import functional

from recipefuzz.diagnose.causes import OVERFLOW, cause_of
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.origin import Origin
from recipefuzz.diagnose.roots import EXPLOSIONS, root_of
from recipefuzz.diagnose.wording import ADVICE, advice, happened
from recipefuzz.diagnosis import Root
from recipefuzz.trace import Trace


def softmax_by_hand(x, w):
    e = torch.exp(w * 200)
    return e / e.sum()


def softmax_by_hand_over_a_mask(x, w):
    scores = (x * w).masked_fill(x == x, -INF)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def attention_with_nothing_to_look_at(x, w):
    q = (x * w).view(1, 1, 4, 3)
    return torch.softmax((q @ q.mT).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(0), -INF), -1) @ q


def entropy(x, w):
    p = (w * 400 - 400).softmax(-1)
    return (p * p.log()).sum()


def cosine(x, w):
    v = x * 0
    return (v * w).sum(1) / (v.norm(dim=1) * w.norm())


def running_ratio(x, w):
    h = x * w
    h /= x.new_zeros(3)
    return h


def arc_length(x, w):
    unit = (x * w) / (x * w).norm(dim=1, keepdim=True)
    return torch.acos((unit * unit).sum(1).clamp(-1, 1))


def distance_of_equal_points(x, w):
    a, b = x * w, (x * w).detach()
    return ((a - b) ** 2).sum(1).sqrt()


def class_means(x, w):
    labels = torch.tensor([0, 0, 2, 2])
    return torch.stack([(x * w)[labels == c].mean(0) for c in range(3)])


def per_class_spread(x, w):
    labels = torch.tensor([0, 1, 1, 1])
    return torch.stack([(x * w)[labels == c].std(0) for c in range(2)])


def impossible_alignment(x, w):
    """Three equal labels need five frames."""
    log_prob = (x * w).log_softmax(-1)[:, None]
    return functional.ctc_loss(log_prob, torch.tensor([[1, 1, 1]]), torch.tensor([4]), torch.tensor([3]))


CAUSES = {
    "division_by_zero": (
        lambda x, w: (x * w) / (x - x),
        lambda x, w: w / 0.0,
        lambda x, w: 1 / (w - w).sum(),
        lambda x, w: (w - w).rsqrt(),
        lambda x, w: (w - 0.5) ** -1.0,
        lambda x, w: torch.reciprocal(w - 1),
        lambda x, w: torch.where(w > 5, 1 / (w - w), w),
        lambda x, w: functional.normalize(x * 0 * w, eps=0.0),
        lambda x, w: functional.layer_norm(w - w, (3,), eps=0.0),
        lambda x, w: functional.group_norm((x * 0 * w)[..., None], 3, eps=0.0),
        lambda x, w: torch._weight_norm(x * 0 * w, w, 1),
        cosine,
        running_ratio,
    ),
    "log_of_zero": (
        lambda x, w: torch.log(w - w),
        lambda x, w: torch.log2(w.relu() * 0),
        lambda x, w: (w - w).log10(),
        lambda x, w: torch.log1p(w * 0 - 1),
        lambda x, w: torch.logit(w - w),
        lambda x, w: torch.where(w > 0.7, torch.log(w - 0.5), w),
        lambda x, w: torch.xlogy(-w, w - w),
        lambda x, w: torch.special.xlog1py(-w, w * 0 - 1),
        lambda x, w: -torch.log((w * 400 - 400).softmax(-1)),
        entropy,
        impossible_alignment,
    ),
    "log_of_negative": (
        lambda x, w: torch.log(x * w),
        lambda x, w: (-w).log(),
        lambda x, w: torch.log1p(-w * 3),
        lambda x, w: torch.logit(w * 3),
        lambda x, w: torch.xlogy(w, -w),
    ),
    "sqrt_gradient_at_zero": (
        lambda x, w: (w - w).sqrt(),
        lambda x, w: (w * 0) ** 0.5,
        lambda x, w: torch.pow((w - w).abs(), 1 / 3),
        lambda x, w: (x * 0 * w).var(0).sqrt(),
        lambda x, w: torch.acos(w / w),
        lambda x, w: torch.hypot(w - w, w - w),
        distance_of_equal_points,
        arc_length,
    ),
    "domain_error": (
        lambda x, w: torch.sqrt(x * w),
        lambda x, w: torch.acos(w * 2),
        lambda x, w: torch.asin(w + 1),
        lambda x, w: (-w) ** 0.5,
        lambda x, w: torch.pow(x * w, w),
        lambda x, w: torch.acosh(w * 0.1),
        lambda x, w: torch.atanh(w * 3),
        lambda x, w: (-w).rsqrt(),
        lambda x, w: torch.logdet(torch.diag(w * torch.tensor([1.0, 1, -1]))),
        lambda x, w: torch.where(w > 0, w * math.nan, w),
        lambda x, w: (x * w).masked_fill(MASK, math.nan),
    ),
    "exp_overflow": (
        lambda x, w: torch.exp(w * 100),
        lambda x, w: (w * 100).expm1(),
        lambda x, w: torch.cosh(w * 100),
        lambda x, w: 2.0 ** (w * 200),
        lambda x, w: torch.exp2(w * 200),
        lambda x, w: torch.log(1 + torch.exp(w * 100)),
        softmax_by_hand,
    ),
    "empty_reduction": (
        lambda x, w: (x * w)[x > 9].mean(),
        lambda x, w: (x * w)[:1].std(0),
        lambda x, w: (x * w)[:1].var(0),
        lambda x, w: functional.cross_entropy(x * w, torch.full((4,), -100), ignore_index=-100),
        lambda x, w: functional.mse_loss((x * w)[x > 9], x[x > 9]),
        class_means,
        per_class_spread,
    ),
    "fully_masked_softmax": (
        lambda x, w: (x * w).masked_fill(x == x, -INF).softmax(-1),
        lambda x, w: functional.log_softmax((x * w).masked_fill(x < 0, -INF), -1),
        lambda x, w: (x * w + torch.log(0 * ONES)).softmax(-1),
        softmax_by_hand_over_a_mask,
        attention_with_nothing_to_look_at,
    ),
    "zero_times_inf": (
        lambda x, w: (x * w).masked_fill(MASK, -INF) * ONES,
        lambda x, w: torch.zeros(3) * torch.tensor([1.0, INF, 2.0]) + w,
        lambda x, w: torch.full((3,), INF) * (w - w),
        lambda x, w: ONES @ (x * w).masked_fill(MASK, INF).T,
        lambda x, w: (x * w).masked_fill(MASK, -INF) + (x * w).masked_fill(MASK, INF),
    ),
    "half_precision_overflow": (
        lambda x, w: w.half() * 60000,
        lambda x, w: torch.exp(w.half() * 20),
        lambda x, w: (x.half() * 300) @ (w.half() * 300),
        lambda x, w: (w.half() * 1e-2) / (w.half() * 1e-7),
    ),
    OVERFLOW: (
        lambda x, w: (w * 1e20) ** 2,
        lambda x, w: (w * 1e30) * 1e30,
        lambda x, w: (x * 1e20) @ (w * 1e20),
        lambda x, w: (w * 3e38).sum(),
        lambda x, w: torch.addmm(x.new_zeros(4, 1), x * 1e30, w[:, None] * 1e30),
        lambda x, w: functional.mse_loss(w * 1e25, x[0]),
        lambda x, w: (w * 1e30) / 1e-20,
        lambda x, w: torch.cumsum(w * 2e38, 0),
        lambda x, w: (w * 1e5).repeat(30).prod(),
        lambda x, w: functional.layer_norm(x * w * 1e30, (3,)),
    ),
}


@pytest.mark.filterwarnings("ignore:std", "ignore:var")
@pytest.mark.parametrize(
    ("cause", "function"),
    [pytest.param(c, f, id=f"{c}-{i}") for c, functions in CAUSES.items() for i, f in enumerate(functions)],
)
def test_cause(cause, function):
    failure = failure_of(function)
    assert cause_of(failure.origin) == cause
    assert failure.origin.event.spot.file == __file__


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("side", ["x", "y"])
def test_rows_that_are_not_finite(side, bad):
    rows = X.clone()
    rows[1, 2] = bad
    x, y = (rows, X) if side == "x" else (X, rows)
    failure = failure_of(nn.Linear(3, 3), x, y, functional.mse_loss)
    assert failure.origin.outside == side
    assert cause_of(failure.origin) == "data_nonfinite"


@pytest.mark.parametrize("outside", ["x", "y", "parameter weight", "buffer mean", "a tensor that the model keeps"])
def test_what_came_in_not_finite_was_given_so(outside):
    assert cause_of(Origin(None, outside, ())) == "data_nonfinite"


def test_rows_of_infinities_are_data_even_where_a_softmax_meets_them_first():
    x = X.clone()
    x[1] = -INF
    failure = failure_of(lambda x, w: (x * w).softmax(-1), x)
    assert cause_of(failure.origin) == "data_nonfinite"


def test_a_derivative_that_overflows_is_no_edge():
    """The gradient's own product leaves the range; the operation itself is regular there."""
    failure = failure_of(lambda x, w: (w * 1e-20).sqrt() * 1e30 * 1e5)
    assert cause_of(failure.origin) == OVERFLOW


def test_every_singular_cause_has_advice():
    assert set(ADVICE) == {"data_nonfinite", *CAUSES} - {OVERFLOW}


NO_COUNT = 1 / torch.zeros(3)
ADVISED = {
    "half precision": (lambda x, w: (w - w).half() / (w - w).half(), "float16 an epsilon below 6e-8 is 0"),
    "eigenvectors": (lambda x, w: torch.linalg.eigh(torch.diag(w - w))[1] @ w, "equal eigenvalues"),
    "a rate of 0": (lambda x, w: Poisson((w - w).relu()).log_prob(ONES), "softplus"),
    "written": (lambda x, w: torch.logdet(-torch.diag(w)), "slogdet"),
    "a weight of infinity": (lambda x, w: (w - w) * NO_COUNT, "1 / count"),
    "an alignment that can't be": (impossible_alignment, "zero_infinity=True"),
    "a normalization": (lambda x, w: functional.layer_norm(w - w, (3,), eps=0.0), "an eps above 0"),
    "a plain division": (lambda x, w: w / (w - w), "add an epsilon (x / (d + 1e-8)), or clamp it"),
}


@pytest.mark.parametrize(("function", "words"), ADVISED.values(), ids=ADVISED)
def test_advice_fits_the_operation(function, words):
    origin = failure_of(function).origin
    told = advice(cause_of(origin), origin)
    assert words in told
    assert sum(w in told for _, w in ADVISED.values()) <= 1 + ("an epsilon (x" in told)


def test_a_number_that_is_written_is_not_said_to_be_computed():
    failure = failure_of(lambda x, w: torch.logdet(-torch.diag(w)))
    assert "gave NaN, which was written there, not computed" in happened(failure, "domain_error")


SOUND = Health(step=50, swell=1.2, first_loss=2.0, loss=0.5, constant=2.3, thrown=0.1, burst=2.0)
FIRST = Health(step=1, swell=1.0, first_loss=2.0, loss=math.nan, constant=2.3, thrown=0.0, burst=1.0)
HOT = Health(step=1, swell=1.0, first_loss=1e9, loss=math.nan, constant=2.3, thrown=0.0, burst=1.0)


def but(health, **changes):
    return Health(**{**vars(health), **changes})


@pytest.mark.parametrize(
    ("health", "sound"),
    [
        (SOUND, True),
        (but(SOUND, swell=11.0), False),
        (but(SOUND, swell=9.0), True),
        (but(SOUND, thrown=11.0), False),
        (but(SOUND, loss=25.0), False),
        (but(SOUND, loss=22.0), True),  # ten times the constant's 2.3
        (but(SOUND, loss=21.0, constant=math.nan), False),  # ten times its own first
        (but(SOUND, loss=math.nan), True),
        (FIRST, True),
        (HOT, False),
        (but(HOT, constant=math.nan), True),  # nothing to compare with
        (but(HOT, step=2, loss=5.0), True),  # it has come down again
    ],
)
def test_training_was_sound(health, sound):
    assert health.sound is sound


CLIP, LR, INIT = frozenset({"clip_norm"}), frozenset({"lr"}), frozenset({"init_scale"})


@pytest.mark.parametrize(
    ("health", "values", "expected"),
    [
        (HOT, {}, "exploding_activations"),
        (FIRST, {"phase": "loss"}, "exploding_activations"),
        (FIRST, {"phase": "backward"}, "exploding_gradients"),
        (FIRST, {"phase": "backward", "optimizer": "adam"}, "exploding_gradients"),
        (SOUND, {"mended_by": LR}, "exploding_parameters"),
        (SOUND, {"mended_by": CLIP}, "exploding_parameters"),
        (SOUND, {"mended_by": CLIP, "recurrent": True}, "exploding_gradients"),
        (SOUND, {"mended_by": LR, "recurrent": True}, "exploding_parameters"),
        (SOUND, {"mended_by": CLIP, "recurrent": True, "optimizer": "adam"}, "exploding_parameters"),
        (but(SOUND, burst=40.0), {"mended_by": CLIP}, "exploding_gradients"),
        (but(SOUND, burst=40.0), {"mended_by": LR}, "exploding_parameters"),
        (but(HOT, step=3), {"mended_by": INIT}, "exploding_activations"),
        (but(HOT, step=3), {"mended_by": INIT | LR}, "exploding_parameters"),
        (but(HOT, step=3), {"mended_by": INIT | LR, "init_scale": 3.0}, "exploding_activations"),
        (but(HOT, step=3), {"mended_by": INIT, "init_scale": 3.0, "optimizer": "rmsprop"}, "exploding_activations"),
        (but(SOUND, step=3), {"mended_by": INIT, "init_scale": 3.0}, "exploding_parameters"),
        (SOUND, {}, "exploding_parameters"),
    ],
)
def test_what_exploded(health, values, expected):
    usual = {"phase": "forward", "optimizer": "sgd", "init_scale": 1.0, "recurrent": False, "mended_by": frozenset()}
    given = usual | values
    phase, optimizer, scale = (given.pop(name) for name in ("phase", "optimizer", "init_scale"))
    found = explosion(phase, health, optimizer, scale, **given)
    assert found == expected
    assert found in EXPLOSIONS


SICK, EXPLODED = but(SOUND, swell=20.0), but(SOUND, swell=100.0)


@pytest.mark.parametrize(
    ("cause", "health", "mended", "remedied", "in_half", "root"),
    [
        ("data_nonfinite", SOUND, True, False, False, Root.DATA),
        ("data_nonfinite", SICK, False, True, False, Root.DATA),
        ("exploding_parameters", SOUND, None, False, False, Root.RECIPE),
        ("exploding_activations", HOT, None, False, False, Root.RECIPE),
        ("exploding_gradients", SICK, None, True, False, Root.RECIPE),
        ("half_precision_overflow", SOUND, None, False, False, Root.CODE),
        ("half_precision_overflow", SICK, None, True, False, Root.CODE),
        ("half_precision_overflow", SOUND, None, False, True, Root.RECIPE),
        ("log_of_zero", SOUND, None, False, False, Root.CODE),
        ("log_of_zero", SOUND, False, True, False, Root.CODE),  # healthy before: that another recipe trains is no proof
        ("log_of_zero", SICK, True, True, False, Root.CODE),  # the line mended, the same recipe trains
        ("log_of_zero", SICK, False, False, False, Root.CODE),  # nothing else helps either
        ("log_of_zero", SICK, False, True, False, Root.RECIPE),
        ("division_by_zero", SICK, None, True, False, Root.RECIPE),
        ("exp_overflow", FIRST, False, True, False, Root.RECIPE),  # inputs and initial weights made the exponent
        ("exp_overflow", FIRST, True, True, False, Root.CODE),
        ("exp_overflow", FIRST, False, False, False, Root.CODE),
        ("log_of_zero", FIRST, False, True, False, Root.CODE),
        ("exp_overflow", EXPLODED, True, True, False, Root.RECIPE),  # a line that is mended hides where the weights are
        ("exp_overflow", EXPLODED, True, False, False, Root.CODE),
    ],
)
def test_the_root(cause, health, mended, remedied, in_half, root):
    assert root_of(cause, health, mended=mended, remedied=remedied, in_half=in_half) is root


def trace(loss, param_norm, grad_norm, ratio, first_bad=None):
    given = {"loss": loss, "param_norm": param_norm, "grad_norm": grad_norm, "weight_change": ratio}
    arrays = {name: np.array(values, dtype=float) for name, values in given.items()}
    return Trace(**arrays, weight_norm=np.ones(len(loss)), first_bad=first_bad)


def test_health_is_read_off_the_trace():
    nan = math.nan
    found = Health.of(
        trace([4.0, 3.0, 8.0, nan], [2.0, 2.0, 2.5, 20.0], [1.0, 3.0, 90.0, nan], [0.1, 0.2, 0.7, nan], 4), 5.0
    )
    assert found == Health(step=4, swell=10.0, first_loss=4.0, loss=8.0, constant=5.0, thrown=0.7, burst=45.0)


def test_health_of_a_trial_that_failed_at_once():
    found = Health.of(trace([math.nan], [2.0], [math.nan], [math.nan], 1), 5.0)
    assert (found.step, found.swell, found.thrown, found.burst) == (1, 1.0, 0.0, 1.0)
    assert math.isnan(found.loss)
    assert found.sound
