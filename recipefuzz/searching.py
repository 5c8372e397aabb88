"""The plot of the story: ask for recipes, train, judge, tell; then confirm the best on fresh seeds, and rank.

Not `search.py`, as the design has it: a submodule of that name would take the place of the function
`recipefuzz.search` as soon as anything imports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipefuzz import evidence
from recipefuzz.checks.every import findings
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.diagnosing import as_patient
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Engine, Job, Outcome
from recipefuzz.engines.rehearse import rehearse
from recipefuzz.engines.select import ask_ahead, open_engine, pick_device
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.finding import Level
from recipefuzz.listening import Listener, Silent
from recipefuzz.peak import Peak, megabytes
from recipefuzz.ranking import confirming_runs
from recipefuzz.result import Phase
from recipefuzz.run_folder import RunFolder, fingerprints, identity
from recipefuzz.sampling import total
from recipefuzz.searched import Clock, SearchResult, explain, report, to_result
from recipefuzz.source import numbers_as_meant
from recipefuzz.store import Store, StudySearch
from recipefuzz.targets.resolve import resolve, user_files
from recipefuzz.targets.task import Task
from recipefuzz.working import search_shared


def search(
    config: Config | dict[str, Any] | str | Path,
    *,
    fresh: bool = False,
    listener: Listener | None = None,
    checked: bool = False,
) -> SearchResult:
    """Search a study's space, confirm and rank its safe recipes; resume the run if it exists.

    Args:
        config: a config file, its contents as a mapping, or a checked Config.
        fresh: put an existing run of this name aside instead of resuming it.
        checked: the cheap preflight checks were made already.

    Raises:
        InputError: what is wrong with the config or the user's code, before anything is trained.
        RunFailedError: the run could not go on; what was finished is kept.
    """
    config = as_config(config)
    listener = listener or Silent()
    if config.run.launcher != "local":
        raise InputError(
            "what is called from Python, and a ladder, trains here and not in batch jobs",
            place=config.source.place("run", "launcher"),
            found=config.run.launcher,
            fix="launcher: local; recipefuzz submit CONFIG submits a search",
        )
    pick_device(config)  # first of all: whether the device is there
    task = ready(config, listener, checked=checked)
    folder = RunFolder.of(config)
    if folder.is_shared(config):
        return search_shared(config, task, folder, listener, fresh=fresh)
    with _opened(config, folder, task, fresh, listener) as (study, engine):
        try:
            _explore(config, study, engine, listener)
            _confirm(config, study, engine, listener)
            explain(config, task, folder, study.results, listener)
        except BaseException:
            with contextlib.suppress(RunFailedError):  # a full disk: the first error is the one to show
                report(folder, config, study.results, study.peak)
            raise
        return report(folder, config, study.results, study.peak)


def ready(config: Config, listener: Listener, *, checked: bool = False) -> Task:
    """What a search looks at before it trains.

    Args:
        checked: the cheap preflight checks were made already.

    Raises:
        InputError: what is wrong with the config or the user's code.
    """
    if not config.space:
        raise InputError(
            "nothing to search: the config has no space",
            place=config.source.place("space"),
            expected="at least one axis, such as space: {lr: {low: 1e-5, high: 10, log: true}}",
        )
    total(config.search, config.axes)  # whether a grid is too large
    task = resolve(config)
    if abs(rehearse(task, config)) < evidence.TINY:
        raise InputError(
            "a constant prediction already has loss 0: skill, which counts from it, can't be measured",
            place=config.source.place("target", "loss"),
            fix="look whether all training targets are the same, or add a constant to the loss",
        )
    if not checked:
        _check(config, task, listener)
    return task


def _check(config: Config, task: Task, listener: Listener) -> None:
    """Say what the cheap preflight checks have seen: the search goes on, and its trials have the last word."""
    with as_patient(config, task, config.default_recipe(), config.trial.seed) as patient:
        found = list(findings(patient, cheap=True))
    names = ", ".join(dict.fromkeys(finding.check for finding in found))
    wrong = [finding for finding in found if finding.level is not Level.PASS]
    listener.say(f"checked first: {names}: {'see below' if wrong else 'nothing wrong'}; recipefuzz check looks at more")
    for finding in wrong:
        listener.say(f"  {finding.level}: {finding.check}: {finding.seen}; {finding.todo}")


def as_config(config: Config | dict[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return parse_config(numbers_as_meant(config)) if isinstance(config, dict) else load_config(config)


@contextmanager
def _opened(
    config: Config, folder: RunFolder, task: Task, fresh: bool, listener: Listener
) -> Iterator[tuple[StudySearch, Engine]]:
    code = fingerprints(user_files(config))
    with (
        contextlib.closing(folder.open(config, code, fresh=fresh)) as store,
        contextlib.closing(open_engine(config, task, listener.say, _ahead(config, store))) as engine,
    ):
        window = ask_ahead(config, engine)
        yield store.begin(identity(config, code), config.axes, config.search, window), engine


def _ahead(config: Config, store: Store) -> Ahead:
    """The search, and its confirming runs."""
    confirm = config.search.confirm
    trials = total(config.search, config.axes) + confirm.top * confirm.seeds
    seconds = None if config.search.time is None else max(0.0, config.search.time - store.seconds())
    return Ahead(trials, done=len(store.results()), seconds=seconds)


def _explore(config: Config, study: StudySearch, engine: Engine, listener: Listener) -> None:
    """Ask, train, judge, tell until the budget of trials or of time is spent."""
    listener.begin(Phase.SEARCH, (r for r in study.results if r.phase is Phase.SEARCH), study.total)
    clock = Clock(config.search.time, study.seconds)
    while True:
        for asked in study.refill(stop=clock.over):
            engine.submit(Job(asked.number, config.recipe_of(asked.values), config.trial.seed))
        outcomes = engine.collect()
        if not outcomes:
            return
        _record(config, study, outcomes, Phase.SEARCH, listener, clock.seconds)


def _record(
    config: Config,
    study: StudySearch,
    outcomes: Sequence[Outcome],
    phase: Phase,
    listener: Listener,
    elapsed: float = 0.0,
) -> None:
    """Keep what finished together in one write."""
    results = [to_result(config, outcome, phase) for outcome in outcomes]
    study.record_all(results, elapsed, Peak(megabytes(), max(outcome.peak for outcome in outcomes)))
    for result in results:
        listener.finished(result)


def _confirm(config: Config, study: StudySearch, engine: Engine, listener: Listener) -> None:
    """Run the best candidates for the whole short budget on seeds that the search did not see."""
    jobs = [Job(r.trial, r.recipe, seed, whole=True) for r, seed in confirming_runs(study.results, config)]
    done = study.confirmed()
    listener.begin(Phase.CONFIRM, (r for r in study.results if r.phase is Phase.CONFIRM), len(jobs))
    for job in jobs:
        if (job.key, job.seed) not in done:
            engine.submit(job)
    while outcomes := engine.collect():
        _record(config, study, outcomes, Phase.CONFIRM, listener)
