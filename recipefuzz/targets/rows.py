"""Whatever a user's `load()` returns -> training and held-out rows, or one clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from recipefuzz.errors import InputError, Place
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


def check_finite(rows: Rows, name: str, place: Place) -> None:
    """Raise an InputError that names row and column of the first value that is not finite, and how many."""
    for part, *both in read(rows):
        for letter, values in zip("xy", both, strict=True):
            if isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all():
                _report_non_finite(rows, f"{letter}_{name}", "xy".index(letter), part, values, place)


def _report_non_finite(rows: Rows, name: str, side: int, part: Tensor, values: Tensor, place: Place) -> None:
    where = (~values.isfinite()).nonzero()[0]
    row, column = int(part[where[0]]), where[1:].tolist()
    spot = f"row {row}" + (f", column {', '.join(map(str, column))}" if column else "")
    whole = (rows.x, rows.y)[side] if isinstance(rows, TensorRows) else values
    bad = ~whole.isfinite()
    count = (
        f"{int(bad.sum())} such values in {int(bad.flatten(1).any(1).sum()) if bad.dim() > 1 else int(bad.sum())} rows"
    )
    raise InputError(
        f"{name} holds a value that is not finite: {spot} (counted from 0)",
        place=place,
        found=f"{values[tuple(where)].item()}; {count}",
        expected="finite numbers: one NaN in a batch makes every parameter NaN",
        fix="drop or fill those rows in load()",
    )
