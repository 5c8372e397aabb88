"""Batch independence: in eval mode, what a model says of one row does not depend on the other rows of the batch.

A `view` that mixes the batch, a softmax or a mean over it, a wrong `permute` train without an error, and learn less.
One row after the other is exchanged for another, and what changes is looked at. This sees more than gradients with
respect to the input: tokens, sorting and detached values, too. In eval mode batch norm uses its running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from recipefuzz.diagnose.calls import ROUNDINGS, Call, calls_of, changed, fresh_model
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import varied
from recipefuzz.finding import Finding, Level
from recipefuzz.targets.losses import class_dim, cross_entropy_last
from recipefuzz.targets.seeding import seeded

NAME = "batch independence"
ROWS = 5  # of a batch: few, and a number that sizes of layers seldom are
NONE, SEVERAL = -1, -2  # rows that an element depends on
CLASSES = "give softmax the dimension that holds the classes; cross_entropy wants logits, without one"
MIXED = "keep the rows in dimension 0: look for view/reshape where transpose is meant, and for dim=0"


def check(patient: Patient) -> list[Finding]:
    """Exchange each of five rows once. Costs six forward passes."""
    batches = _batches(patient)
    if len(batches) < 3:  # of a single row, which is mixed with nothing
        return []
    passes = [calls_of(patient, fresh_model(patient), batch) for batch in batches]
    rows, last = len(batches) - 1, [calls[-1].gave for calls in passes]
    outputs = _owners(last)
    axis = _softmax_axis(patient, last[0])
    if all(_apart(owner, rows, output=True) for owner in outputs):
        if axis:
            return [Finding(NAME, Level.FAIL, axis, CLASSES)]
        seen = f"in eval mode, none of {rows} rows' outputs depends on another row's input"
        return [Finding(NAME, Level.PASS, seen, evidence={"rows": rows})]
    return [_mixing(patient, passes, rows, axis)]


def _batches(patient: Patient) -> list[Any]:
    """A batch, and it again with each of its rows exchanged for a row that is not in it."""
    index = varied(patient.rows, 2 * ROWS).to(patient.rows.index_device)
    count = len(index) // 2
    if not count:
        return []
    with seeded(patient.seed, patient.device):
        x = patient.rows.take(index)[0]
    orders = [list(range(count)) for _ in range(count + 1)]
    for row in range(count):
        orders[row + 1][row] = count + row
    return [
        tree_map(lambda leaf, order=order: leaf[order] if isinstance(leaf, Tensor) else leaf, x) for order in orders
    ]


def _owners(passes: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """For each tensor, the row that each of its elements depends on; tensors whose shape depends on rows left out."""
    found = []
    for before, *after in zip(*passes, strict=False):
        if any(a.shape != before.shape for a in after):
            continue
        owner = torch.full(before.shape, NONE, device=before.device)
        for row, tensor in enumerate(after):
            mine = changed(before, tensor)
            owner = torch.where(mine & (owner == NONE), row, torch.where(mine, SEVERAL, owner))
        found.append(owner)
    return found


def _apart(owner: Tensor, rows: int, *, output: bool = False) -> bool:
    """Whether a dimension keeps the rows apart, in order: one after the other, or as the last part of it.

    An output whose first dimension is the batch's has its rows there. What has no dimension of rows (a penalty that
    is returned beside the output) is meant to be of all of them.
    """
    sizes = [d for d, size in enumerate(owner.shape) if size and size % rows == 0]
    if bool((owner == NONE).all()) or (output and not sizes):
        return True
    if output and owner.shape[0] == rows:
        sizes = [0]
    return any(_holds_rows(owner.movedim(d, -1), rows) for d in sizes)


def _holds_rows(owner: Tensor, rows: int) -> bool:
    position = torch.arange(owner.shape[-1], device=owner.device)
    layouts = (position // (len(position) // rows), position % rows)
    return any(bool(((owner == NONE) | (owner == layout)).all()) for layout in layouts)


@dataclass(frozen=True)
class _Traced:
    """A call, and on which rows the elements of what it was given and what it gave depend."""

    call: Call
    given: list[Tensor]
    gave: list[Tensor]

    @property
    def mixes(self) -> bool:
        return any(bool((owner == SEVERAL).any()) for owner in self.gave)


def _traced(passes: list[list[Call]]) -> Iterator[_Traced]:
    for calls in zip(*passes, strict=False):
        if any(c.name != calls[0].name for c in calls):  # the rows decide which modules run
            return
        yield _Traced(calls[0], _owners([c.given for c in calls]), _owners([c.gave for c in calls]))


def _mixing(patient: Patient, passes: list[list[Call]], rows: int, axis: str) -> Finding:
    """Where rows come together first; where they never do, where they first are out of order."""
    traced = list(_traced(passes))
    mixed = [t for t in traced if t.mixes]
    what = "first mix" if mixed else "are out of order"
    displaced = (t for t in traced if not all(_apart(owner, rows) for owner in t.gave))
    first = mixed[0] if mixed else next(displaced, traced[-1])
    call, model = first.call, passes[0][-1]
    where = f"in {call}"
    if call.name and not all(_apart(owner, rows) for owner in first.given):
        parent = call.name.rpartition(".")[0]
        where = f"in the forward of {parent or model}, in what it gives to {call}"
    elif isinstance(dict(fresh_model(patient).named_modules())[call.name], _BatchNorm):
        seen = f"{call} keeps no running statistics: in eval mode, too, a row's output depends on its batch"
        return Finding(NAME, Level.WARN, seen, "track_running_stats=True, unless this is meant")
    seen = f"rows {what} {where}: one row's output depends on another row's input, in eval mode"
    todo = CLASSES if axis else MIXED
    return Finding(NAME, Level.FAIL, f"{axis}; {seen}" if axis else seen, todo, evidence={"module": call.name})


def _softmax_axis(patient: Patient, gave: tuple[Tensor, ...]) -> str:
    """What a softmax over a dimension that does not hold the classes leaves behind; empty where there is none."""
    output = gave[0] if gave else torch.empty(0)
    if not output.is_floating_point() or output.dim() < 2:
        return ""
    wrong = [0]
    if patient.task.loss_kind == "cross_entropy":
        index = torch.arange(len(output), device=patient.rows.index_device)
        y = patient.rows.take(index % len(patient.rows))[1]
        wrong = [d for d in range(output.dim()) if d != _classes(patient, output, y)]
    for dim in wrong:
        if output.shape[dim] > 1 and (kind := _normalized(output.double(), dim, torch.finfo(output.dtype).eps)):
            what = "the rows" if dim == 0 else "positions"
            return f"the output is a {kind} over dimension {dim}, which holds {what}"
    return ""


def _classes(patient: Patient, output: Tensor, y: Tensor) -> int:
    return output.dim() - 1 if patient.task.loss is cross_entropy_last else class_dim(output, y)


def _normalized(output: Tensor, dim: int, eps: float) -> str:
    """Which softmax the elements along a dimension are of: their sum, or that of their exponentials, is 1."""
    rounding = ROUNDINGS * eps
    if bool((output >= 0).all()) and bool(((output.sum(dim) - 1).abs() < rounding).all()):
        return "softmax"
    return "log_softmax" if bool((output.logsumexp(dim).abs() < rounding).all()) else ""
