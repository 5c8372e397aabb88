"""Input dependence: what a model has learned of a few rows must be lost when it gets another row's input.

A permutation test: the loss after short training on few rows is compared with the losses that the same model has when
inputs and targets are paired otherwise (permutation importance: Breiman 2001, "Random forests"). Few rows, since any
model that sees its inputs soon knows them by heart, whatever the data hold. An output that is the same for all rows
before training is no fault yet: a last layer that starts at 0 gives that, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recipefuzz.diagnose.calls import Call, calls_of, changed
from recipefuzz.diagnose.overfit import ROWS, gentle_recipes
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.relation import varied
from recipefuzz.diagnose.replay import Replay
from recipefuzz.finding import Finding, Level
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import only

NAME = "input dependence"
STEPS = 100  # of training, with each recipe until one shows it
PAIRINGS = 99  # at random
# share of the pairings, the right one among them, that may be as good as it: some have the same labels
SIGNIFICANT = 0.05
LEAST = 6  # rows, of which there are 720 pairings


@dataclass(frozen=True)
class _Compared:
    """A model after short training.

    Attributes:
        start, loss: on the rows, in eval mode: before training and after it.
        shuffled: with the inputs of other rows, one for each wrong pairing.
        zeroed: with inputs of 0.
        ignores: whether the output is the same when rows are exchanged.
        lost: the first module that gives the same then, though it is given something else.
    """

    start: float
    loss: float
    shuffled: tuple[float, ...]
    zeroed: float
    ignores: bool
    lost: Call | None

    @property
    def p(self) -> float:
        """Of the permutation test: the share of the pairings that are as good as the right one, itself counted."""
        return (1 + sum(other <= self.loss for other in self.shuffled)) / (1 + len(self.shuffled))

    @property
    def blind(self) -> bool:
        """Whether the loss is the same for every pairing."""
        return bool(changed(torch.tensor(self.loss), torch.tensor(self.shuffled)).logical_not().all())

    @property
    def median(self) -> float:
        return sorted(self.shuffled)[len(self.shuffled) // 2]


def check(patient: Patient) -> list[Finding]:
    """Train on ten rows until the right pairing shows. Costs at most eight runs of 100 steps."""
    index = varied(patient.task.train, ROWS)
    if len(index) < LEAST:
        return []
    few = only(patient.task.train, index.to(patient.task.train.index_device))
    task, last = replace(patient.task, train=few, test=few), None
    for recipe in gentle_recipes(patient):
        found = _compared(replace(patient, task=task, recipe=recipe))
        if found is None:
            continue
        if found.p <= SIGNIFICANT:
            return [_finding(found, Level.PASS, "", len(index))]
        last = found
    return [_unused(last, len(index))]


def _unused(found: _Compared | None, rows: int) -> Finding:
    if found is None:
        return Finding(NAME, Level.WARN, "no short run had a finite loss", "find out why before anything else")
    if found.ignores:
        where = f": lost in {found.lost}" if found.lost else ""
        seen = f"the output is the same when the inputs of {rows} rows are exchanged{where}"
        todo = "look there for an input that is overwritten, multiplied by 0, averaged over the batch, or not used"
        name = found.lost.name if found.lost else ""
        return Finding(NAME, Level.FAIL, seen, todo, evidence={"module": name})
    if found.blind:
        seen = "the output depends on the inputs; the loss does not depend on which row gets which target"
        return Finding(NAME, Level.PASS, seen)
    return _finding(
        found, Level.WARN, "the model may not see what matters in its inputs: look at the overfit check", rows
    )


def _finding(found: _Compared, level: Level, todo: str, rows: int) -> Finding:
    others = f"{found.median:.3g} (median of {len(found.shuffled)}, least {min(found.shuffled):.3g})"
    zeroed = f", {found.zeroed:.3g} zeroed" if math.isfinite(found.zeroed) else ""
    seen = f"loss of {rows} rows after short training {found.loss:.3g}, inputs shuffled {others}{zeroed}"
    seen += f"; p = {found.p:.2g}"
    evidence = {
        "loss": found.loss,
        "shuffled": found.shuffled,
        "zeroed": found.zeroed,
        "start": found.start,
        "p": found.p,
    }
    return Finding(NAME, level, seen, todo, evidence=evidence)


def _compared(patient: Patient) -> _Compared | None:
    """Train a model and pair inputs and targets otherwise; None where the loss is not finite."""
    rows = patient.rows
    with seeded(patient.seed, patient.device):
        x, y = rows.take(torch.arange(len(rows), device=rows.index_device))
    orders = _orders(len(rows), patient.device)
    with patient.replaying() as replay:
        start = _loss(replay, x, y)
        replay.run(STEPS)
        loss = _loss(replay, x, y)
        shuffled = tuple(_loss(replay, _reordered(x, order), y) for order in orders)
        zeroed = _loss(replay, tree_map(_zero, x), y)
        if not all(map(math.isfinite, (loss, *shuffled))):
            return None
        model = replay.model.eval()
        before = calls_of(patient, model, x)
        after = calls_of(patient, model, _reordered(x, torch.arange(len(rows), device=patient.device).roll(1)))
    ignores = not _differ(before[-1].gave, after[-1].gave)
    return _Compared(start, loss, shuffled, zeroed, ignores, _lost(before, after) if ignores else None)


def _orders(rows: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(rows, generator=generator).to(device) for _ in range(PAIRINGS)]


def _loss(replay: Replay, x: Any, y: Any) -> float:
    replay.model.eval()
    with torch.no_grad(), seeded(0, replay.device):
        loss = float(replay.task.loss(replay.model(x), y))
    replay.model.train()
    return loss


def _reordered(x: Any, order: Tensor) -> Any:
    return tree_map(lambda leaf: leaf[order] if isinstance(leaf, Tensor) else leaf, x)


def _zero(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def _lost(before: list[Call], after: list[Call]) -> Call | None:
    """The first call that gives the same though it was given something else."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a.name == b.name]
    return next((a for a, b in pairs if _differ(a.given, b.given) and not _differ(a.gave, b.gave)), None)


def _differ(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return any(a.shape != b.shape or bool(changed(a, b).any()) for a, b in zip(some, others, strict=False))
