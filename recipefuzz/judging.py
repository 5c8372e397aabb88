"""Verdicts for given recipes: no search, no store; a table in, a table out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipefuzz.axes import TAKEN
from recipefuzz.config import Config
from recipefuzz.engines.ahead import of_recipes
from recipefuzz.engines.job import Job, run
from recipefuzz.engines.rehearse import rehearse
from recipefuzz.engines.select import open_engine
from recipefuzz.errors import InputError, Place, did_you_mean
from recipefuzz.listening import Listener, Silent
from recipefuzz.recipe import AXES, Recipe
from recipefuzz.report.recipes_csv import as_table, parse_cell
from recipefuzz.report.tables import verdicts_frame, write_csv
from recipefuzz.result import Phase, TrialResult
from recipefuzz.searched import to_result
from recipefuzz.searching import as_config
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import Task

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = ("row", "index")  # columns that other tools number rows with; those of our own tables are TAKEN


def judge_recipes(
    config: Config | dict[str, Any] | str | Path,
    recipes: Path | str | pd.DataFrame,
    listener: Listener | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Judge recipes with the config's target and trial.

    Args:
        out: a CSV file for the table; if the run is interrupted, it gets the rows that are finished.
        recipes: a CSV file or its table: a column per axis, a row per recipe; an empty cell is null.

    Returns:
        The table as given, with the columns verdict, cause, skill, steps and reason.

    Raises:
        InputError: an unknown or a missing column, a value that an axis does not accept.
    """
    config = as_config(config)
    listener = listener or Silent()
    place = Place(str(recipes) if isinstance(recipes, (str, Path)) else "recipes")
    table = as_table(recipes)
    task = resolve(config)
    axes = _axes(table, task, config, place)
    parsed = [_recipe(config, table, axes, row, place) for row in range(len(table))]
    rehearse(task, config, parsed[0])
    results: dict[int, TrialResult] = {}
    try:
        _train(config, task, parsed, listener, results)
    finally:
        done = sorted(results)
        judged = verdicts_frame(table.iloc[done], [results[i] for i in done])
        if out is not None and done:
            write_csv(judged, out)
    return judged


def _axes(table: pd.DataFrame, task: Task, config: Config, place: Place) -> list[str]:
    """The columns that are axes; the others are ours, or an error."""
    takes = task.takes if task.takes is not None else frozenset(map(str, table.columns))
    known = sorted({*AXES, *(takes - {"norm"}), *config.axis_names})
    axes = [str(c) for c in table.columns if c not in (*TAKEN, *NUMBERS)]
    for column in axes:
        if column not in known:
            raise InputError(
                f"unknown column {column!r}",
                place=Place(place.file, 1),
                expected=", ".join(known),
                fix=did_you_mean(column, known),
            )
    missing = [name for name in config.axes.names if name not in axes]
    if missing or not axes:
        what = f"the column {missing[0]!r} is missing" if missing else "no column is an axis"
        expected = f"a column for each searched axis: {', '.join(config.axes.names) or ', '.join(AXES)}"
        raise InputError(what, place=Place(place.file, 1), found=", ".join(map(str, table.columns)), expected=expected)
    return axes


def _recipe(config: Config, table: pd.DataFrame, axes: list[str], row: int, place: Place) -> Recipe:
    values = {axis: parse_cell(axis, table[axis].iloc[row]) for axis in axes}
    for axis, value in values.items():
        rule = AXES.get(axis)
        if rule is not None and not rule.accepts(value):
            raise InputError(
                f"not a value of {axis} ({rule.meaning})",
                place=Place(place.file, row + 2, axis),
                found=table[axis].iloc[row] if value is not None else "an empty cell",
                expected=rule.expected.replace("null", "an empty cell"),
            )
    return config.recipe_of(values)


def _train(
    config: Config, task: Task, recipes: list[Recipe], listener: Listener, results: dict[int, TrialResult]
) -> None:
    """Fill `results` by row, as they finish."""
    engine = open_engine(config, task, listener.say, of_recipes(recipes), recipe=recipes[0])
    listener.begin(Phase.SEARCH, (), len(recipes))
    try:
        for outcome in run(engine, [Job(i, recipe, config.trial.seed) for i, recipe in enumerate(recipes)]):
            result = to_result(config, outcome, Phase.SEARCH)
            results[result.trial] = result
            listener.finished(result)
    finally:
        engine.close()
