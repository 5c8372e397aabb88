"""input_norm and target_norm: affine maps with statistics from the training set alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipefuzz.targets.task import Rows, ScaledRows, TensorRows, read


@dataclass(frozen=True)
class Affine:
    """x -> (x - shift) / scale per feature."""

    shift: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale

    def to(self, device: torch.device) -> Affine:
        """On the device once: moved at every batch, the statistics would make it wait."""
        return Affine(self.shift.to(device), self.scale.to(device))


def scaled(train: Rows, test: Rows, input_norm: str, target_norm: str) -> tuple[Rows, Rows]:
    """Both sets with inputs and targets scaled by the statistics of the first, of its finite values.

    Raises:
        ValueError: inputs or targets that are not floating-point tensors (token ids, class labels).
    """
    if input_norm == target_norm == "none":
        return train, test
    x, y = _statistics_rows(train, input_norm != "none", target_norm != "none")
    maps = (_fit(x, input_norm, "input_norm"), _fit(y, target_norm, "target_norm"))
    return _apply(train, *maps), _apply(test, *maps)


def _statistics_rows(rows: Rows, inputs: bool, targets: bool) -> tuple[Any, Any]:
    """What the statistics are taken of; of a Dataset only the wanted side is kept."""
    if isinstance(rows, TensorRows):
        return rows.x, rows.y
    parts = [(x if inputs else None, y if targets else None) for _, x, y in read(rows)]
    return _joined([x for x, _ in parts]), _joined([y for _, y in parts])


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def _apply(rows: Rows, scale_x: Affine | None, scale_y: Affine | None) -> Rows:
    if isinstance(rows, TensorRows):  # once, not at every batch
        x = scale_x(rows.x) if scale_x else rows.x
        return TensorRows(x, scale_y(rows.y) if scale_y else rows.y)
    return ScaledRows(rows, scale_x, scale_y)


def _fit(values: Any, how: str, axis: str) -> Affine | None:
    """Statistics per feature: the last dimension of (N, F) and (N, T, F), the channel of (N, C, H, W)."""
    if how == "none":
        return None
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{axis}: {how} needs floating-point values, but these are {kind}")
    feature = 1 if values.dim() >= 4 else values.dim() - 1
    over = [d for d in range(values.dim()) if d == 0 or d != feature]
    shift, scale, largest = _statistics(values, how, over)
    constant = scale <= 1e-6 * largest  # float32 keeps 7 digits: no spread
    if values.dim() == 1:
        shift, scale, constant = shift[0], scale[0], constant[0]
    return Affine(shift, torch.where(constant, 1.0, scale))


def _statistics(values: Tensor, how: str, over: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and largest absolute value of the finite values: a user's mask may leave out the others."""
    finite = values.isfinite()
    if bool(finite.all()):
        low, high = values.amin(over, keepdim=True), values.amax(over, keepdim=True)
        mean, deviation = values.mean(over, keepdim=True), values.std(over, correction=0, keepdim=True)
    else:
        low = values.where(finite, torch.inf).amin(over, keepdim=True)
        high = values.where(finite, -torch.inf).amax(over, keepdim=True)
        kept = values.where(finite, torch.nan)
        mean = kept.nanmean(over, keepdim=True)
        deviation = ((kept - mean) ** 2).nanmean(over, keepdim=True).sqrt()
        # of a column that has no finite value, nothing is known
        low, high, mean, deviation = (t.where(low <= high, 0.0) for t in (low, high, mean, deviation))
    largest = torch.maximum(low.abs(), high.abs())
    return (mean, deviation, largest) if how == "standardize" else (low, high - low, largest)
