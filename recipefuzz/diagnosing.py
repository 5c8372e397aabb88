"""`recipefuzz diagnose`: one recipe, given or of a stored trial, explained; and the failures of a whole search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from recipefuzz.axes import check_value
from recipefuzz.config import Config
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.shrink import Shrunk, shrink
from recipefuzz.diagnose.trial import diagnose_trial
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.engines.ahead import of_recipes
from recipefuzz.engines.job import Engine, Job, Outcome, run
from recipefuzz.engines.rehearse import try_step
from recipefuzz.engines.select import open_engine, pick_device
from recipefuzz.errors import InputError, Place, did_you_mean
from recipefuzz.ranking import rank
from recipefuzz.recipe import AXES, Recipe, Scalar
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder
from recipefuzz.source import Source, write_yaml
from recipefuzz.space import Choice
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import Task
from recipefuzz.verdict import Label


@dataclass(frozen=True)
class Diagnosed:
    """A diagnosis with the trial that it is of.

    Attributes:
        shrunk: what of the recipe is to blame; None where no recipe is known to converge, or the recipe isn't at fault.
    """

    config: Config
    recipe: Recipe
    seed: int
    diagnosis: Diagnosis
    shrunk: Shrunk | None

    def record(self) -> dict[str, Any]:
        """One JSON object, as in the design's section 6."""
        blame = {} if self.shrunk is None else {"blamed": dict(self.shrunk.blamed), "threshold": str(self.shrunk)}
        own = {"recipe": self.recipe.values(), "seed": self.seed}
        return self.diagnosis.record(self.recipe.values()) | own | blame

    def as_config(self) -> str:
        """A config that holds this one recipe: `recipefuzz diagnose` of it shows the same again."""
        parts = self.config.resolved()
        values = {name: value for name, value in self.recipe.values().items() if name != "batch_size"}
        trial = parts["trial"] | {"seed": self.seed, "batch_size": self.recipe.batch_size}
        return write_yaml(parts | {"space": {}, "recipe": values, "trial": trial})


def diagnose(
    config: Config,
    *,
    changes: Mapping[str, Scalar] | None = None,
    trial: int | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Diagnosed:
    """Explain the config's default recipe, or a trial of its run; either with some values changed.

    Args:
        changes: axes and their values.
        trial: number of a search trial in the config's run folder.
        seed: instead of the config's.
        say: hears what is being done.

    Raises:
        InputError: no such trial, an unknown axis, a value that an axis does not take.
    """
    pick_device(config)
    for name, value in (changes or {}).items():
        check_value(name, value, Source(), "--set", name)
    stored: list[TrialResult] = []
    if trial is not None:
        stored, *_ = RunFolder.find(str(RunFolder.of(config).path)).read(config)
        recipe = _stored(stored, trial, config)
    else:
        recipe = config.default_recipe()
    recipe = recipe.but(**dict(changes or {}))
    task = resolve(config)
    _check_axes(task, config, changes or {})
    try_step(task, config, recipe)
    seed = config.trial.seed if seed is None else seed
    with as_patient(config, task, recipe, seed, say) as patient:
        found = diagnose_trial(patient)
        return Diagnosed(config, recipe, seed, found, _shrunk(patient, found, stored))


def diagnose_stored(
    config: Config, task: Task, results: Sequence[TrialResult]
) -> Iterator[tuple[TrialResult, Diagnosis]]:
    """Explain finished trials of a run, at least one, one after the other."""
    with as_patient(config, task, results[0].recipe, results[0].seed) as patient:
        for result in results:
            yield result, diagnose_trial(replace(patient, recipe=result.recipe, seed=result.seed))


@contextmanager
def as_patient(
    config: Config, task: Task, recipe: Recipe, seed: int, say: Callable[[str], None] = lambda _: None
) -> Iterator[Patient]:
    """With an engine that is opened when something is to be run.

    Changed recipes get two budgets at most, where a trial may have more: one that needs longer to show that it
    converges is no fix to recommend, and most of the time would go to those that never do.
    """
    brief = config.trial.model_copy(update={"extend": min(config.trial.extend, 1)})
    study = config.model_copy(update={"trial": brief})
    engines: list[Engine] = []

    def run_all(jobs: Sequence[Job]) -> Iterable[Outcome]:
        if not engines:
            ahead = of_recipes([job.recipe for job in jobs])
            engines.append(open_engine(study, task, lambda _: None, ahead, recipe=recipe))
        return run(engines[0], jobs)

    try:
        yield Patient(config, task, recipe, seed, torch.device(pick_device(config)), run_all, say)
    finally:
        for engine in engines:
            engine.close()


@contextmanager
def default_patient(config: Config) -> Iterator[Patient]:
    """The config's default recipe, once one step of it could be made.

    Raises:
        InputError: the user's code can't be run.
    """
    task, recipe = resolve(config), config.default_recipe()
    try_step(task, config, recipe)
    with as_patient(config, task, recipe, config.trial.seed) as patient:
        yield patient


def _stored(results: Sequence[TrialResult], trial: int, config: Config) -> Recipe:
    for result in results:
        if result.trial == trial and result.phase is Phase.SEARCH:
            return result.recipe
    numbers = [r.trial for r in results if r.phase is Phase.SEARCH]
    known = f"a trial from 0 to {max(numbers)}" if numbers else "a run with finished trials"
    raise InputError("no such trial", place=Place(str(RunFolder.of(config).path)), found=trial, expected=known)


def _check_axes(task: Task, config: Config, changes: Mapping[str, Scalar]) -> None:
    known = {*AXES, *config.axis_names, *(task.takes or ())}
    for name in changes:
        if task.takes is not None and name not in known:
            raise InputError(f"--set: unknown axis {name!r}", fix=did_you_mean(name, known))


def _shrunk(patient: Patient, found: Diagnosis, stored: Sequence[TrialResult]) -> Shrunk | None:
    """Against the nearest recipe of the run that is safe, else the fix that was found."""
    if found.root != Root.RECIPE or found.verdict == Label.CONVERGING:
        return None
    safe = _nearest(patient, stored) or (patient.recipe.but(**found.fix.values) if found.fix else None)
    if safe is None:
        return None
    patient.say("looking for the value that is to blame, and from where on it fails")
    choices = [name for name, axis in patient.config.axes.axes if isinstance(axis, Choice)]
    return shrink(patient.recipe, safe, patient.fails, choices)


def _nearest(patient: Patient, stored: Sequence[TrialResult]) -> Recipe | None:
    """Of the run's safe recipes, the one that differs least from the trial's."""
    ranked = [r for r in rank(stored, "skill", wanted=patient.config.search.confirm.seeds) if r.passed == r.runs > 0]
    space, values = patient.config.axes, patient.recipe.values()
    return min((r.trial.recipe for r in ranked), key=lambda r: space.distance(values, r.values()), default=None)
