"""Verdicts for given recipes: no search, no store; a table in, a table out."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from recipefuzz.config import Config
from recipefuzz.engines.job import Job, run
from recipefuzz.engines.rehearse import rehearse
from recipefuzz.engines.select import open_engine
from recipefuzz.errors import InputError, Place, did_you_mean
from recipefuzz.recipe import AXES, Recipe, Scalar, is_finite
from recipefuzz.report.tables import (
    RANKING_COLUMNS,
    TRIAL_COLUMNS,
    TRIAL_TAIL,
    VERDICT_COLUMNS,
    verdicts_frame,
    write_csv,
)
from recipefuzz.result import Phase, TrialResult
from recipefuzz.searching import Listener, Silent, as_config, to_result
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import Task

NUMBER_COLUMNS = ("trial", "row", "index", "rank", "phase", "seed")  # columns of our own tables that are no axes


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
    place = Place("recipes" if isinstance(recipes, pd.DataFrame) else str(recipes))
    table = recipes.copy() if isinstance(recipes, pd.DataFrame) else read_table(Path(recipes))
    task = resolve(config)
    axes = _axes(table, task, config, place)
    parsed = [_recipe(config, table, axes, row, place) for row in range(len(table))]
    rehearse(task, config, parsed[0])
    results: dict[int, TrialResult] = {}
    try:
        _train(config, parsed, listener, results)
    finally:
        done = sorted(results)
        judged = verdicts_frame(table.iloc[done], [results[i] for i in done])
        if out is not None and done:
            write_csv(judged, out)
    return judged


def read_table(path: Path) -> pd.DataFrame:
    """A CSV as text: "none" and "nan" are words here, and an empty cell is an empty string.

    Raises:
        InputError: no such file, not UTF-8, a column twice, rows of different lengths, no rows.
    """
    header, *rows = _read_rows(path)
    if not rows:
        raise InputError("no recipes", place=Place(str(path)), expected="at least one row below the header")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(f"the column {twice[0]!r} stands twice", place=Place(str(path), 1))
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(
                "a row of another length than the header",
                place=Place(str(path), line),
                found=f"{len(row)} cells",
                expected=f"{len(header)}: {', '.join(header)}",
            )
    return pd.DataFrame(rows, columns=header, dtype=str)


def _read_rows(path: Path) -> list[list[str]]:
    place = Place(str(path))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except FileNotFoundError as error:
        raise InputError("no such file", place=place, expected="a CSV with a column per axis") from error
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", place=place) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"not a CSV: {error}", place=place, expected="a header and rows of one length") from error
    if not rows:
        raise InputError("an empty file", place=place, expected="a header that names axes, and a row per recipe")
    return rows


def _axes(table: pd.DataFrame, task: Task, config: Config, place: Place) -> list[str]:
    """The columns that are axes; the others are ours, or an error."""
    takes = task.takes if task.takes is not None else frozenset(map(str, table.columns))
    known = sorted({*AXES, *(takes - {"norm"}), *config.axis_names})
    ignored = {*VERDICT_COLUMNS, *TRIAL_COLUMNS, *TRIAL_TAIL, *RANKING_COLUMNS, *NUMBER_COLUMNS}
    axes = [str(c) for c in table.columns if c not in ignored or c in AXES]
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


def parse_cell(axis: str, cell: Any) -> Scalar:
    """A cell's value: null where empty, a number where it reads as one, else the word."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return None
    if not isinstance(cell, str):
        return cell.item() if hasattr(cell, "item") else cell  # type: ignore[no-any-return]
    text = cell.strip()
    if not text or text.lower() == "null":
        return None
    if axis in AXES and AXES[axis].words:
        return text
    if text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if is_finite(number) else text
    return text


def _train(config: Config, recipes: list[Recipe], listener: Listener, results: dict[int, TrialResult]) -> None:
    """Fill `results` by row, as they finish."""
    engine = open_engine(config, listener.say, most=len(recipes))
    listener.begin(Phase.SEARCH, (), len(recipes))
    try:
        for outcome in run(engine, [Job(i, recipe, config.trial.seed) for i, recipe in enumerate(recipes)]):
            result = to_result(config, outcome, Phase.SEARCH)
            results[result.trial] = result
            listener.finished(result)
    finally:
        engine.close()
