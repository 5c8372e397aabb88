"""The judge's rules on made-up runs, and what must hold for any run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipefuzz.evidence import Course, Estimate, median, skill_at_end, skill_of, weigh
from recipefuzz.trace import COLUMNS, Trace
from recipefuzz.verdict import Budget, Label, Verdict, judge

BASELINE = 2.0
BUDGET = Budget(200, extend=4)


def run(
    skill, *, noise: float = 0.02, pace: float = 3e-3, gradient: float = 1.0, swell: float = 1.0, seed: int = 0
) -> Trace:
    """A run of the given skill at each step, with noise of its own and noise that a constant shares."""
    skill = np.asarray(skill, float)
    n = len(skill)
    rng = np.random.default_rng(seed)
    constant = BASELINE * (1 + 0.05 * rng.standard_normal(n))
    loss = constant * (1 - skill) + BASELINE * noise * rng.standard_normal(n)
    size = 10.0 * np.geomspace(1.0, swell, n)
    change = pace * size
    columns = (np.maximum(loss, 1e-6), constant, np.full(n, gradient), change, change, size, size)
    return Trace(**dict(zip(COLUMNS, columns, strict=True)), steps_run=n)


def head(trace: Trace, steps: int) -> Trace:
    return Trace(**{name: getattr(trace, name)[:steps].copy() for name in COLUMNS}, steps_run=steps)


def decide(trace: Trace, budget: Budget = BUDGET, *, whole: bool = False) -> tuple[Verdict, int]:
    """The verdict and the step at which it is made, as an engine asks for it."""
    for step in budget.checkpoints():
        verdict = judge(head(trace, step), BASELINE, budget, whole=whole)
        if verdict is not None:
            return verdict, step
    raise AssertionError("no verdict at the horizon")


T = np.arange(1, BUDGET.limit + 1)
RUNS = {
    # name: (trace, label, at most this many steps)
    "learns at once": (run(1 - np.exp(-T / 30)), Label.CONVERGING, 100),
    "rises steadily": (run(np.minimum(0.9, T / 500)), Label.CONVERGING, 200),
    "comes down from a large initialization and learns": (run(0.9 - 40 * np.exp(-T / 25)), Label.CONVERGING, 200),
    "comes down from a large initialization to the constant": (run(-40 * np.exp(-T / 25) - 0.01), Label.STALLED, 600),
    "plateau, then drop": (run(1 / (1 + np.exp(-(T - 320) / 25)), noise=0.01), Label.CONVERGING, 400),
    "tiny steps": (run(np.zeros(len(T)), pace=1e-7), Label.STALLED, 50),
    "tiny steps far above the baseline": (run(-20 + T * 1e-3, pace=1e-6), Label.STALLED, 100),
    "blown up, finite": (run(np.full(len(T), -50.0), noise=10.0, pace=0.1), Label.STALLED, 150),
    "thrown by the first steps": (run(np.full(len(T), -0.01), swell=4.0), Label.STALLED, 300),
    "flat for ever": (run(np.full(len(T), -0.005)), Label.STALLED, 500),
    "levels off at little": (run(0.08 * (1 - np.exp(-T / 20)), noise=0.002), Label.STALLED, 500),
}


@pytest.mark.parametrize("name", RUNS)
def test_typical_runs(name: str) -> None:
    trace, label, most = RUNS[name]
    verdict, step = decide(trace)
    assert verdict.label is label, verdict
    assert step <= most
    assert verdict.reason
    assert verdict.evidence
    assert (verdict.cause == "") == (label is Label.CONVERGING)


@pytest.mark.parametrize(("gradient", "said"), [(1.0, True), (1e9, False)])
def test_small_steps_say_how_far_the_loss_can_get_only_where_that_decides(gradient: float, said: bool) -> None:
    verdict, _ = decide(run(-20 + T * 1e-3, pace=1e-6, gradient=gradient))
    assert "too small to get anywhere: they move the weights by" in verdict.reason
    assert ("of the baseline at most" in verdict.reason) is said


def test_long_steps_that_change_nothing_are_not_said_to_move_the_weights_little() -> None:
    verdict, _ = decide(run(np.zeros(len(T)), pace=1.0, gradient=1e-9))
    assert "they move the loss by" in verdict.reason
    assert "the weights" not in verdict.reason


def test_numbers_of_a_run_that_blew_up_are_short() -> None:
    """A norm whose square left float32's range is infinite."""
    verdict, _ = decide(run(np.full(len(T), -1e32), pace=1e-6))
    assert "skill -1e+32 after" in verdict.reason
    thrown = run(np.full(len(T), -0.01))
    verdict, _ = decide(replace(thrown, param_norm=np.where(T == 1, 10.0, np.inf)))
    assert "thrown to over 1e15 times their size" in verdict.reason


