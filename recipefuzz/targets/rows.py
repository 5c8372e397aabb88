"""Whatever a user's `load()` returns -> training and held-out rows, or one clear error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from recipefuzz.errors import InputError, Place
from recipefuzz.targets.non_finite import MOST_ROWS, NonFinite
from recipefuzz.targets.task import DatasetRows, Rows, TensorRows, read

EXPECTED = "(x_train, y_train, x_test, y_test) as tensors or numpy arrays, or (train, test) as torch Datasets"


def as_rows(loaded: Any, place: Place) -> tuple[Rows, Rows]:
    """Training and held-out rows.

    Raises:
        InputError: another kind of thing, no rows, inputs and targets of different lengths.
    """
    if not isinstance(loaded, (tuple, list)):
        raise InputError("load() returned something else", place=place, found=type(loaded), expected=EXPECTED)
    if len(loaded) == 2 and all(isinstance(part, Dataset) for part in loaded):
        return _dataset_rows(loaded[0], "train", place), _dataset_rows(loaded[1], "test", place)
    if len(loaded) != 4:
        kinds = ", ".join(type(part).__name__ for part in loaded)
        raise InputError("load() returned something else", place=place, found=f"({kinds})", expected=EXPECTED)
    x_train, y_train, x_test, y_test = (_tensor(part, place) for part in loaded)
    return _tensor_rows(x_train, y_train, "train", place), _tensor_rows(x_test, y_test, "test", place)


def _tensor(values: Any, place: Place) -> Tensor:
    """A tensor as it is; a numpy array or list as float32 or int64, the types that models and losses take."""
    if isinstance(values, Tensor):
        return values.detach().cpu()  # engines move them to where they train
    try:
        array = np.asarray(values)
        # a copy where need be: torch takes no array that is reversed, read-only or of another byte order
        tensor = torch.as_tensor(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"load() returned something that is no tensor: {error}",
            place=place,
            found=type(values),
            expected=EXPECTED,
        ) from error
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _tensor_rows(x: Tensor, y: Tensor, name: str, place: Place) -> TensorRows:
    if x.dim() == 0 or y.dim() == 0:
        raise InputError(f"x_{name} or y_{name} is a single number", place=place, expected=EXPECTED)
    if len(x) != len(y):
        found = f"x_{name} has {len(x)} rows, y_{name} has {len(y)}"
        raise InputError(
            "inputs and targets of different lengths", place=place, found=found, expected="as many of each"
        )
    _some(len(x), name, place)
    return TensorRows(x, y)


def _dataset_rows(dataset: Any, name: str, place: Place) -> Rows:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"the {name} Dataset has no length",
            place=place,
            found=type(dataset),
            expected="a map-style Dataset with __len__ and __getitem__: rows are drawn by index",
        )
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return _tensor_rows(*dataset.tensors, name, place)
    _some(len(dataset), name, place)
    return DatasetRows(dataset)


def _some(rows: int, name: str, place: Place) -> None:
    if rows == 0:
        fix = "look at the split in load()"
        raise InputError(f"the {name} data have no rows", place=place, expected="at least one row", fix=fix)


def non_finite(rows: Rows, name: str) -> tuple[NonFinite, ...]:
    """What is not finite in the inputs, and what in the targets, of the set of that name (`train` or `test`)."""
    parts: tuple[list[_Bad], list[_Bad]] = ([], [])
    for index, *both in read(rows):
        for bad, values in zip(parts, both, strict=True):
            if isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all():
                bad.append(_bad(index, values))
    return tuple(_finding(f"{letter}_{name}", bad) for letter, bad in zip("xy", parts, strict=True) if bad)


class _Bad(NamedTuple):
    """The values of some rows that are not finite: where the first one is, how many, in which rows."""

    column: tuple[int, ...]
    value: float
    total: int
    rows: list[int]


def _bad(index: Tensor, values: Tensor) -> _Bad:
    where = (~values.isfinite()).nonzero()
    first = tuple(where[0].tolist())
    return _Bad(first[1:], float(values[first]), len(where), index[where[:, 0].unique()].tolist())


def _finding(name: str, parts: list[_Bad]) -> NonFinite:
    first, rows = parts[0], [row for part in parts for row in part.rows]
    count = sum(part.total for part in parts)
    return NonFinite(name, rows[0], first.column, first.value, count, tuple(rows[:MOST_ROWS]), len(rows))
