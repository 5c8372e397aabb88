"""Trials as entries of Optuna's journal, written without its storage."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from recipefuzz.entry_log import ENCODER, EntryLog
from recipefuzz.peak import Peak
from recipefuzz.recipe import Scalar
from recipefuzz.records import read_record
from recipefuzz.result import TrialResult
from recipefuzz.sampling import objective

RESULT, ELAPSED, META, PEAK = "result", "elapsed", "recipefuzz", "peak_memory"  # attributes of trials and studies
WRITER = "recipefuzz"  # in the place of the id that Optuna gives each of its writers


class TrialLog:
    """Writes trials as entries of Optuna's journal, without its storage.

    The storage makes about ten entries a trial and replays each at once; with these four, which it replays when it is
    next asked something, a trial costs a tenth.

    Args:
        trials: how many the journal holds, in all its studies: Optuna numbers them all in one row.
    """

    def __init__(
        self, journal: EntryLog, study_id: int, distributions: Mapping[str, BaseDistribution], trials: int
    ) -> None:
        self._journal, self._study_id, self.trials = journal, study_id, trials
        self._distributions = distributions
        self._as_json = {name: _brief(axis) for name, axis in distributions.items()}

    def asked(self, recipe: Mapping[str, Scalar], attributes: Mapping[str, Any] | None = None) -> int:
        params = {name: axis.to_internal_repr(recipe[name]) for name, axis in self._distributions.items()}
        fields = {"user_attrs": dict(attributes)} if attributes else {}
        state = TrialState.RUNNING
        return self._create(self._study_id, state, distributions=self._as_json, params=params, **fields)

    def begun(self, study_id: int, attributes: Mapping[str, Any]) -> None:
        self._create(study_id, TrialState.RUNNING, user_attrs=dict(attributes))

    def confirmed(self, study_id: int, result: TrialResult) -> None:
        """A confirming run that nobody was told of before it was done."""
        value = None if result.error else objective(result)[0]
        state, attributes = TrialState.FAIL if result.error else TrialState.COMPLETE, {RESULT: result.record()}
        self._create(study_id, state, value=value, datetime_complete=_now(), user_attrs=attributes)

    def told(self, trial_id: int, result: TrialResult, *, constraint: bool = True) -> None:
        """A failed recipe is a completed, infeasible observation: samplers ignore FAIL and go back there.

        Args:
            constraint: False for CMA-ES, which knows no constraints: the value alone ranks for it.
        """
        if result.error:
            self._finish(trial_id, TrialState.FAIL, None)
            return
        value, violation = objective(result)
        if constraint:  # what Trial.set_constraint("failed", violation) writes
            attribute = {"constraints:failed": violation}
            self._add(JournalOperation.SET_TRIAL_SYSTEM_ATTR, trial_id=trial_id, system_attr=attribute)
        self._finish(trial_id, TrialState.COMPLETE, [value])

    def attribute(self, trial_id: int, key: str, value: Any) -> None:
        self._add(JournalOperation.SET_TRIAL_USER_ATTR, trial_id=trial_id, user_attr={key: value})

    def study_attribute(self, key: str, value: Any) -> None:
        self._add(JournalOperation.SET_STUDY_USER_ATTR, study_id=self._study_id, user_attr={key: value})

    def _finish(self, trial_id: int, state: TrialState, values: list[float] | None) -> None:
        operation = JournalOperation.SET_TRIAL_STATE_VALUES
        self._add(operation, trial_id=trial_id, state=state, values=values, datetime_complete=_now())

    def _create(self, study_id: int, state: TrialState, **fields: Any) -> int:
        operation = JournalOperation.CREATE_TRIAL
        self._add(operation, study_id=study_id, state=state, datetime_start=_now(), **fields)
        self.trials += 1
        return self.trials - 1

    def _add(self, operation: JournalOperation, **fields: Any) -> None:
        self._journal.append_logs([{"op_code": int(operation), "worker_id": WRITER, **fields}])


def peak_of(attributes: Mapping[str, Any]) -> Peak:
    """Memory that a run took, from the attributes of its study.

    Raises:
        ValueError: what is kept there is not what we wrote.
    """
    return read_record(Peak, attributes.get(PEAK, {}))


def _brief(axis: BaseDistribution) -> str:
    """In the shorter one of the two forms that Optuna's `json_to_distribution` reads: it is repeated in each trial."""
    if isinstance(axis, CategoricalDistribution):
        return ENCODER.encode({"type": "categorical", "choices": axis.choices})
    assert isinstance(axis, (FloatDistribution, IntDistribution))
    fields: dict[str, Any] = {"type": "float" if isinstance(axis, FloatDistribution) else "int"}
    fields |= {"low": axis.low, "high": axis.high}
    if axis.log:
        fields["log"] = True
    elif axis.step is not None:
        fields["step"] = axis.step
    return ENCODER.encode(fields)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
