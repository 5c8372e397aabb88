"""What would be submitted, to be looked at. Nothing is made or written; neither SLURM nor torch is needed."""

from __future__ import annotations

from recipefuzz.config import Config
from recipefuzz.launch import by_template, slurm
from recipefuzz.run_folder import RunFolder


def scripts(config: Config) -> tuple[str, ...]:
    """The scripts of the jobs that `recipefuzz submit` would submit.

    Raises:
        InputError: no template, or one that can't be filled in; submitit is not installed.
    """
    run = RunFolder.of(config).path
    return (by_template.fill(config, run),) if config.run.launcher == "template" else slurm.scripts(config, run)
