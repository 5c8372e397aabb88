"""What a trial that converges did not meet: rows that its random batches left out, and a last batch that is not full.

A trial draws its rows with replacement, in full batches. The user's own loop goes through all rows, and ends each epoch
with what is left of them. And what it met without harm: a held-out loss that is not finite, since eval mode takes other
ways through a model than training does.
"""

from __future__ import annotations

import math

import torch

from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.replay import Failure, Replay
from recipefuzz.errors import RAISED
from recipefuzz.trace import Trace

BATCHES = 64  # of an epoch, that are looked at: an epoch of most data sets that are tried in short trials


def hazard_of(patient: Patient) -> Failure | None:
    """The first batch of an epoch whose loss or gradients are not finite, with the parameters that the trial ends with.

    Costs one replay of the trial and an epoch, of 64 batches at most, without updates. What raises is left to the user:
    it is seen.
    """
    with patient.replaying() as replay:
        replay.run(patient.config.trial.steps)
        order = torch.randperm(len(patient.rows), generator=torch.Generator().manual_seed(patient.seed))
        *full, last = order.split(patient.recipe.batch_size)
        for batch in (last, *full[:BATCHES]):
            try:
                if not _is_sound(replay, batch):
                    return replay.watched_batch(batch)
            except RAISED:
                continue
    return None


def broken_evaluation(patient: Patient, trace: Trace) -> Failure | None:
    """The first evaluation that was not finite, watched; costs one replay up to it, where there was one."""
    step = next((steps for steps, loss in trace.heldout if not math.isfinite(loss)), None)
    if step is None:
        return None
    with patient.replaying() as replay:
        replay.run(step)
        return replay.watched_evaluation(patient.heldout_rows)


def _is_sound(replay: Replay, batch: torch.Tensor) -> bool:
    loss = replay.loss_and_gradients(batch)
    gradients = [p.grad for p in replay.model.parameters() if p.grad is not None]
    return bool(torch.isfinite(loss)) and not bool(torch.isnan(torch.nn.utils.get_total_norm(gradients)))
