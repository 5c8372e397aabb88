"""Recipes of one structure in training side by side: each is a lane, a row of every tensor.

A lane's numbers do not depend on how many there are, on its place among them, or on its neighbours: each operation
works on rows, and a NaN stays in its own. Lanes come and go between chunks: those that are decided leave, and the
others close ranks with those that are new, so that what is decided costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from recipefuzz.engines import prepare
from recipefuzz.engines.job import FAMILIES, Job
from recipefuzz.engines.lane_updates import LaneUpdate, with_zeros
from recipefuzz.engines.loss_scaling import INITIAL, next_scale
from recipefuzz.engines.program import Program, Start, flat_inputs
from recipefuzz.engines.recorder import with_bad_flag
from recipefuzz.targets.task import TensorRows
from recipefuzz.trace import Floats, Trace

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_
RECORDED = 7  # the numbers of `Recorder.take`


@dataclass
class Lane:
    """A trial in training."""

    job: Job
    trace: Trace = field(default_factory=Trace)
    done: int = 0
    seconds: float = 0.0
    chunks: list[Floats] = field(default_factory=list)  # recorded since the last checkpoint

    def rates(self, steps: int) -> list[float]:
        return [prepare.learning_rate(self.job.recipe, self.done + i) for i in range(steps)]

    def take(self) -> Floats:
        """What was recorded since the last checkpoint, (steps, RECORDED)."""
        recorded = np.concatenate(self.chunks)
        self.chunks.clear()
        return recorded


class Lanes:
    """The tensors of all lanes of one structure.

    Args:
        rows: training rows on the device, scaled as the structure says.
    """

    def __init__(self, program: Program, rows: TensorRows) -> None:
        self.program, self.rows, self._device = program, rows, program.device
        device, family = program.device, FAMILIES[program.recipe.optimizer]
        self.lanes: list[Lane] = []
        self._flat = self._spare = torch.zeros(0, program.layout.size, device=device)
        self._frozen: list[Tensor] = []
        self._zeros = torch.zeros(program.layout.size, device=device)
        self._update = LaneUpdate(family, program.layout.size, program.used(), device)
        self._scales = torch.zeros(0, 1, device=device) if program.recipe.precision == "fp16" else None
        self._clean = torch.zeros(0, 1, device=device)

    def replace(self, keep: Sequence[int], new: Sequence[Job], starts: Sequence[Start]) -> None:
        """Go on with the lanes in `keep`; after them come those of new jobs."""
        index = torch.tensor(keep, dtype=torch.long, device=self._device)
        kept = [self.lanes[i] for i in keep]
        self.lanes = kept + [Lane(job) for job in new]
        first = [self._scaled(start, job) for start, job in zip(starts, new, strict=True)]
        self._flat = torch.cat([self._flat[index], *(flat for flat, _ in first)])
        self._spare = torch.empty_like(self._flat)
        if not self._frozen and first:
            self._frozen = [f.new_empty(0, *f.shape[1:]) for f in first[0][1]]
        self._frozen = [torch.cat([f[index], *(frozen[i] for _, frozen in first)]) for i, f in enumerate(self._frozen)]
        self._update.keep(index, [lane.job.recipe for lane in kept], [job.recipe for job in new])
        if self._scales is not None:
            self._scales = torch.cat([self._scales[index], torch.full((len(new), 1), INITIAL, device=self._device)])
            self._clean = with_zeros(self._clean, index, len(new))
        self._set_clips()
        self._views = [self.program.layout.views(flat) for flat in (self._flat, self._spare)]
        self._sizes = self._norms(self._flat)

    def _scaled(self, start: Start, job: Job) -> tuple[Tensor, list[Tensor]]:
        scale, cut = job.recipe.init_scale, self.program.layout.scaled
        flat = torch.cat([start.flat[:cut] * scale, start.flat[cut:]])[None]
        return flat, [(tensor * scale if scaled else tensor)[None] for tensor, scaled in start.frozen]

    def _set_clips(self) -> None:
        recipes = [lane.job.recipe for lane in self.lanes]

        def limits(values: list[float | None]) -> Tensor | None:
            if all(v is None for v in values):
                return None
            return torch.tensor([math.inf if v is None else v for v in values], device=self._device)[:, None]

        norms = limits([r.clip_norm for r in recipes])
        self._clip_norm = None if norms is None else (norms, torch.isinf(norms))  # and the lanes without
        self._clip_value = limits([r.clip_value for r in recipes])

    def run(self, steps: int, order_of: Callable[[Job, int, int], Tensor]) -> None:
        """Train all lanes for some steps; each lane gets what was recorded. Nothing is read before the end.

        Args:
            order_of: rows of a job's steps from one to another, (steps, batch).
        """
        index = torch.stack([order_of(lane.job, lane.done, lane.done + steps) for lane in self.lanes], dim=1)
        index = index.to(self._device, non_blocking=True)
        rates = torch.tensor([lane.rates(steps) for lane in self.lanes], dtype=torch.float32).T[..., None]
        rates = rates.to(self._device, non_blocking=True)
        recorded = torch.empty(steps, RECORDED, len(self.lanes), device=self._device)
        # autograd can't use what was made in inference mode
        with torch.inference_mode(self.program.recorded), torch.no_grad():
            for step in range(steps):
                self._step(index[step], rates[step], recorded[step])
        numbers = with_bad_flag(recorded).cpu().numpy().astype(np.float64)
        for i, lane in enumerate(self.lanes):
            lane.chunks.append(numbers[:, :, i])
            lane.done += steps

    def inputs(self) -> list[Tensor]:
        """What a step of the program is given, with the first rows as each lane's batch."""
        batch = self.program.recipe.batch_size
        index = torch.arange(batch, device=self.rows.index_device).expand(len(self.lanes), -1) % len(self.rows)
        return flat_inputs(self._views[0], self._frozen, *self.rows.take(index), self._scale)

    @property
    def _scale(self) -> Tensor | None:
        return None if self._scales is None else self._scales[:, 0]

    def _step(self, index: Tensor, rate: Tensor, recorded: Tensor) -> None:
        x, y = self.rows.take(index)
        losses, *gradients = self.program.step(self._views[0], self._frozen, x, y, self._scale)
        gradient = torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1)
        overflow = None if self._scales is None else self._unscale(gradient)
        norm = vector_norm(gradient, dim=1, keepdim=True)
        if self._clip_norm is not None:
            most, without = self._clip_norm
            share = (most / (norm + CLIP_EPS)).clamp(max=1.0)
            gradient.mul_(torch.where(without, 1.0, share))
        if self._clip_value is not None:
            torch.clamp(gradient, -self._clip_value, self._clip_value, out=gradient)
        before = [] if overflow is None else [t.clone() for t in self._update.tensors()]
        self._update.apply(self._flat, gradient, rate, out=self._spare)
        if overflow is not None:
            self._take_back(overflow, before)
        weights_moved, moved = self._norms(torch.sub(self._spare, self._flat, out=gradient))
        broken = torch.mv(self._spare, self._zeros)  # a maximum would take thirty times as long on a CPU
        torch.stack([losses.float(), norm[:, 0], moved, weights_moved, *self._sizes, broken], out=recorded)
        self._sizes = self._norms(self._spare)
        self._flat, self._spare = self._spare, self._flat
        self._views.reverse()

    def _norms(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """L2 norms of the weights and of all parameters, (lanes,) each."""
        cut = self.program.layout.weights
        weights = vector_norm(flat[:, :cut], dim=1)
        if cut == flat.shape[1]:
            return weights, weights
        return weights, torch.hypot(weights, vector_norm(flat[:, cut:], dim=1))

    def _unscale(self, gradient: Tensor) -> Tensor:
        """As `LossScaler.unscale`, lane by lane; whether each overflowed, (lanes, 1)."""
        assert self._scales is not None
        gradient.div_(self._scales)
        overflow = torch.isnan(torch.mv(gradient, self._zeros))[:, None]
        instead = torch.where(self._scales <= 1, torch.nan, 0.0)
        gradient.copy_(torch.where(overflow, instead, gradient))
        return overflow

    def _take_back(self, overflow: Tensor, before: Sequence[Tensor]) -> None:
        """As `LossScaler.step`: lanes that overflowed stay as they were, and their scale halves."""
        assert self._scales is not None
        for now, old in zip(self._update.tensors(), before, strict=True):
            now.copy_(torch.where(overflow, old, now))
        self._spare.copy_(torch.where(overflow, self._flat, self._spare))
        self._scales, self._clean = next_scale(self._scales, self._clean, overflow)

    def heldout(self, which: Sequence[int], parts: Sequence[tuple[float, Tensor, Tensor]], at_once: int) -> list[float]:
        """Held-out losses of some lanes, over `heldout_batches`; `at_once` lanes are evaluated together."""
        losses = []
        for start, stop in pairwise([*range(0, len(which), at_once), len(which)]):
            index = torch.tensor(which[start:stop], device=self._device)
            trained = self.program.layout.views(self._flat[index])
            frozen = [f[index] for f in self._frozen]
            found = [self.program.heldout_losses(trained, frozen, x, y) * share for share, x, y in parts]
            losses += torch.stack(found).sum(0).tolist()
        return losses
