"""What the log of a shared study says: which trials there are, who holds them, and what became of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from recipefuzz.entry_log import Entry
from recipefuzz.errors import shorten
from recipefuzz.recipe import Scalar
from recipefuzz.result import Phase, TrialResult
from recipefuzz.trial_log import ELAPSED, RESULT

HOLDER, CONFIRMS = "holder", "confirms"  # attributes of trials
WORKER = r"[\w-]{0,100}"  # a worker's name, or none: files are called so, which others make, read and take away


@dataclass
class Item:
    """A trial: of the search, or a confirming run.

    Attributes:
        id: in Optuna's storage.
        trial: number of the search trial; of a confirming run, of the one that it repeats.
        holder: the worker that trains it; empty if none does.
        lost: workers that vanished while they held it.
    """

    id: int
    phase: Phase
    trial: int
    seed: int
    values: dict[str, Scalar]
    holder: str = ""
    lost: int = 0
    result: TrialResult | None = None
    told: bool = False


@dataclass
class Board:
    """What the log says so far.

    Attributes:
        axes: that are searched, and
        seed: with which.
        studies: ids by name.
        attributes: of the search.
        search: its trials, by number.
        confirm: runs by the trial that they repeat, and seed.
        items: all of them, by id.
        held: those without a result by the worker that holds them, and id; under no name, those that nobody holds.
        searching: how many of those without a result are of the search, and
        searched: how many trials of the search have one.
        seconds: that the search had taken when its last trial was recorded.
        finished: results in the order in which they came.
    """

    axes: Mapping[str, BaseDistribution]
    seed: int
    studies: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    search: list[Item] = field(default_factory=list)
    confirm: dict[tuple[int, int], Item] = field(default_factory=dict)
    items: dict[int, Item] = field(default_factory=dict)
    held: dict[str, dict[int, Item]] = field(default_factory=dict)
    searching: int = 0
    searched: int = 0
    seconds: float = 0.0
    finished: list[TrialResult] = field(default_factory=list)

    def apply(self, entry: Entry) -> None:
        """Read one entry of the log.

        Raises:
            KeyError, TypeError, ValueError, IndexError, AttributeError: it is none that Optuna or we would write.
        """
        operation = JournalOperation(entry["op_code"])
        if operation is JournalOperation.CREATE_STUDY:
            self.studies.setdefault(entry["study_name"], len(self.studies))
        elif operation is JournalOperation.SET_STUDY_USER_ATTR:
            if entry["study_id"] == self.studies[Phase.SEARCH]:
                self.attributes |= entry["user_attr"]
        elif operation is JournalOperation.CREATE_TRIAL:
            self._create(entry)
        elif operation is JournalOperation.SET_TRIAL_PARAM:
            value = self.axes[entry["param_name"]].to_external_repr(entry["param_value_internal"])
            self.items[entry["trial_id"]].values[entry["param_name"]] = value
        elif operation is JournalOperation.SET_TRIAL_USER_ATTR:
            self._attribute(self.items[entry["trial_id"]], entry["user_attr"])
        elif operation is JournalOperation.SET_TRIAL_STATE_VALUES:
            self.items[entry["trial_id"]].told = TrialState(entry["state"]).is_finished()

    def _create(self, entry: Entry) -> None:
        attributes, id_ = entry.get("user_attrs", {}), len(self.items)
        if entry["study_id"] == self.studies[Phase.SEARCH]:
            values = {name: self.axes[name].to_external_repr(v) for name, v in entry.get("params", {}).items()}
            item = Item(id_, Phase.SEARCH, len(self.search), self.seed, values)
            self.search.append(item)
        elif entry["study_id"] == self.studies.get(Phase.CONFIRM):
            record = attributes.get(RESULT, {})
            trial, seed = attributes.get(CONFIRMS) or (record["trial"], record["seed"])
            item = Item(id_, Phase.CONFIRM, trial, seed, self.search[trial].values)
            self.confirm[trial, seed] = item
        else:
            raise ValueError("a trial of no study of ours")
        item.told = "state" in entry and TrialState(entry["state"]).is_finished()
        self.items[id_] = item
        self._hold(item)
        self.searching += item.phase is Phase.SEARCH
        self._attribute(item, attributes)

    def _attribute(self, item: Item, attributes: Mapping[str, Any]) -> None:
        if HOLDER in attributes and item.result is None:
            holder, lost = attributes[HOLDER]
            if not re.fullmatch(WORKER, holder) or not isinstance(lost, int) or lost < 0:
                raise ValueError(f"{shorten(holder)} is no worker, or {shorten(lost)} no number of lost ones")
            self._release(item)
            item.holder, item.lost = holder, lost
            self._hold(item)
        if RESULT in attributes and item.result is None:
            result = TrialResult.from_record(attributes[RESULT])
            if (result.phase, result.trial, result.seed) != (item.phase, item.trial, item.seed):
                raise ValueError(f"trial {item.trial} has the result of another one")
            item.result = result
            self._release(item)
            self.finished.append(item.result)
            self.searching -= item.phase is Phase.SEARCH
            self.searched += item.phase is Phase.SEARCH
        if not math.isfinite(elapsed := float(attributes.get(ELAPSED, 0.0))):
            raise ValueError("a time that is not finite")
        self.seconds = max(self.seconds, elapsed)

    def _hold(self, item: Item) -> None:
        self.held.setdefault(item.holder, {})[item.id] = item

    def _release(self, item: Item) -> None:
        held = self.held[item.holder]
        del held[item.id]
        if not held:
            del self.held[item.holder]

    def of(self, result: TrialResult) -> Item:
        """The trial whose result it is."""
        return self.confirm[result.trial, result.seed] if result.phase is Phase.CONFIRM else self.search[result.trial]

    @property
    def results(self) -> list[TrialResult]:
        """All finished trials: those of the search by number, then the confirming runs in their order."""
        return [i.result for i in (*self.search, *self.confirm.values()) if i.result is not None]
