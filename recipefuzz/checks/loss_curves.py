"""Train and held-out loss over one trial of the default recipe: drawn, and its shape named."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from recipefuzz.checks.curve_shape import Curves, Name, shape
from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines.sequential import HELDOUT_ROWS
from recipefuzz.finding import Finding, Level
from recipefuzz.report.chart import chart
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task, some_rows
from recipefuzz.trace import Floats

NAME = "loss curves"
PARTS = 16  # of the held-out rows: their spread is the held-out loss's error
TODO = {
    Name.OVERFITTING: "stop there, or regularize: weight_decay, dropout, a smaller model, more rows; "
    "search: {rank_by: heldout_skill} ranks by the held-out loss",
    Name.MEMORIZING: "look at load(): are the labels beside their rows, in both sets? Nothing that was learned "
    "holds for held-out rows",
    Name.APART: "look at load(): are both sets drawn alike and prepared by the same code? Does train hold what gives "
    "the target away?",
    Name.NOISY: "a larger batch_size or a smaller lr",
    Name.STALLED: "recipefuzz diagnose CONFIG says why; the other checks tell whether it is the code or the data",
    Name.NOT_FINITE: "recipefuzz diagnose CONFIG says where it begins and what mends it",
}


def check(patient: Patient) -> list[Finding]:
    """Train once, to the end of the trial."""
    curves = measured(patient)
    name, words = shape(curves)
    level = {Name.HEALTHY: Level.PASS, Name.UNKNOWN: Level.PASS, Name.MEMORIZING: Level.FAIL}.get(name, Level.WARN)
    heldout = tuple(zip(curves.at, curves.means.tolist(), strict=True))
    lines = chart(curves.trace.loss.tolist(), heldout)
    evidence = {"shape": str(name), "heldout": heldout, "train": curves.trace.curve(60), "baseline": curves.baseline}
    return [Finding(NAME, level, words, TODO.get(name, ""), tuple(lines), evidence)]


def measured(patient: Patient) -> Curves:
    """The trial itself, with the held-out loss taken at every checkpoint, not at quarters alone."""
    train_rows, test_rows = patient.rows, patient.heldout_rows
    heldout = some_rows(test_rows, HELDOUT_ROWS)
    seen = some_rows(train_rows, len(heldout))
    at: list[int] = []
    losses: list[tuple[list[float], list[float]]] = []

    def look(task: Task, model: nn.Module, step: int) -> None:
        at.append(step)
        of_heldout = losses_of_parts(task, model, test_rows, heldout, patient.device)
        losses.append((of_heldout, losses_of_parts(task, model, train_rows, seen, patient.device)))

    outcome = patient.train(look=look)
    return Curves(
        trace=outcome.trace,
        verdict=outcome.verdict,
        baseline=outcome.baseline,
        at=tuple(at),
        heldout=_table([of_both[0] for of_both in losses]),
        seen=_table([of_both[1] for of_both in losses]),
        part=len(seen) / parts_of(len(seen)) / patient.recipe.batch_size,
        epoch=len(train_rows) / patient.recipe.batch_size,
    )


def _table(losses: list[list[float]]) -> Floats:
    """Shape (evaluations, parts), also without evaluations."""
    return np.array(losses, dtype=np.float64).reshape(len(losses), -1 if losses else 1)


def parts_of(rows: int) -> int:
    return max(1, min(PARTS, rows // 2))


def losses_of_parts(task: Task, model: nn.Module, rows: Rows, index: Tensor, device: torch.device) -> list[float]:
    """Mean loss of equal parts of some rows, drawn without replacement, in eval mode; the model is left as it was."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    parts = index[order].to(rows.index_device).tensor_split(parts_of(len(index)))
    model.eval()
    with torch.no_grad(), seeded(0, device):
        losses = []
        for part in parts:
            x, y = rows.take(part)
            losses.append(task.loss(model(x), y).float().reshape(()))
    model.train()
    found: list[float] = torch.stack(losses).tolist()
    return found
