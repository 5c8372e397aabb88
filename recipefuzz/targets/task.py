"""A task: a model to build, rows to learn from and a loss. What `target:` of a config becomes."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, default_collate

Loss = Callable[[Any, Any], Tensor]


class Rows(Protocol):
    """Rows of data that can be drawn by index, on one device."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Any, Any]:
        """The inputs and targets of the rows in `index`, an int64 tensor of shape (batch,) on the device."""
        ...

    def to(self, device: torch.device) -> Rows: ...


@dataclass(frozen=True)
class TensorRows:
    """Inputs (N, ...) and targets (N, ...), kept on the device whole: a batch is one gather there."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def to(self, device: torch.device) -> TensorRows:
        return TensorRows(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class DatasetRows:
    """A map-style `torch.utils.data.Dataset` of (input, target) pairs, read row by row on the CPU.

    Rows are read when they are drawn, so random augmentation stays random, and follows the trial's seed.
    """

    dataset: Dataset[Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

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


@dataclass(frozen=True)
class ScaledRows:
    """Rows whose inputs and targets pass through an affine map when they are drawn."""

    rows: Rows
    scale_x: Callable[[Any], Any]
    scale_y: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Any, Any]:
        x, y = self.rows.take(index)
        return self.scale_x(x), self.scale_y(y)

    def to(self, device: torch.device) -> ScaledRows:
        return ScaledRows(self.rows.to(device), self.scale_x, self.scale_y)


@dataclass(frozen=True)
class Task:
    """What our engines train.

    Attributes:
        build: makes a fresh model from keyword arguments (`norm` and the recipe's extra axes).
        loss: (output, target) -> scalar tensor.
        loss_kind: "cross_entropy", "mse", "bce", or "custom" for a user's own.
        takes_norm: whether `build` has a `norm` argument; else existing layers are replaced.
        takes: names of the other keyword arguments of `build`; None if it takes any.
    """

    train: Rows
    test: Rows
    build: Callable[..., nn.Module]
    loss: Loss
    loss_kind: str
    takes_norm: bool
    takes: frozenset[str] | None


def some_rows(rows: Rows, most: int) -> Tensor:
    """Indices, at most `most`, evenly spread over the rows; all of them where there are no more."""
    n = len(rows)
    if n <= most:
        return torch.arange(n)
    return torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()  # float32 counts in twos from 2**24
