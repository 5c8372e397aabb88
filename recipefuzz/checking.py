"""`recipefuzz check`: is it the recipe at all? Preflight checks of a config's default recipe."""

from __future__ import annotations

from collections.abc import Iterator

from recipefuzz.checks.every import findings
from recipefuzz.config import Config
from recipefuzz.diagnosing import as_patient
from recipefuzz.engines.rehearse import try_step
from recipefuzz.finding import Finding
from recipefuzz.targets.resolve import resolve


def check(config: Config) -> Iterator[Finding]:
    """Findings one after the other, as the checks are made.

    Raises:
        InputError: the user's code can't be run: what `recipefuzz search` refuses, too.
    """
    task, recipe = resolve(config), config.default_recipe()
    try_step(task, config, recipe)
    with as_patient(config, task, recipe, config.trial.seed) as patient:
        yield from findings(patient)
