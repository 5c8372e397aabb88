"""Samplers: what a study's `sampler` means, and TPE for many recipes at a time.

Optuna's TPE models the trials (`_ParzenEstimator`); here it is fitted once for a block of recipes, from arrays that
grow with the study, in time that does not grow with it (Watanabe, arXiv:2304.11127, describes TPE and its parts).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from bisect import insort
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions
from optuna.samplers._tpe.sampler import default_gamma

from recipefuzz.cma_sampler import PlainCmaEs
from recipefuzz.config import SearchConfig
from recipefuzz.errors import InputError, Place, shorten
from recipefuzz.recipe import Scalar
from recipefuzz.result import TrialResult
from recipefuzz.space import Axis, Choice, Range, Space
from recipefuzz.verdict import Label

MOST_GRID_POINTS = 50_000  # Optuna lists them all at every ask
MOST_BELOW = default_gamma(10**9)  # trials that Optuna's TPE calls good; the others are "above"
CELLS = 64  # of an axis
MOST_ABOVE = 512  # kernels that model them: see `thinned`
NOTHING = -700.0  # a log whose exponential changes no sum; below, where most are, exp takes ten times as long
ONE_THREAD = 2**18  # multiplications up to which OpenBLAS starts no threads, which here cost more than they bring


def total(search: SearchConfig, space: Space) -> int:
    """Trials that the search will have in all: fewer than asked for where a grid has no more points."""
    if search.sampler != "grid":
        return search.trials
    points = math.prod(len(axis.grid(search.grid_points)) for _, axis in space.axes)
    if points > MOST_GRID_POINTS:
        raise InputError(
            f"a grid of {points:,} points",
            place=Place(key="search.sampler"),
            expected=f"at most {MOST_GRID_POINTS:,}",
            fix="fewer search.grid_points, fewer axes, or sampler: qmc, which spreads any number of trials evenly",
        )
    return min(search.trials, points)


def objective(result: TrialResult) -> tuple[float, float]:
    """What the sampler is told: a value to minimize, and by how much the recipe failed (0 or less: it did not).

    A converging trial is worth 1 - score. A stall fails by up to 1, less the more it learned; a NaN by 1 to
    2, less the later it came: samplers that order infeasible points by violation are drawn to the border.
    """
    score = min(max(result.score, 0.0), 1.0) if math.isfinite(result.score) else 0.0
    if result.verdict == Label.CONVERGING:
        return 1.0 - score, 0.0
    violation = 1.0 - 0.9 * score if result.verdict == Label.STALLED else 1.0 + 1.0 / (result.first_bad or 1)
    return 1.0 + violation, violation


def distribution(axis: Axis) -> BaseDistribution:
    if isinstance(axis, Choice):
        return CategoricalDistribution(axis.options)
    if axis.integer:
        step = int(axis.step) if axis.step is not None else 1
        return IntDistribution(int(axis.low), int(_last(axis)), log=axis.log, step=step)
    return FloatDistribution(axis.low, _last(axis), log=axis.log, step=axis.step)


def _last(axis: Range) -> float:
    """The largest value: below `high` where the steps do not end there, of which Optuna would warn."""
    return axis.high if axis.step is None else float(axis.grid(2)[-1])  # type: ignore[arg-type]


class Seen:
    """What tpe learns from, in arrays that grow with the study, where Optuna sorts all trials anew at every ask."""

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._axes = distributions
        self._points = {name: np.empty(64) for name in distributions}
        self._told, self._complete = np.zeros(64, dtype=bool), np.zeros(64, dtype=bool)
        self.cells = np.zeros(64, dtype=np.int64)  # which cell of a grid over the space each recipe lies in
        self._asked = self.completed = 0
        self._best: list[tuple[bool, float, int]] = []  # infeasible?, value or violation, number: Optuna's order

    def ask(self, recipes: Iterable[Mapping[str, Scalar]]) -> None:
        for recipe in recipes:
            if self._asked == len(self._complete):
                self._grow()
            cell = 0
            for name, axis in self._axes.items():
                value = self._points[name][self._asked] = axis.to_internal_repr(recipe[name])
                cell = (cell * 2 * CELLS + _cell(axis, value)) % 2**62
            self.cells[self._asked] = cell
            self._asked += 1

    def _grow(self) -> None:
        self._told = np.concatenate([self._told, np.zeros_like(self._told)])
        self._complete = np.concatenate([self._complete, np.zeros_like(self._complete)])
        self.cells = np.concatenate([self.cells, self.cells])
        self._points = {name: np.concatenate([column, column]) for name, column in self._points.items()}

    def tell(self, number: int, result: TrialResult) -> None:
        """The result of a trial that was asked; in any order, and of each the first counts."""
        if self._told[number]:
            return
        if not result.error:
            value, violation = objective(result)
            insort(self._best, (violation > 0, violation if violation > 0 else value, number))
            del self._best[MOST_BELOW:]
            self._complete[number] = True
            self.completed += 1
        self._told[number] = True

    def below(self) -> NDArray[np.intp]:
        """Numbers of the good trials: feasible ones first, then the least violations."""
        return np.array(sorted(number for *_, number in self._best[: default_gamma(self.completed)]), dtype=np.intp)

    def above(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Numbers of the other trials that completed, and of those asked for and not told."""
        others = self._complete.copy()
        others[self.below()] = False
        return np.flatnonzero(others), np.flatnonzero(~self._told[: self._asked])

    def points(self, numbers: NDArray[np.intp], names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
        return {name: self._points[name][numbers] for name in names}


def _cell(axis: BaseDistribution, value: float) -> int:
    if isinstance(axis, CategoricalDistribution) or axis.single():
        return int(value)
    assert isinstance(axis, (FloatDistribution, IntDistribution))
    low, high, at = (math.log(v) if axis.log else v for v in (axis.low, axis.high, value))
    return int(CELLS * (at - low) / (high - low))


def thinned(
    numbers: NDArray[np.intp], weights: NDArray[np.float64], cells: NDArray[np.int64], most: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """At most so many trials, which stand for all: one for each cell, with the weight of those in it.

    A recipe's density costs time in proportion to the kernels. Beyond a hundred, Optuna's are no narrower than a
    hundredth of the axis, about a cell: those in one cell are nearly the same, as in Wand, "Fast computation of
    multivariate kernel estimators", 1994. Of too many cells every k-th is taken. Of 4,096 trials on two axes 15 % fail
    with all kernels, 14 % with one a cell, 18 % with 512 of the cells, 26 % with 512 kernels chosen evenly, whose holes
    draw candidates; on four axes 32, 32, 24 and 30 %. The best recipe found is as good (within 2e-5) in all of them.
    """
    if len(numbers) <= most:
        return numbers, weights
    _, first, which = np.unique(cells[numbers], return_index=True, return_inverse=True)
    numbers, weights = numbers[first], np.bincount(which, weights).astype(float)
    if len(numbers) <= most:
        return numbers, weights
    at = ((np.arange(most) + 0.5) * (len(numbers) / most)).astype(int)
    return numbers[at], weights[at] * (weights.sum() / weights[at].sum())


class BlockTPE(optuna.samplers.TPESampler):
    """Optuna's TPE for a block of recipes: one fit, and each recipe is the best of its own candidates.

    Asked one by one with the same trials told, each recipe would have the same distribution; Optuna fits and looks
    for its space anew for each. A recipe does not see the others of its block, only the blocks before it, which count
    as bad until they are told (Optuna's `constant_liar`).
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        super().__init__(multivariate=True, constant_liar=True)
        self._axes = distributions
        self._known = {name: axis for name, axis in distributions.items() if not axis.single()}

    def block(self, seen: Seen, size: int, seed: int) -> list[dict[str, Scalar]]:
        self._rng.rng.seed(seed)
        if seen.completed < self._n_startup_trials or not self._known:
            return [at_random(self._axes, self._rng.rng) for _ in range(size)]
        below, above = self._fit_below(seen), self._fit_above(seen)
        samples = below.sample(self._rng.rng, size * self._n_ei_candidates)
        gains = self._compute_acquisition_func(samples, below, above).reshape(size, -1)
        best = gains.argmax(axis=1) + np.arange(size) * self._n_ei_candidates
        columns = {name: samples[name][best].tolist() for name in self._known}
        return [
            {n: a.to_external_repr(columns[n][i]) if n in columns else _only(a) for n, a in self._axes.items()}
            for i in range(size)
        ]

    def _fit_below(self, seen: Seen) -> _Kernels:
        return _Kernels(seen.points(seen.below(), self._known), self._known, self._parzen_estimator_parameters)

    def _fit_above(self, seen: Seen) -> _Kernels:
        """The newest trials weigh most, as in Optuna; those not told are thinned apart: they matter most."""
        told, open_ = seen.above()
        weights = self._parzen_estimator_parameters.weights(len(told) + len(open_))
        newest, heavy = thinned(open_, weights[len(told) :], seen.cells, MOST_ABOVE // 2)
        oldest, light = thinned(told, weights[: len(told)], seen.cells, MOST_ABOVE - len(newest))
        points = seen.points(np.concatenate([oldest, newest]), self._known)
        return _Kernels(points, self._known, self._parzen_estimator_parameters, np.concatenate([light, heavy]))


class _Kernels(_ParzenEstimator):
    """Optuna's Parzen estimator, which draws and weighs many candidates quickly.

    Optuna's inverts the normal distribution by Newton's method in Python floats, and weighs each axis of each pair of
    candidate and kernel apart: together half a millisecond a recipe or more.
    """

    def sample(self, rng: np.random.RandomState, size: int) -> dict[str, np.ndarray]:
        mixture = self._mixture_distribution
        kernels = rng.choice(len(mixture.weights), p=mixture.weights, size=size)
        columns = (
            _draw_choices(kernel.weights[kernels], rng)
            if isinstance(kernel, _BatchedCategoricalDistributions)
            else _draw_numbers(kernel, kernels, rng)
            for kernel in mixture.distributions
        )
        return dict(zip(self._search_space, columns, strict=True))

    def log_pdf(self, samples_dict: dict[str, np.ndarray]) -> np.ndarray:
        """The log of a product of kernels is a scalar product of features of the candidate and of the kernel.

        No need to keep the exponentials from under- and overflow: the prior's kernel is as wide as the space.
        """
        mixture = self._mixture_distribution
        left, right = [], [np.log(mixture.weights)[np.newaxis]]
        for kernel, x in zip(mixture.distributions, samples_dict.values(), strict=True):
            features, factors = (_table if _is_discrete(kernel) else _parabola)(kernel, x)
            left.append(features)
            right.append(factors)
        candidates = np.hstack([np.ones((len(left[0]), 1)), *left])
        kernels = np.vstack(right)
        rows = max(1, ONE_THREAD // kernels.size)
        sums = [_sum_of_exp(candidates[i : i + rows] @ kernels) for i in range(0, len(candidates), rows)]
        logs: NDArray[np.float64] = np.log(np.concatenate(sums))
        return logs


def _sum_of_exp(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over each row, in place of the logs."""
    np.maximum(logs, NOTHING, out=logs)
    sums: NDArray[np.float64] = np.exp(logs, out=logs).sum(axis=1)
    return sums


def _is_discrete(kernel: Any) -> bool:
    return isinstance(kernel, _BatchedCategoricalDistributions) or kernel.step != 0


def _parabola(kernel: Any, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log N(x; mu, sigma), cut off at the ends of the axis, as a polynomial in x (from the middle: rounding)."""
    low, high, sigma = kernel.adapted_low, kernel.adapted_high, kernel.sigma
    middle = (low + high) / 2
    x, mu = (np.log(x) if kernel.is_log else x) - middle, kernel.mu - middle
    a, b, mass = (low - kernel.mu) / sigma, (high - kernel.mu) / sigma, np.zeros_like(sigma)
    cut = (a > -9) | (b < 9)  # of the others nothing is cut off that a float could tell from nothing
    mass[cut] = _truncnorm._log_gauss_mass(a[cut], b[cut])  # noqa: SLF001 - Optuna's mixture calls it too
    constant = -0.5 * (mu / sigma) ** 2 - np.log(sigma) - 0.5 * math.log(2 * math.pi) - mass
    return np.stack([x * x, x, np.ones_like(x)], axis=1), np.stack([-0.5 / sigma**2, mu / sigma**2, constant])


def _table(kernel: Any, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each value that occurs, as a unit vector; the log of each kernel's mass there."""
    values, which = np.unique(x, return_inverse=True)
    if isinstance(kernel, _BatchedCategoricalDistributions):
        masses = np.log(kernel.weights.T[values.astype(int)])
    else:
        ends = (values[:, np.newaxis] + half for half in (-kernel.step / 2, kernel.step / 2))
        left, right = (((np.log(v) if kernel.is_log else v) - kernel.mu) / kernel.sigma for v in ends)
        low, high = ((end - kernel.mu) / kernel.sigma for end in (kernel.adapted_low, kernel.adapted_high))
        masses = _truncnorm._log_gauss_mass(left, right) - _truncnorm._log_gauss_mass(low, high)  # noqa: SLF001
    return np.eye(len(values))[which], masses


def _draw_choices(weights: NDArray[np.float64], rng: np.random.RandomState) -> NDArray[np.float64]:
    steps = np.cumsum(weights, axis=1)[:, :-1]  # the last is 1, but for rounding
    choices: NDArray[np.float64] = (steps < rng.rand(len(weights), 1)).sum(axis=1).astype(float)
    return choices


def _draw_numbers(kernel: Any, kernels: NDArray[np.intp], rng: np.random.RandomState) -> NDArray[np.float64]:
    """Normal numbers, drawn again where they fall outside of the axis: a third of them fall inside at the least."""
    mu, sigma = kernel.mu[kernels], kernel.sigma[kernels]
    x = rng.normal(mu, sigma)
    while (out := np.flatnonzero((x < kernel.adapted_low) | (x > kernel.adapted_high))).size:
        x[out] = rng.normal(mu[out], sigma[out])
    x = np.exp(x) if kernel.is_log else x
    if kernel.step:
        x = kernel.low + np.round((x - kernel.low) / kernel.step) * kernel.step
    within: NDArray[np.float64] = np.clip(x, kernel.low, kernel.high)
    return within


def at_random(
    axes: Mapping[str, BaseDistribution], rng: np.random.RandomState, seed: int | None = None
) -> dict[str, Scalar]:
    """What Optuna's RandomSampler draws, with a generator of that seed. To seed one costs less than to make one."""
    if seed is not None:
        rng.seed(seed)
    return {name: _only(axis) if axis.single() else _uniform(axis, rng) for name, axis in axes.items()}


def block_at_random(
    axes: Mapping[str, BaseDistribution], rng: np.random.RandomState, search: SearchConfig, numbers: Iterable[int]
) -> list[dict[str, Scalar]]:
    """Recipes of trials with these numbers, by the random sampler: each depends on its number alone."""
    return [at_random(axes, rng, mixed_seed(search.seed, number)) for number in numbers]


def _uniform(axis: BaseDistribution, rng: np.random.RandomState) -> Scalar:
    trans = _SearchSpaceTransform({"x": axis})
    value: Scalar = trans.untransform(rng.uniform(trans.bounds[:, 0], trans.bounds[:, 1]))["x"]
    return value


def _only(axis: BaseDistribution) -> Scalar:
    """The value of an axis that has one."""
    if isinstance(axis, CategoricalDistribution):
        return axis.choices[0]
    assert isinstance(axis, (FloatDistribution, IntDistribution))
    return axis.low


def sampler(search: SearchConfig, space: Space, number: int) -> BaseSampler:
    """A fresh sampler for one trial, of those that ask Optuna's storage; its generator is of the trial's number."""
    seed = mixed_seed(search.seed, number)
    plain = optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, independent_sampler=plain)
    if search.sampler == "cmaes":
        return PlainCmaEs(seed=seed, independent_sampler=plain, warn_independent_sampling=False)
    if search.sampler == "qmc":  # one sequence for the whole study; the store counts its points
        return optuna.samplers.QMCSampler(
            seed=search.seed, scramble=True, independent_sampler=plain, warn_independent_sampling=False
        )
    grid = {name: list(axis.grid(search.grid_points)) for name, axis in space.axes}
    return optuna.samplers.GridSampler(grid, seed=search.seed)  # it shuffles the grid: one order for all trials


def ask(study: optuna.Study, search: SearchConfig, space: Space, number: int) -> optuna.Trial:
    """A trial of a sampler that looks into Optuna's storage, and leaves there what it has to remember.

    Raises:
        ValueError: by what somebody else had left there, it has drawn what is not in the space.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental samplers, and samplers that take choices one by one
        study.sampler = sampler(search, space, number)
        trial = study.ask(fixed_distributions={name: distribution(axis) for name, axis in space.axes})
    if trial.number != number or not space.contains(trial.params):
        raise ValueError(f"the sampler has drawn {shorten(trial.params)} for trial {number}")
    return trial


def mixed_seed(seed: int, what: int | str) -> int:
    """Another one for each number or name."""
    digest = hashlib.sha256(json.dumps([seed, what]).encode()).digest()
    return int.from_bytes(digest[:4], "big")
