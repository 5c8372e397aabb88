"""Do the targets of some rows follow from what others show? Simple learners, none of them a network, in two halves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from recipefuzz.diagnose.relation import NEIGHBOURS, as_numbers
from recipefuzz.targets.task import Rows, some_rows

ROWS = 2000  # half of them learned from: a system of a thousand equations
LEAST = 100  # rows: a relation that explains a fifth of the spread then stands out
RIDGES = (1e-2, 1.0)  # relative to the mean variance of the rows' products: nearly least squares, and heavily shrunk


def follows(rows: Rows) -> float:
    """By how many standard errors the best of three learners predicts better than by chance, on rows not learned from.

    The learners are the five nearest rows and ridge regression, weak and strong; each learns from every other row and
    predicts the rest, and the other way round. What counts is the covariance of predictions and targets, which is 0 in
    the mean where the targets do not follow, however badly scaled the predictions are. Where a row has a target at
    each position, position by position. NaN where inputs or targets are not one tensor, or rows are few.
    """
    x, y = rows.take(some_rows(rows, ROWS).to(rows.index_device))
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return math.nan
    features, targets = _pairs(x.cpu(), y.cpu())
    finite = features.isfinite().all(1) & targets.isfinite().all(1)
    features, targets = _standardized(features[finite]), _standardized(targets[finite])
    if len(features) < LEAST:
        return math.nan
    even = torch.arange(len(features)) % 2 == 0
    predicted: list[list[Tensor]] = [[], [], []]
    actual = []
    for known in (even, ~even):
        x_known, y_known, x_new = features[known], targets[known], features[~known]
        centre = y_known.mean(0)
        actual.append(targets[~known] - centre)
        guesses = (_nearest(x_known, y_known - centre, x_new), *_ridge(x_known, y_known - centre, x_new))
        for guess, kept in zip(guesses, predicted, strict=True):
            kept.append(guess)
    return max(_standard_errors(torch.cat(guess) * torch.cat(actual)) for guess in predicted)


def _standard_errors(products: Tensor) -> float:
    """Of the mean over rows of what all columns show together, (N, columns)."""
    each = products.sum(1)
    error = float(each.std()) / math.sqrt(len(each))
    return float(each.mean()) / error if error else 0.0


def _pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, F) and targets (N, columns), as numbers."""
    if not x.is_floating_point():
        x = functional.one_hot((x - x.min()).long()).double() if int(x.max() - x.min()) < ROWS else x.double()
    if y.dim() > 1 and not y.is_floating_point() and x.shape[: y.dim()] == y.shape:  # positions
        some = torch.linspace(0, y.numel() - 1, min(ROWS, y.numel())).long()
        x, y = x.flatten(0, y.dim() - 1)[some], y.flatten()[some]
    return x.double().reshape(len(x), -1), as_numbers(y)


def _standardized(values: Tensor) -> Tensor:
    spread = values.std(0)
    return (values - values.mean(0)) / torch.where(spread > 0, spread, 1.0)


def _nearest(x_known: Tensor, y_known: Tensor, x_new: Tensor) -> Tensor:
    near = torch.cdist(x_new, x_known).topk(NEIGHBOURS, largest=False).indices
    return y_known[near].mean(1)


def _ridge(x_known: Tensor, y_known: Tensor, x_new: Tensor) -> list[Tensor]:
    """In the dual form: as many equations as rows, however many features (Saunders et al. 1998)."""
    products = x_known @ x_known.T
    unit = torch.eye(len(products), dtype=products.dtype)
    strength = float(products.diagonal().mean())
    if not strength:
        return [torch.zeros(len(x_new), y_known.shape[1], dtype=y_known.dtype) for _ in RIDGES]
    weights = [torch.linalg.solve(products + ridge * strength * unit, y_known) for ridge in RIDGES]
    return [x_new @ (x_known.T @ w) for w in weights]
