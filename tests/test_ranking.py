"""Safe first, then good: what may outrank what."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import median

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recipefuzz.ranking import best, candidates, rank, wilson
from recipefuzz.recipe import Recipe
from recipefuzz.result import Phase, TrialResult

steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def searched(trial: int, score: float = 0.5, *, lr: float | None = None, verdict: str = "converging", **more):
    values = Recipe(lr=lr or trial + 1).values()
    return TrialResult(trial, Phase.SEARCH, 0, values, verdict, **({"skill": score, "score": score} | more))


def confirmed(trial: int, seed: int, verdict: str = "converging", skill: float = 0.5, **more):
    return TrialResult(trial, Phase.CONFIRM, seed, Recipe(lr=trial + 1).values(), verdict, skill=skill, **more)


def passes(trial: int, passed: int, runs: int, **more) -> list[TrialResult]:
    return [confirmed(trial, seed, "converging" if seed < passed else "stalled", **more) for seed in range(runs)]


# --- the interval

WILSON = [
    # passed, runs, low, high of scipy.stats.binomtest(passed, runs).proportion_ci(method="wilson")
    (0, 0, 0.0, 1.0),
    (0, 1, 0.0, 0.7934507),
    (1, 1, 0.2065493, 1.0),
    (0, 5, 0.0, 0.4344825),
    (4, 5, 0.3755346, 0.9637758),
    (5, 5, 0.5655175, 1.0),
    (5, 10, 0.2365931, 0.7634069),
    (10, 10, 0.7224672, 1.0),
    (81, 263, 0.2552885, 0.3662096),
]
COUNTS = st.integers(1, 2000).flatmap(lambda runs: st.tuples(st.integers(0, runs), st.just(runs)))


@pytest.mark.parametrize(("passed", "runs", "low", "high"), WILSON)
def test_wilson_against_known_values(passed, runs, low, high):
    assert wilson(passed, runs) == pytest.approx((low, high), abs=2e-7)


@steady
@given(COUNTS)
def test_wilson_stays_in_0_to_1_around_the_share(counts):
    passed, runs = counts
    low, high = wilson(passed, runs)
    assert 0 <= low <= passed / runs <= high <= 1
    assert low < high


@steady
@given(COUNTS)
def test_wilson_solves_the_score_equation(counts):
    passed, runs = counts
    for end in wilson(passed, runs):
        assert (passed / runs - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / runs, abs=1e-9)


@steady
@given(COUNTS)
def test_wilson_is_symmetric(counts):
    passed, runs = counts
    low, high = wilson(passed, runs)
    assert wilson(runs - passed, runs) == pytest.approx((1 - high, 1 - low))


@steady
@given(COUNTS)
def test_wilson_rises_with_passes_and_narrows_with_runs(counts):
    passed, runs = counts
    assume(passed < runs)
    assert wilson(passed + 1, runs) > wilson(passed, runs)
    narrow, wide = wilson(2 * passed, 2 * runs), wilson(passed, runs)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


# --- candidates


def test_candidates_are_converging_search_trials_best_first():
    results = [
        searched(0, 0.2),
        searched(1, 0.9, verdict="stalled"),
        searched(2, 0.8),
        searched(3, 0.9, verdict="", error="out of memory"),
        searched(4, 0.8),
        confirmed(0, 1),
    ]
    assert [r.trial for r in candidates(results, 10)] == [2, 4, 0]
    assert [r.trial for r in candidates(results, 2)] == [2, 4]
    assert candidates(results, 0) == []


def test_a_recipe_asked_for_twice_is_one_candidate():
    results = [searched(0, 0.3, lr=1), searched(1, 0.5, lr=2), searched(2, 0.4, lr=1)]
    assert [r.trial for r in candidates(results, 10)] == [1, 2]


# --- the order


def order(*results) -> list[int]:
    return [row.trial.trial for row in rank([r for part in results for r in part])]


def test_a_lucky_single_run_never_outranks_a_recipe_that_passed_on_all_seeds():
    trials = [searched(0, 0.999), searched(1, 0.01), searched(2, 1.0)]
    assert order(trials, passes(1, 5, 5, skill=0.01), passes(2, 1, 1, skill=1.0))[0] == 1


def test_tiers_confirmed_then_unknown_then_refuted():
    trials = [searched(i, score) for i, score in enumerate([0.99, 0.5, 0.98, 0.1, 0.6, 0.2])]
    ranked = order(trials, passes(0, 0, 5), passes(1, 1, 5), passes(3, 5, 5), passes(5, 3, 5))
    assert ranked == [3, 5, 1, 2, 4, 0]


def test_among_equally_sure_recipes_the_median_skill_decides():
    trials = [searched(0, 0.9), searched(1, 0.1), searched(2, 0.5)]
    runs = [
        *[confirmed(0, seed, skill=s) for seed, s in enumerate([0.9, 0.2, 0.3])],
        *[confirmed(1, seed, skill=s) for seed, s in enumerate([0.0, 0.4, 0.5])],
        *[confirmed(2, seed, skill=0.4) for seed in range(3)],
    ]
    assert order(trials, runs) == [1, 2, 0]


def test_rank_by_heldout_skill():
    trials = [searched(0), searched(1), searched(2)]
    runs = [
        *passes(0, 2, 2, skill=0.9, heldout_skill=0.1),
        *passes(1, 2, 2, skill=0.8, heldout_skill=0.7),
        *passes(2, 2, 2, skill=0.9),  # no held-out loss
    ]
    assert [row.trial.trial for row in rank([*trials, *runs], "heldout_skill")] == [1, 0, 2]
    assert [row.trial.trial for row in rank([*trials, *runs], "skill")] == [0, 2, 1]


def test_what_a_row_says():
    runs = [
        confirmed(7, 1, skill=0.5, heldout_skill=0.3, steps=100),
        confirmed(7, 2, skill=0.7, heldout_skill=0.5, steps=300),
        confirmed(7, 3, "nan", skill=-9.0, heldout_skill=-9.0, steps=5),
        confirmed(7, 4, "", error="out of memory"),
    ]
    (row,) = rank([searched(7, 0.8, heldout_skill=0.6, steps=50), *runs])
    assert (row.passed, row.runs, row.safe) == (2, 4, False)  # a run that could not be made has not passed
    assert (row.low, row.high) == wilson(2, 4)
    assert (row.skill, row.heldout_skill, row.steps) == (0.6, 0.4, 200)
    (alone,) = rank([searched(7, 0.8, heldout_skill=0.6, steps=50)])
    assert (alone.passed, alone.runs, alone.safe) == (0, 0, False)
    assert (alone.skill, alone.heldout_skill, alone.steps) == (0.8, 0.6, 50)


def test_best_is_safe_or_there_is_none():
    trials = [searched(0, 0.9), searched(1, 0.5)]
    assert best([], confirmed=True) is best([], confirmed=False) is None
    assert best(rank(trials), confirmed=True) is None
    assert best(rank(trials), confirmed=False).trial.trial == 0
    assert best(rank([*trials, *passes(1, 4, 5)]), confirmed=True) is None
    assert best(rank([*trials, *passes(0, 4, 5), *passes(1, 5, 5)]), confirmed=True).trial.trial == 1


SCORES = st.floats(0, 1) | st.just(math.nan)


@st.composite
def studies(draw) -> list[TrialResult]:
    """Some search trials, some recipes twice, some confirmed, some in error."""
    results = []
    for trial in range(draw(st.integers(0, 8))):
        verdict = draw(st.sampled_from(["converging", "converging", "stalled", "nan", ""]))
        error = "" if verdict else "boom"
        lr = draw(st.integers(1, 5))
        results.append(searched(trial, draw(SCORES), lr=lr, verdict=verdict, error=error))
        for seed in range(1, 1 + draw(st.integers(0, 3))):
            verdict = draw(st.sampled_from(["converging", "converging", "stalled", "nan", ""]))
            results.append(confirmed(trial, seed, verdict, draw(SCORES), error="" if verdict else "boom"))
    return results


@steady
@given(studies(), st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_the_order_of_the_results(results, random):
    shuffled = random.sample(results, len(results))
    assert [row.trial.trial for row in rank(shuffled)] == [row.trial.trial for row in rank(results)]


@steady
@given(studies())
def test_ranking_is_of_the_distinct_converging_recipes_and_no_worse_pass_rate_comes_first(results):
    rows = rank(results)
    prints = [row.trial.recipe.fingerprint for row in rows]
    assert len(set(prints)) == len(prints)
    assert set(prints) == {r.recipe.fingerprint for r in results if r.phase is Phase.SEARCH and r.converging}
    tiers = [0 if row.passed else 1 if not row.runs else 2 for row in rows]
    assert tiers == sorted(tiers)
    sure = [row.low for row in rows if row.passed]
    assert sure == sorted(sure, reverse=True)
    for row in rows:
        share = Fraction(row.passed, row.runs) if row.runs else Fraction(1, 2)
        assert 0 <= row.low <= share <= row.high <= 1
        runs = [r for r in results if r.phase is Phase.CONFIRM and r.trial == row.trial.trial and r.converging]
        if runs and not any(math.isnan(r.skill) for r in runs):
            assert row.skill == median(r.skill for r in runs)
    safe = [row.safe for row in rows if row.runs == 3]
    assert safe == sorted(safe, reverse=True)


def test_safe_needs_every_run_that_was_to_be_made():
    trials = [searched(0, 0.9)]
    errors = [confirmed(0, seed, "", error="out of memory") for seed in range(2, 6)]
    assert not rank([*trials, confirmed(0, 1), *errors], wanted=5)[0].safe
    assert not rank([*trials, confirmed(0, 1)], wanted=5)[0].safe  # interrupted after one of five
    assert rank([*trials, *passes(0, 5, 5)], wanted=5)[0].safe
