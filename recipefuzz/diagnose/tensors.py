"""What an operation was given and gave, in numbers that outlive its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """A tensor in numbers.

    Attributes:
        low, high: least and greatest finite element; NaN where there is none.
        least: smallest magnitude of a finite element.
        zeros, nans, positive, negative: how many elements are 0, NaN, inf and -inf.
        rows: indices along the first dimension that hold something not finite, five at most.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int
    low: float
    high: float
    least: float
    zeros: int
    nans: int
    positive: int
    negative: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Stats:
        values = tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        flat = values.double() if values.is_floating_point() else values.to(torch.float64)
        finite = flat[torch.isfinite(flat)]
        low, high, least = math.nan, math.nan, math.nan
        if finite.numel():
            low, high, least = float(finite.min()), float(finite.max()), float(finite.abs().min())
        bad = ~torch.isfinite(flat)
        rows = bad.reshape(len(bad), -1).any(dim=1).nonzero()[:5, 0].tolist() if bad.dim() and bad.any() else []
        return cls(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tensor.numel(),
            low,
            high,
            least,
            int((flat == 0).sum()),
            int(torch.isnan(flat).sum()),
            int((flat == math.inf).sum()),
            int((flat == -math.inf).sum()),
            tuple(rows),
        )

    @classmethod
    def brief(cls, tensor: Tensor, finite: bool) -> Stats:
        """Shape and type of a tensor of which it is known whether all is finite; if not, one element stands for it."""
        kind, unknown = str(tensor.dtype).removeprefix("torch."), math.nan
        return cls(tuple(tensor.shape), kind, tensor.numel(), unknown, unknown, unknown, 0, int(not finite), 0, 0, ())

    @property
    def infinite(self) -> int:
        return self.positive + self.negative

    @property
    def finite(self) -> bool:
        return not self.nans and not self.infinite

    @property
    def magnitude(self) -> float:
        """Of the largest finite element; 0 if there is none."""
        return max(abs(self.low), abs(self.high)) if not math.isnan(self.low) else 0.0

    def __str__(self) -> str:
        shown = "x".join(map(str, self.shape)) or "scalar"
        parts = [f"{shown} {self.dtype}"]
        if not math.isnan(self.low):
            parts.append(f"{self.low:.3g} to {self.high:.3g}" if self.size > 1 else f"{self.low:.3g}")
        counts = ((self.zeros, "zero"), (self.nans, "NaN"), (self.positive, "inf"), (self.negative, "-inf"))
        if self.size > 1:
            parts += [f"{count} of {self.size} {name}" for count, name in counts if count]
        elif not self.finite:
            parts.append("NaN" if self.nans else "inf" if self.positive else "-inf")
        return ", ".join(parts)


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is: by a sum first, which is cheap; one that overflows is looked at closely."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def leaves(value: Any) -> Iterator[Any]:
    """What an operation's arguments hold, lists unpacked."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for value in values for leaf in leaves(value) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    """Of which memory a tensor is a view: the same number for all its views while it lives."""
    return int(tensor.untyped_storage()._cdata)
