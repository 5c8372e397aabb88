"""What an operation was given and gave, in numbers that outlive its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@dataclass(frozen=True)
class Stats:
    """A tensor in numbers; of a sparse or a nested one, those that it stores.

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
        dense = tensor.detach()
        kept = stored(dense)
        values = torch.view_as_real(kept.resolve_conj()) if kept.is_complex() else kept
        flat = values.double() if values.is_floating_point() else values.to(torch.float64)
        finite = flat[torch.isfinite(flat)]
        low, high, least = math.nan, math.nan, math.nan
        if finite.numel():
            low, high, least = float(finite.min()), float(finite.max()), float(finite.abs().min())
        bad = ~torch.isfinite(flat)
        has_rows = kept is dense and bad.dim() and bad.any()  # rows of the storage are not the tensor's
        rows = bad.reshape(len(bad), -1).any(dim=1).nonzero()[:5, 0].tolist() if has_rows else []
        return cls(
            tuple(kept.shape),
            str(tensor.dtype).removeprefix("torch."),
            kept.numel(),
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
        kept = stored(tensor)
        return cls(tuple(kept.shape), kind, kept.numel(), unknown, unknown, unknown, 0, int(not finite), 0, 0, ())

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
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    values = stored(tensor.detach())
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def leaves(value: Any) -> Iterator[Any]:
    """What an operation's arguments or a batch hold, lists and dicts unpacked."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for value in values for leaf in leaves(value) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    """Of which memory a tensor is a view: the same number for all its views while it lives."""
    return int(stored(tensor).untyped_storage()._cdata)


def stored(tensor: Tensor) -> Tensor:
    """What a tensor keeps in memory, as a dense one: of a sparse one the elements that are not left out."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    return tensor.values() if tensor.is_nested or tensor.layout in COMPRESSED else tensor


@lru_cache(maxsize=4096)
def _written_positions(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that the operation writes into."""
    positions = _written_positions(func)
    return tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in positions]) if positions else []


def statistics(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Running ones, which batch norm writes without saying so in its schema."""
    if "batch_norm" not in func.overloadpacket.__name__ or "backward" in func.overloadpacket.__name__:
        return []
    return [
        a for a, s in zip(args, func._schema.arguments, strict=False) if s.name.startswith("running") and a is not None
    ]
