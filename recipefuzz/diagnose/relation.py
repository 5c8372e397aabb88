"""Do the targets follow from the inputs at all? Asked of the data alone, without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from recipefuzz.targets.task import Rows, some_rows

ROWS = 1000  # whose neighbours are looked up: a table of a million distances
NEIGHBOURS = 5


def explainable(rows: Rows) -> float:
    """The share of the targets' variance that any function of the inputs can explain, by rows with equal inputs.

    1 where no two rows have the same inputs, 0 where all have; NaN where inputs or targets are not one tensor, or all
    targets are the same. Classes count as one-hot vectors.
    """
    x, y = _taken(rows)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return math.nan
    targets = as_numbers(y)
    total = (targets - targets.mean(0)).square().sum()
    group = torch.unique(x.reshape(len(x), -1), dim=0, return_inverse=True)[1]
    sums = torch.zeros(int(group.max()) + 1, targets.shape[1], dtype=targets.dtype, device=x.device)
    means = sums.index_add(0, group, targets) / torch.bincount(group)[:, None]
    return float(1 - (targets - means[group]).square().sum() / total) if total > 0 else math.nan


def same_targets(rows: Rows) -> bool:
    """Whether all of up to a thousand training rows have the same target."""
    y = _taken(rows)[1]
    return isinstance(y, Tensor) and len(y) > 1 and bool((y == y[:1]).all())


def varied(rows: Rows, most: int) -> Tensor:
    """Indices of a few rows with different inputs, and as many different targets as there are."""
    index = some_rows(rows, ROWS)
    x, y = _taken(rows)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return some_rows(rows, most)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    order = order[_occurrence(x.cpu()[order]) == 0]
    rank = _occurrence(y.cpu()[order])
    return index[order[rank.argsort(stable=True)]][:most]


def _occurrence(values: Tensor) -> Tensor:
    """How many earlier rows have the same values, (N,)."""
    group = torch.unique(values.reshape(len(values), -1), dim=0, return_inverse=True)[1]
    order = group.argsort(stable=True)
    starts = torch.cat([group.new_zeros(1), torch.bincount(group).cumsum(0)[:-1]])
    found = torch.empty_like(group)
    found[order] = torch.arange(len(group)) - starts[group[order]]
    return found


def as_numbers(y: Tensor) -> Tensor:
    """Targets as numbers, (N, columns): single classes as one-hot vectors."""
    if y.is_floating_point() or y.dim() > 1 or bool((y < 0).any()):
        return y.double().reshape(len(y), -1)
    return functional.one_hot(y.long()).double()


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
