"""Columns that say nothing, and numbers of a size that recipes are not made for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from recipefuzz.checks.data_parts import Part, Problem
from recipefuzz.checks.untrained import few
from recipefuzz.diagnose.patient import Patient
from recipefuzz.finding import Level

NO_SPREAD = 1e-6  # of the largest number: float32 keeps 7 digits; `targets.scaling` leaves such a column's scale alone
OFTEN = 10  # rows in which two columns leave their usual value together: by chance, rare marks share one or two
LARGE_INPUT = 1e3  # activations, and gradients of the first layer, so many times those of standardized inputs
SMALL_INPUT = 1e-3  # and so much smaller: beside the biases, the inputs don't count
LARGE_TARGET = 1e2  # the gradient of a squared error grows with the target, and the loss with its square
SAMPLE = 100_000  # rows of a table that are compared column by column


def column_problems(train: Part) -> Iterator[Problem]:
    """Constant and equal columns of a table."""
    table = train.table
    if table is None or len(table) < 2:
        return
    table = table[:: -(-len(table) // SAMPLE)].nan_to_num()
    low, high = table.amin(0), table.amax(0)
    constant = high - low <= NO_SPREAD * torch.maximum(low.abs(), high.abs())
    # at the end of all values: the background of an image in a row, a mark that no row has
    blank = constant & ((low == table.min()) | (high == table.max()))
    yield from _constant((constant & ~blank).nonzero()[:, 0].tolist(), low, len(constant))
    if bool(blank.any()):
        count = int(blank.sum())
        level = Level.WARN if count == len(blank) else Level.PASS
        seen = f"{count} of {len(blank)} columns are the same in all rows, at the end of the range"
        yield Problem(level, seen, "look at load(): the inputs say nothing", {"blank_columns": count})
    yield from _equal(table, constant)


def _constant(columns: list[int], values: Tensor, total: int) -> Iterator[Problem]:
    if columns:
        shown = few([f"column {c} is {float(values[c]):.4g}" for c in columns])
        seen = f"{len(columns)} of {total} input columns are the same in all rows: {shown}"
        yield Problem(Level.WARN, seen, "look how they are made in load(), or drop them", {"constant_columns": columns})


def _equal(table: Tensor, constant: Tensor) -> Iterator[Problem]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for column in (~constant).nonzero()[:, 0].tolist():
        values = table[:, column].contiguous()
        if int((values != values.mode().values).sum()) >= OFTEN:
            groups[(values + 0.0).cpu().numpy().tobytes()].append(column)
    same = [columns for columns in groups.values() if len(columns) > 1]
    if same:
        shown = few([" = ".join(map(str, columns)) for columns in same])
        seen = f"input columns that are equal in all rows: {shown}"
        yield Problem(Level.WARN, seen, "keep one of each in load()", {"equal_columns": same})


def scale_problems(patient: Patient, train: Part) -> Iterator[Problem]:
    """Inputs and targets in units of their own where the recipe leaves them so."""
    if patient.recipe.input_norm == "none" and train.x is not None and train.x.is_floating_point():
        yield from _inputs(train.x)
    wants_numbers = patient.task.loss_kind == "mse" and patient.recipe.target_norm == "none"
    if wants_numbers and train.y is not None:
        yield from _targets(train.y)


def _inputs(x: Tensor) -> Iterator[Problem]:
    largest = _magnitudes(x)
    most, evidence = float(largest.max()), {"largest_input": float(largest.max())}
    if most >= LARGE_INPUT:
        where = f" (column {int(largest.argmax())})" if x.dim() == 2 else ""
        spread = (
            f", column {int(largest.argmin())} to {float(largest.min()):.3g}" if x.dim() == 2 and x.shape[1] > 1 else ""
        )
        seen = f"raw inputs: up to {most:.3g}{where}{spread}"
        yield Problem(Level.WARN, seen, "recipe: {input_norm: standardize}", evidence)
    elif 0 < most < SMALL_INPUT:
        seen = f"inputs no larger than {most:.3g}"
        yield Problem(Level.WARN, seen, "recipe: {input_norm: standardize}", evidence)
    else:
        yield Problem(Level.PASS, f"inputs up to {most:.3g}", "", evidence)


def _magnitudes(x: Tensor) -> Tensor:
    """Largest finite magnitude of each column of a table, or of all of what is none, (columns,)."""
    low, high = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).aminmax(dim=0) if x.dim() == 2 else _ends(x)
    return torch.maximum(low.abs(), high.abs()).reshape(-1)


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = x[x.isfinite()] if not bool(x.isfinite().all()) else x
    return (finite.min(), finite.max()) if finite.numel() else (x.new_zeros(()), x.new_zeros(()))


def _targets(y: Tensor) -> Iterator[Problem]:
    finite = y[y.isfinite()].double()
    size = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    if size >= LARGE_TARGET:
        seen = f"raw targets: {float(finite.min()):.3g} to {float(finite.max()):.3g}, root mean square {size:.3g}"
        yield Problem(Level.WARN, seen, "recipe: {target_norm: standardize}", {"target_rms": size})
    else:
        yield Problem(Level.PASS, f"targets of size {size:.3g}", "", {"target_rms": size})
