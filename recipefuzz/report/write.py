"""All files that a run's folder holds beside its config and journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipefuzz.atomic import write_atomically
from recipefuzz.config import Config
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.ranking import Ranked
from recipefuzz.report.failures import buckets
from recipefuzz.report.tables import failures_frame, ranking_frame, trials_frame, write_csv
from recipefuzz.result import TrialResult
from recipefuzz.source import write_yaml


def write_reports(
    folder: Path,
    config: Config,
    results: Sequence[TrialResult],
    ranking: Sequence[Ranked],
    best: Ranked | None,
    diagnoses: Mapping[int, Diagnosis],
) -> None:
    """Write trials.csv, ranking.csv, failures.csv, and recipe.yaml where there is a winner.

    Raises:
        RunFailedError: the folder can't be written. Files that were there stay whole.
    """
    write_csv(trials_frame(results, config.axis_names), folder / "trials.csv")
    write_csv(ranking_frame(ranking, config.axis_names), folder / "ranking.csv")
    write_csv(failures_frame(buckets(results, config.axes, diagnoses)), folder / "failures.csv")
    winner = folder / "recipe.yaml"
    if best is None:
        winner.unlink(missing_ok=True)
    else:
        write_atomically(winner, winner_yaml(best, config))


def winner_yaml(row: Ranked, config: Config) -> str:
    """A `recipe:` section to paste into a config, with what is known of it."""
    head = (
        f"# the best recipe of study {config.study} (trial {row.trial.trial}): "
        f"{row.passed} of {row.runs} confirming runs converged, skill {row.skill:.3g}\n"
    )
    values = config.recipe_of(row.trial.values).values()
    values = {name: values[name] for name in config.axis_names}
    return head + write_yaml({"recipe": values})