@pytest.mark.parametrize(
    ("skill", "cause"),
    [(np.zeros(len(T)), "lr_too_low"), (-1e17 * np.ones(len(T)), "unknown"), (-20 + T, "lr_too_low")],
)
def test_a_loss_far_above_a_constants_that_does_not_fall_is_not_blamed_on_small_steps(
    skill: np.ndarray, cause: str
) -> None:
    verdict, _ = decide(run(np.minimum(skill, 0), pace=1e-6))
    assert verdict.label is Label.STALLED
    assert verdict.cause == cause


def test_a_plateau_is_not_called_a_stall_within_the_short_budget() -> None:
    flat = run(np.zeros(BUDGET.limit), gradient=20.0)
    assert all(judge(head(flat, n), BASELINE, BUDGET) is None for n in BUDGET.checkpoints() if n <= BUDGET.steps)


def test_a_whole_run_that_converges_is_left_open_until_the_short_budget_is_used() -> None:
    trace = RUNS["learns at once"][0]
    assert decide(trace)[1] < BUDGET.steps
    assert decide(trace, whole=True)[1] == BUDGET.steps


def bad(trace: Trace, steps: int, **last: float) -> Trace:
    """The run broken at a step, with the last values of some columns replaced."""
    columns = {name: getattr(trace, name)[:steps].copy() for name in COLUMNS}
    for name, value in last.items():
        columns[name][-1] = value
    return Trace(**columns, first_bad=steps, steps_run=steps)


NANS = {
    "loss": ({"loss": np.nan}, "unknown", "the loss is not finite at step 30, all of a sudden"),
    "parameter": ({}, "unknown", "a gradient or a parameter is not finite at step 30, all of a sudden"),
    "weights grew": ({"loss": np.inf, "param_norm": 1e3}, "exploding_parameters", "grown to 100 times their size"),
    "gradient burst": ({"grad_norm": 1e6}, "exploding_gradients", "the gradient had burst from"),
    "gradient nan": ({"grad_norm": np.nan}, "unknown", "all of a sudden"),
}


@pytest.mark.parametrize("name", NANS)
def test_what_is_not_finite_is_nan(name: str) -> None:
    last, cause, words = NANS[name]
    verdict = judge(bad(RUNS["learns at once"][0], 30, **last), BASELINE, BUDGET)
    assert verdict is not None
    assert (verdict.label, verdict.cause) == (Label.NAN, cause)
    assert words in verdict.reason


def test_nan_at_the_first_step() -> None:
    verdict = judge(bad(RUNS["learns at once"][0], 1, loss=np.nan), BASELINE, BUDGET)
    assert verdict is not None
    assert verdict.label is Label.NAN


def test_too_few_steps_are_said_to_be_too_few() -> None:
    verdict, _ = decide(run(np.zeros(5)), Budget(5, 0))
    assert verdict.label is Label.STALLED
    assert "trial.steps" in verdict.reason


def bent(points: list[float], noise: float, pace: float, seed: int) -> Trace:
    return run(np.interp(T, np.linspace(1, len(T), len(points)), points), noise=noise, pace=pace, seed=seed)


runs = st.builds(
    bent,
    st.lists(st.floats(-100, 1), min_size=2, max_size=6),
    st.floats(1e-4, 1.0),
    st.floats(1e-9, 0.3),
    st.integers(0, 100),
)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_there_is_a_verdict_at_the_horizon_and_it_is_never_nan_for_a_finite_run(trace: Trace) -> None:
    verdict = judge(trace, BASELINE, BUDGET)
    assert verdict is not None
    assert verdict.label is not Label.NAN


