"""Do the targets follow from the inputs at all? Asked of the data alone, without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from recipefuzz.targets.task import Rows, some_rows

ROWS = 1000  # whose neighbours are looked up: a table of a million distances
NEIGHBOURS = 5


def same_everywhere(rows: Rows) -> str:
    """Which of "inputs" and "targets" is the same in all of up to a thousand training rows; "" if neither is."""
    for name, part in zip(("inputs", "targets"), _taken(rows), strict=True):
        if isinstance(part, Tensor) and len(part) > 1 and bool((part == part[:1]).all()):
            return name
    return ""


def neighbours_skill(rows: Rows) -> float:
    """How much better than a constant each row's five nearest others predict its target: 0 not at all, 1 perfectly.

    Of classes, the share of the constant's mistakes that is avoided; of numbers, the share of the variance explained.
    NaN where inputs or targets are not one tensor a row.
    """
    x, y = _taken(rows)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or len(x) <= NEIGHBOURS:
        return math.nan
    near = _nearest(x)
    if y.is_floating_point():
        targets = y.double().reshape(len(y), -1)
        error = (targets[near].mean(dim=1) - targets).square().mean()
        return float(1 - error / (targets - targets.mean(0)).square().mean().clamp_min(1e-30))
    if y.dim() > 1 or bool((y < 0).any()):
        return math.nan
    votes = functional.one_hot(y.long())
    right = float((votes[near].sum(dim=1).argmax(dim=1) == y).double().mean())
    usual = float(votes.double().mean(0).max())
    return (right - usual) / (1 - usual) if usual < 1 else math.nan


def _taken(rows: Rows) -> tuple[object, object]:
    return rows.take(some_rows(rows, ROWS).to(rows.index_device))


def _nearest(x: Tensor) -> Tensor:
    """The nearest other rows, (N, 5): of numbers by standardized distance, of tokens by how many differ."""
    flat = x.double().reshape(len(x), -1)
    if x.is_floating_point():
        flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-12)
        distance = torch.cdist(flat, flat)
    else:
        distance = torch.cdist(flat, flat, p=0)
    return distance.fill_diagonal_(math.inf).topk(NEIGHBOURS, largest=False).indices
