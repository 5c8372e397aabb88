"""Predictions beside their targets, a line a row, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipefuzz.targets.losses import IGNORED, class_dim

SHOWN = 8  # values of a row; of longer ones the first


def recital(output: Any, y: Any, loss_kind: str) -> tuple[str, ...]:
    """A table of what a model gave for some rows; empty where output or targets are not one tensor."""
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)) or output.dim() == 0 or len(output) != len(y):
        return ()
    output, y = output.detach().cpu(), y.cpu()
    if not y.is_floating_point() and loss_kind != "bce" and output.dim() == y.dim() + 1:
        return _aligned(_classes(output, y, loss_kind == "cross_entropy"))
    if loss_kind == "bce":
        output = output.sigmoid()
    names = ("target", "probability" if loss_kind == "bce" else "predicted")
    pairs = zip(output.reshape(len(output), -1), y.reshape(len(y), -1), strict=True)
    return _aligned([("row", *names), *((str(i), _numbers(t), _numbers(o)) for i, (o, t) in enumerate(pairs, 1))])


def _classes(output: Tensor, y: Tensor, probable: bool) -> list[tuple[str, ...]]:
    """Of single classes, and of a class at each position."""
    dim = class_dim(output, y)
    shares, best = output.double().softmax(dim).max(dim)
    if y.dim() > 1:
        rows = zip(best.flatten(1), y.flatten(1), strict=True)
        lines = [(str(i), _names(t), _names(b), _right(b, t)) for i, (b, t) in enumerate(rows, 1)]
        return [("row", "target", "predicted", "right"), *lines]
    columns = [(str(i), _names(t[None]), str(int(b))) for i, (b, t) in enumerate(zip(best, y, strict=True), 1)]
    table: list[tuple[str, ...]] = [("row", "target", "predicted"), *columns]
    if not probable:
        return table
    return [(*cells, last) for cells, last in zip(table, ("probability", *(f"{s:.3f}" for s in shares)), strict=True)]


def _right(best: Tensor, y: Tensor) -> str:
    labelled = y != IGNORED
    return f"{int(((best == y) & labelled).sum())} of {int(labelled.sum())}"


def _names(classes: Tensor) -> str:
    return _shortened(["-" if c == IGNORED else str(c) for c in classes.tolist()])


def _numbers(values: Tensor) -> str:
    return _shortened([f"{v:.4g}" for v in values.to(torch.float64).tolist()])


def _shortened(words: list[str]) -> str:
    return " ".join(words[:SHOWN] + (["..."] if len(words) > SHOWN else []))


def _aligned(table: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return tuple("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)
