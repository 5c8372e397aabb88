"""Optuna's CMA-ES, with its state kept as numbers.

Optuna keeps it as a pickle in the trials' attributes and unpickles it at the next ask, so whoever can write to the
journal could run code in the process that resumes the run. Here the journal holds JSON: what a generation changes
(Hansen, arXiv:1604.00772). The constants, such as the size of the population, are those of a new optimizer.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import CmaEsSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

CMA = Any  # cmaes.CMA: the package has no types, and it is imported where it is needed
CHANGES = ("_mean", "_sigma", "_C", "_p_sigma", "_pc", "_g")
MOST = 1e32  # that cmaes lets a mean or a step size grow to


class PlainCmaEs(CmaEsSampler):
    """For one ask: it remembers the optimizer that Optuna's code works on."""

    _optimizer: CMA
    _axes: dict[str, BaseDistribution]

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._axes = search_space
        return super().sample_relative(study, trial, search_space)

    def _init_optimizer(self, trans: _SearchSpaceTransform, direction: StudyDirection) -> CMA:
        self._optimizer = super()._init_optimizer(trans, direction)
        return self._optimizer

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> CMA | None:
        for trial in reversed(completed_trials):
            kept = {k: v for k, v in trial.system_attrs.items() if k.startswith(self._attr_key_optimizer)}
            if kept:
                self._optimizer = _restored(self._new(), self._concat_optimizer_attrs(kept))
                return self._optimizer
        return None

    def _new(self) -> CMA:
        """Made by another sampler: to make one draws a number."""
        trans = _SearchSpaceTransform(self._axes, transform_step=True, transform_0_1=True)
        return CmaEsSampler(seed=0)._init_optimizer(trans, StudyDirection.MINIMIZE)  # noqa: SLF001 - of our own class

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:  # noqa: ARG002 - the pickle
        state = {name: np.asarray(getattr(self._optimizer, name)).tolist() for name in CHANGES}
        return super()._split_optimizer_str(json.dumps(state))


def _restored(optimizer: CMA, text: str) -> CMA:
    """Put the state into a new optimizer.

    Raises:
        ValueError: it is no state, or one of another space.
    """
    try:
        state = json.loads(text)
        found = {name: np.asarray(state[name], dtype=float) for name in CHANGES}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            "the state of CMA-ES is not numbers as this version keeps them; pickles are not read"
        ) from error
    for name, value in found.items():
        new = np.asarray(getattr(optimizer, name), dtype=float)
        if value.shape != new.shape or not (np.abs(value) <= MOST).all():
            raise ValueError(f"the state of CMA-ES does not fit the space: {name.lstrip('_')}")
    if found["_sigma"] <= 0 or found["_g"] < 0:
        raise ValueError("the state of CMA-ES has no step size or no generation")
    covariance = (
        np.triu(found["_C"]) + np.triu(found["_C"], 1).T
    )  # what a pickle of it keeps: rounding is not symmetric
    values = found | {"_C": covariance, "_sigma": found["_sigma"][()], "_g": int(found["_g"])}
    for name, value in values.items():
        setattr(optimizer, name, value)
    return optimizer
