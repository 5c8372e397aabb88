"""A model before its first step and rows to look at it with: what the cheap checks measure on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines import prepare
from recipefuzz.engines.sequential import one_thread, with_own_loss
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, Task

ROWS = 256  # a mean over so many is right to 6 % of the spread of the rows' losses


@dataclass(frozen=True)
class Untrained:
    """The model of a recipe with its initial weights, in training mode; the task with a loss of its own."""

    model: nn.Module
    task: Task
    recipe: Recipe
    rows: Rows
    device: torch.device

    def batch(self, number: int = 0, most: int = ROWS) -> tuple[Any, Any]:
        """Rows that are evenly spread over the training set and finite, as far as there are any; others each time.

        Of a user's own loss, which may depend on the batch size, at most as many as in a batch.
        """
        bad = self.task.bad_rows
        good = torch.tensor([i for i in range(len(self.rows)) if i not in bad] or [0]) if bad else None
        most = min(most, self.recipe.batch_size) if self.task.loss_kind == "custom" else most
        n = len(self.rows) if good is None else len(good)
        spread = (torch.arange(min(n, most)) * n // min(n, most) + number) % n
        index = spread if good is None else good[spread]
        return self.rows.take(index.to(self.rows.index_device))

    def output(self, x: Any) -> Any:
        """Of the model, without gradients, in the precision of its parameters."""
        with torch.no_grad():
            return self.model(x)

    def loss(self, output: Any, y: Any) -> float:
        with torch.no_grad():
            return float(self.task.loss(output, y))


@contextmanager
def untrained(patient: Patient, recipe: Recipe | None = None) -> Iterator[Untrained]:
    """The patient's model, or that of a changed recipe. The user's random numbers don't notice."""
    chosen = recipe or patient.recipe
    with seeded(patient.seed, patient.device), one_thread():
        rows = patient.rows if recipe is None else prepare.rows_for(patient.task, chosen)[0].to(patient.device)
        torch.manual_seed(patient.seed)  # a Dataset may have drawn random numbers
        task = with_own_loss(patient.task, patient.device)
        model = prepare.build_model(task, chosen, patient.device)
        yield Untrained(model, task, chosen, rows, patient.device)


def few(names: list[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def as_tensor(value: Any) -> Tensor | None:
    """A tensor of numbers, else None."""
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.numel() else None