@settings(max_examples=60, deadline=None)
@given(runs, st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_the_unit_of_the_loss_changes_nothing(trace: Trace, unit: float) -> None:
    scaled = {"loss", "constant", "grad_norm"}
    other = Trace(**{n: getattr(trace, n) * (unit if n in scaled else 1.0) for n in COLUMNS}, steps_run=trace.steps_run)
    for step in BUDGET.checkpoints()[::3]:
        a = judge(head(trace, step), BASELINE, BUDGET)
        b = judge(head(other, step), BASELINE * unit, BUDGET)
        assert (a and a.label) == (b and b.label)


@pytest.mark.parametrize("name", RUNS)
def test_stretching_time_changes_no_verdict(name: str) -> None:
    """Twice the steps, each with half the change, in twice the budget: the same course."""
    trace, label, _ = RUNS[name]
    halved = {"update_norm", "weight_change"}
    twice = Trace(**{n: np.repeat(getattr(trace, n), 2) / (2 if n in halved else 1) for n in COLUMNS})
    assert decide(twice, Budget(2 * BUDGET.steps, BUDGET.extend))[0].label is label


@settings(max_examples=60, deadline=None)
@given(runs)
def test_what_comes_later_does_not_change_an_early_verdict(trace: Trace) -> None:
    _, step = decide(trace)
    rubbish = Trace(**{n: np.concatenate([getattr(trace, n)[:step], np.ones(trace.steps - step)]) for n in COLUMNS})
    assert decide(rubbish) == decide(trace)


@given(st.integers(1, 5000), st.integers(0, 20))
def test_checkpoints_go_up_to_the_horizon(steps: int, extend: int) -> None:
    budget = Budget(steps, extend)
    points = budget.checkpoints()
    assert list(points) == sorted(set(points))
    assert points[-1] == budget.limit
    assert steps in points
    assert points[0] >= 1


@pytest.mark.parametrize("power", [-1.5, -0.5, 0.5, 1.0, 2.0, 3.0])
def test_a_course_finds_the_power_it_was_made_with(power: float) -> None:
    quarters = [Estimate(5 + np.sign(power) * at**power, 0.0) for at in (0.375, 0.625, 0.875)]
    course = Course(*quarters, stretch=3.0)
    assert course.power == pytest.approx(power, abs=0.02)
    assert course.at_end() == pytest.approx(5 + np.sign(power) * 3.0**power, rel=0.02)


def test_skill_is_free_of_the_noise_that_a_constant_shares() -> None:
    trace = run(np.full(400, 0.01), noise=0.0)
    assert skill_at_end(trace, BASELINE) == pytest.approx(0.01, abs=1e-9)
    evidence = weigh(trace, BASELINE, 200, 1000)
    assert evidence is not None
    assert evidence.now.error < 1e-9


def test_skill_of_a_loss_below_zero_counts_from_the_baseline() -> None:
    n = 100
    columns = [np.full(n, v) for v in (-4.0, -3.0, 1.0, 0.1, 0.1, 10.0, 10.0)]
    assert skill_at_end(Trace(*columns), -3.0) == pytest.approx(1 / 3)


NUMBERS = st.lists(st.floats(-1e300, 1e300) | st.just(np.nan) | st.just(np.inf), min_size=1, max_size=60)


@settings(deadline=None)
@given(NUMBERS)
def test_quick_median_is_that_of_numpy(numbers: list[float]) -> None:
    assert np.array_equal(median(np.array(numbers)), np.median(numbers), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(runs, st.integers(1, 40))
def test_quick_means_are_those_of_numpy_to_the_last_bit(trace: Trace, points: int) -> None:
    parts = np.array_split(trace.loss, points)
    assert trace.curve(points) == [float(f"{part.mean():.4g}") for part in parts]
    for part in np.split(np.arange(trace.steps), range(10, trace.steps, 110)):
        loss, constant = trace.loss[part], trace.constant[part]
        skill = 1.0 - float(loss.mean()) / float(constant.mean())
        rest = (loss - (1.0 - skill) * constant) / constant.mean()
        found = skill_of(trace, BASELINE, slice(part[0], part[-1] + 1))
        assert found == Estimate(skill, float(rest.std() / np.sqrt(len(rest))))


def test_numbers_that_overflow_are_judged_without_a_warning() -> None:
    trace = run(np.full(BUDGET.limit, -1e300), noise=0.5, pace=1e200)
    assert decide(trace)[0].label is Label.STALLED
