"""What is read of a set of rows: all of tensors, some rows of a Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from recipefuzz.finding import Level
from recipefuzz.targets.task import Rows, TensorRows, some_rows

READ = 1000  # rows of a Dataset, evenly spread, each of which may be an image file


@dataclass(frozen=True)
class Problem:
    """A finding of one kind; of the level "pass" what is told where nothing is wrong."""

    level: Level
    seen: str
    todo: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Rows that were read.

    Attributes:
        inputs, targets: as a batch of all of them.
        total: rows that there are.
    """

    inputs: Any
    targets: Any
    read: int
    total: int

    def __len__(self) -> int:
        return self.read

    @property
    def whole(self) -> bool:
        return self.read == self.total

    @property
    def x(self) -> Tensor | None:
        """Inputs, where they are one tensor."""
        return self.inputs if isinstance(self.inputs, Tensor) else None

    @property
    def y(self) -> Tensor | None:
        return self.targets if isinstance(self.targets, Tensor) else None

    @property
    def table(self) -> Tensor | None:
        """Inputs (N, F) of numbers; None for images, sequences, tokens, whose columns mean nothing by themselves."""
        x = self.x
        return x if x is not None and x.dim() == 2 and x.is_floating_point() else None


def part_of(rows: Rows) -> Part:
    if isinstance(rows, TensorRows):
        return Part(rows.x, rows.y, len(rows), len(rows))
    index = some_rows(rows, READ).to(rows.index_device)
    return Part(*rows.take(index), len(index), len(rows))
