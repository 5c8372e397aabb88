"""A task: a model to build, rows to learn from and a loss. What `target:` of a config becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, Subset, default_collate

from recipefuzz.targets.non_finite import NonFinite

Loss = Callable[[Any, Any], Tensor]

READ_ROWS = 10_000  # rows of a Dataset that a check reads at most, evenly spread; tensors are read whole
CHUNK = 1024  # rows of a Dataset that are in memory at once
SLICE = 65_536  # of a tensor, whose slices are no copies


class Rows(Protocol):
    """Rows of data that can be drawn by index, on one device."""

    def __len__(self) -> int: ...

    @property
    def index_device(self) -> torch.device:
        """Where `take` wants its index: on another device, it waits for a copy at every batch."""
        ...

    def take(self, index: Tensor) -> tuple[Any, Any]:
        """The inputs and targets of the rows in `index`, an int64 tensor of shape (batch,) on `index_device`.

        `TensorRows` take an index of any shape: rows of several batches at once.
        """
        ...

    def to(self, device: torch.device) -> Rows: ...


@dataclass(frozen=True)
class TensorRows:
    """Inputs (N, ...) and targets (N, ...), kept on the device whole: a batch is one gather there."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def index_device(self) -> torch.device:
        return self.x.device

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return _rows_of(self.x, index), _rows_of(self.y, index)

    def to(self, device: torch.device) -> TensorRows:
        return TensorRows(self.x.to(device), self.y.to(device))


def _rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[index]`, which takes five times as long on a CPU for rows of some dozen numbers."""
    return tensor.index_select(0, index.reshape(-1)).view(*index.shape, *tensor.shape[1:])


@dataclass(frozen=True)
class DatasetRows:
    """A map-style `torch.utils.data.Dataset` of (input, target) pairs, read row by row on the CPU.

    Rows are read when they are drawn, so random augmentation stays random, and follows the trial's seed.
    """

    dataset: Dataset[Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def index_device(self) -> torch.device:
        return torch.device("cpu")  # rows are read one by one, by a Python number

    def take(self, index: Tensor) -> tuple[Any, Any]:
        pairs = [self.dataset[i] for i in index.tolist()]
        first = pairs[0]
        if not isinstance(first, (tuple, list)) or len(first) != 2:
            kind = type(first).__name__ + (f" of {len(first)}" if isinstance(first, Sized) else "")
            raise ValueError(f"a row of the Dataset is a {kind}, expected a pair: (input, target)")
        if not all(isinstance(part, (Tensor, int)) for part in first):  # else there is nothing to make single
            pairs = [tree_map(_single, pair) for pair in pairs]
        x, y = default_collate(pairs)
        return tree_map(self._move, x), tree_map(self._move, y)

    def to(self, device: torch.device) -> DatasetRows:
        return DatasetRows(self.dataset, device)

    def _move(self, leaf: Any) -> Any:
        return leaf.to(self.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


def _single(leaf: Any) -> Any:
    """Python's and numpy's numbers of 64 bits in 32, as models take them; tensors as they are."""
    if isinstance(leaf, float):
        return np.float32(leaf)
    return leaf.astype(np.float32) if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 else leaf


class Scale(Protocol):
    """A map of inputs or targets, on one device."""

    def __call__(self, values: Any, /) -> Any: ...

    def to(self, device: torch.device) -> Scale: ...


@dataclass(frozen=True)
class ScaledRows:
    """Rows whose inputs and targets pass through a map, if there is one, when they are drawn."""

    rows: Rows
    scale_x: Scale | None
    scale_y: Scale | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def index_device(self) -> torch.device:
        return self.rows.index_device

    def take(self, index: Tensor) -> tuple[Any, Any]:
        x, y = self.rows.take(index)
        return self.scale_x(x) if self.scale_x else x, self.scale_y(y) if self.scale_y else y

    def to(self, device: torch.device) -> ScaledRows:
        scales = [scale.to(device) if scale else None for scale in (self.scale_x, self.scale_y)]
        return ScaledRows(self.rows.to(device), *scales)


@dataclass(frozen=True)
class Task:
    """What our engines train.

    Attributes:
        build: makes a fresh model from keyword arguments (`norm` and the recipe's extra axes).
        loss: (output, target) -> scalar tensor.
        loss_kind: "cross_entropy", "mse", "bce", or "custom" for a user's own.
        takes_norm: whether `build` has a `norm` argument; else existing layers are replaced.
        takes: names of the other keyword arguments of `build`; None if it takes any.
        non_finite: values of the data that are not finite, those of the training set first.
    """

    train: Rows
    test: Rows
    build: Callable[..., nn.Module]
    loss: Loss
    loss_kind: str
    takes_norm: bool
    takes: frozenset[str] | None
    non_finite: tuple[NonFinite, ...] = ()

    @property
    def bad_rows(self) -> frozenset[int]:
        """Training rows that hold such values, as far as the findings name them."""
        return frozenset(row for f in self.non_finite if f.name.endswith("_train") for row in f.rows)


def only(rows: Rows, index: Tensor) -> Rows:
    """Some of a task's rows, which pass through no scaling yet."""
    if isinstance(rows, DatasetRows):
        return DatasetRows(Subset(rows.dataset, index.tolist()), rows.device)
    return TensorRows(*rows.take(index))


def some_rows(rows: Rows, most: int) -> Tensor:
    """Indices, at most `most`, evenly spread over the rows; all of them where there are no more."""
    n = len(rows)
    if n <= most:
        return torch.arange(n)
    return torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()  # float32 counts in twos from 2**24


def read(rows: Rows) -> Iterator[tuple[Tensor, Any, Any]]:
    """Rows for a check, some at a time: their indices, inputs and targets. All of tensors, `READ_ROWS` of a Dataset."""
    if isinstance(rows, TensorRows):
        for start in range(0, len(rows), SLICE):
            part = slice(start, start + SLICE)
            yield torch.arange(len(rows))[part], rows.x[part], rows.y[part]
        return
    for index in some_rows(rows, READ_ROWS).split(CHUNK):
        yield (index, *rows.take(index))


def read_targets(rows: Rows) -> Tensor:
    """The targets of the rows that `read` reads; the inputs are dropped on the way."""
    return rows.y if isinstance(rows, TensorRows) else torch.cat([y for _, _, y in read(rows)])
