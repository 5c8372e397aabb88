"""`recipefuzz check`: is it the recipe at all? Preflight checks of a config's default recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipefuzz.checks import reference
from recipefuzz.checks.every import findings
from recipefuzz.checks.reference_file import write_reference
from recipefuzz.config import Config
from recipefuzz.diagnosing import default_patient
from recipefuzz.finding import Finding


def check(config: Config) -> Iterator[Finding]:
    """Findings one after the other, as the checks are made.

    Raises:
        InputError: the user's code can't be run: what `recipefuzz search` refuses, too; a reference that does not
            fit the model.
    """
    with default_patient(config) as patient:
        reference.read(patient)  # what is wrong with the file is the user's to mend, and no finding
        yield from findings(patient)


def record(config: Config, path: Path) -> str:
    """Write a reference file of the model as it is; a line that says how it is used.

    Raises:
        InputError: as `check`; a file that is neither .npz nor .json.
    """
    with default_patient(config) as patient:
        found = reference.recorded(patient)
    write_reference(path, found)
    whole, folder = path.resolve(), config.source.folder
    named = whole.relative_to(folder) if whole.is_relative_to(folder) else whole
    return f"{len(found.outputs)} outputs written; to compare with them, put into the config: reference: {named}"
