"""A CSV of recipes: read as text, and each cell as the value that it means."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from recipefuzz.errors import InputError, Place
from recipefuzz.recipe import AXES, Scalar, is_finite


def as_table(recipes: Path | str | pd.DataFrame) -> pd.DataFrame:
    """A table of recipes that is the caller's to change: read, or copied."""
    return recipes.copy() if isinstance(recipes, pd.DataFrame) else read_table(Path(recipes))


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
