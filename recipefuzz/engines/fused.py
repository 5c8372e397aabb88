"""The fused engine: recipes of one structure are trained as one batched program, a lane each.

Recipes of a search differ in numbers: learning rate, scales, thresholds, weight decay, seed. Those become columns of
the batched program. What changes which operations are launched (normalization, optimizer family, precision, batch size,
the factory's own arguments) is the structure; each has a program of its own. HFTA (Wang et al., MLSys 2021,
arXiv:2102.02344) fuses models alike; here lanes also come and go, as requests do in serving engines (Orca, OSDI 2022):
a decided lane leaves at its checkpoint, and a waiting job takes its place.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipefuzz.engines import prepare
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.job import Job, Outcome, structure
from recipefuzz.engines.lanes import Lane, Lanes
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.probe import probed, tensors_of
from recipefuzz.engines.program import Start, unscaled_model
from recipefuzz.engines.sequential import (
    HELDOUT_BATCH,
    SequentialEngine,
    flushed_denormals,
    heldout_batches,
    is_lack_of_memory,
    one_thread,
    with_own_loss,
)
from recipefuzz.errors import RAISED
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant
from recipefuzz.targets.task import Rows, Task
from recipefuzz.trace import Floats
from recipefuzz.verdict import Budget, judge

KEPT_STARTS = 64  # initial weights that are kept: a search has one set for each structure
KEPT_PROGRAMS = 32  # of structures that nothing waits for: a width that is searched makes one for each value
FEW = 3  # jobs of a structure, under which making its program takes longer than training them one by one
ROOM = 0.25  # share of the lanes that must be free before new ones are let in: those that start together stay in step


@dataclass
class _Group:
    """One structure's lanes and the jobs that wait for one."""

    waiting: deque[Job] = field(default_factory=deque)
    lanes: Lanes | None = None
    constant: Constant | None = None
    heldout: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)

    @property
    def busy(self) -> int:
        return len(self.waiting) + (len(self.lanes.lanes) if self.lanes else 0)


class FusedEngine:
    """Trains jobs in lanes, in this very process and on one thread.

    A structure that can't be fused is trained by the sequential engine; so are the jobs of a chunk that raised: then an
    exception of one recipe is that recipe's own.

    Args:
        alone: trains what can't be fused.
        lanes: of one program at most.
    """

    def __init__(self, task: Task, budget: Budget, device: torch.device, alone: SequentialEngine, lanes: int) -> None:
        self._task, self._budget = with_own_loss(task, device), budget
        self._device, self.lanes = device, lanes
        self._alone = alone
        self._baselines = Baselines(task, device)
        self._groups: dict[Hashable, _Group] = {}
        self._apart: deque[Job] = deque()
        self._heldout: dict[tuple[str, str], list[tuple[float, Tensor, Tensor]]] = {}
        self._starts: OrderedDict[Any, Start] = OrderedDict()
        self._orders: dict[tuple[int, int], _Order] = {}
        self.reasons: dict[Hashable, str] = {}  # why a structure is not fused

    def submit(self, job: Job) -> None:
        key = structure(job.recipe)
        if key in self.reasons:
            self._apart.append(job)
        else:
            self._groups.setdefault(key, _Group()).waiting.append(job)

    @property
    def load(self) -> int:
        """Jobs that are not done."""
        return len(self._apart) + sum(group.busy for group in self._groups.values())

    def collect(self) -> list[Outcome]:
        while self.load:
            if outcomes := self.advance():
                return outcomes
        return []

    def close(self) -> None:
        self._groups.clear()
        self._apart.clear()

    def advance(self) -> list[Outcome]:
        """Train for one chunk the structure that has most to do; the trials that it decided."""
        if self._apart:
            return [self._alone.train(self._apart.popleft())]
        key, group = max(self._groups.items(), key=lambda item: item[1].busy, default=(None, None))
        if group is None or not group.busy:
            return []
        if group.lanes is None and group.busy < FEW:  # others have come first, and more of it may have come
            self._apart.append(group.waiting.popleft())
            return self.advance()
        self._groups[key] = self._groups.pop(key)  # the last used is the last to be forgotten
        try:
            with one_thread(), flushed_denormals():
                return self._chunk(group)
        except NotFusableError as error:
            self.reasons[key] = str(error)
        except RAISED as error:
            if is_lack_of_memory(error) and self.lanes > 1:
                self.lanes = max(1, min(self.lanes, len(group.lanes.lanes) if group.lanes else self.lanes) // 2)
                self._restart(group)
                return []
            if not group.lanes:  # before the first step: it is the structure's, not a recipe's
                self.reasons[key] = f"its program raised {type(error).__name__}: {error}"
        self._apart.extend(self._jobs(group))
        del self._groups[key]
        return []

    def _jobs(self, group: _Group) -> list[Job]:
        running = [lane.job for lane in group.lanes.lanes] if group.lanes else []
        return [*running, *group.waiting]

    def _restart(self, group: _Group) -> None:
        """Jobs begin anew, in fewer lanes."""
        group.waiting = deque(self._jobs(group))
        group.lanes = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _chunk(self, group: _Group) -> list[Outcome]:
        started = time.perf_counter()
        if group.lanes is None:
            self._forget_idle()
            self._open(group)
        assert group.lanes is not None
        self._let_in(group)
        lanes = group.lanes.lanes
        steps = min(self._next_checkpoint(lane.done) - lane.done for lane in lanes)
        group.lanes.run(steps, self._order_of)
        outcomes = self._judge(group, [i for i, lane in enumerate(lanes) if self._at_checkpoint(lane.done)])
        for lane in lanes:
            lane.seconds += (time.perf_counter() - started) / len(lanes)
        return [replace(outcome, seconds=lane.seconds) for lane, outcome in outcomes]

    def _next_checkpoint(self, done: int) -> int:
        return next(c for c in self._budget.checkpoints() if c > done)

    def _at_checkpoint(self, done: int) -> bool:
        return done in self._budget.checkpoints()

    def _open(self, group: _Group) -> None:
        """Make the structure's program, and see that it computes what each recipe would alone.

        Raises:
            NotFusableError: it can't be made, or does not.
        """
        recipe = group.waiting[0].recipe
        train_rows, test_rows = self._alone.rows_of(recipe)
        rows = tensors_of(train_rows)
        program = probed(self._task, recipe, rows, self._device)
        group.constant = self._baselines.of(recipe)
        group.heldout = self._heldout_of(recipe, test_rows)
        group.lanes = Lanes(program, rows)

    def _forget_idle(self) -> None:
        """Programs that were not used for longest, and have no jobs, go."""
        idle = [key for key, group in self._groups.items() if not group.busy]
        for key in idle[: max(0, len(idle) - KEPT_PROGRAMS)]:
            del self._groups[key]

    def _heldout_of(self, recipe: Recipe, rows: Rows) -> list[tuple[float, Tensor, Tensor]]:
        """The held-out rows in batches, once for all structures that scale alike."""
        key = (recipe.input_norm, recipe.target_norm)
        if key not in self._heldout:
            self._heldout[key] = list(heldout_batches(rows))
        return self._heldout[key]

    def _let_in(self, group: _Group) -> None:
        assert group.lanes is not None
        lanes = group.lanes.lanes
        free = self.lanes - len(lanes)
        if not group.waiting or (lanes and free < ROOM * self.lanes):
            return
        new = [group.waiting.popleft() for _ in range(min(free, len(group.waiting)))]
        group.lanes.replace(range(len(lanes)), new, [self._start_of(job) for job in new])

    def _start_of(self, job: Job) -> Start:
        key = (job.recipe.norm, job.recipe.extra, job.seed)
        if key not in self._starts:
            self._starts[key] = Start.of(unscaled_model(self._task, job.recipe, job.seed, self._device))
            if len(self._starts) > KEPT_STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(key)
        return self._starts[key]

    def _order_of(self, job: Job, start: int, stop: int) -> Tensor:
        return self._order(job).rows(stop)[start:stop]

    def _order(self, job: Job) -> _Order:
        key = (job.seed, job.recipe.batch_size)
        if key not in self._orders:
            self._orders[key] = _Order(prepare.BatchOrder(len(self._task.train), job.recipe.batch_size, job.seed))
        return self._orders[key]

    def _judge(self, group: _Group, due: Sequence[int]) -> list[tuple[Lane, Outcome]]:
        """Ask for the verdict of lanes at a checkpoint; those that have one leave."""
        assert group.lanes is not None
        assert group.constant is not None
        lanes = group.lanes.lanes
        for i in due:
            lane = lanes[i]
            lane.trace = lane.trace.extended(self._columns(group, lane))
        evaluated = [i for i in due if lanes[i].trace.first_bad is None and self._budget.evaluates_at(lanes[i].done)]
        at_once = max(1, len(lanes) * lanes[0].job.recipe.batch_size // HELDOUT_BATCH)
        for i, loss in zip(evaluated, group.lanes.heldout(evaluated, group.heldout, at_once), strict=True):
            lanes[i].trace = lanes[i].trace.evaluated(loss)
        outcomes = []
        for i in due:
            lane, baseline = lanes[i], group.constant.loss
            verdict = judge(lane.trace, baseline, self._budget, whole=lane.job.whole)
            if verdict is not None:
                outcomes.append((lane, Outcome(lane.job, lane.trace, verdict, baseline)))
        decided = {id(lane) for lane, _ in outcomes}
        if decided:
            group.lanes.replace([i for i, lane in enumerate(lanes) if id(lane) not in decided], [], [])
        return outcomes

    def _columns(self, group: _Group, lane: Lane) -> Floats:
        """What a lane recorded since its last checkpoint, as `Trace.extended` wants it."""
        numbers = lane.take()
        start = lane.done - len(numbers)
        constants = self._order(lane.job).constants(self._task, group, start, lane.done)
        return np.column_stack([numbers[:, 0], constants, numbers[:, 1:]])


class _Order:
    """The rows of one seed's steps, drawn once for all its trials; with them the constant's loss on each batch."""

    def __init__(self, order: prepare.BatchOrder) -> None:
        self._order = order
        self._rows = torch.empty(0)
        self._constants: dict[int, Floats] = {}

    def rows(self, steps: int) -> Tensor:
        """Indices of the first steps, (steps or more, batch)."""
        if steps > len(self._rows):
            drawn = self._order.draw(max(steps, 2 * len(self._rows)) - len(self._rows), torch.device("cpu"))
            self._rows = torch.cat([self._rows, drawn]) if len(self._rows) else drawn
        return self._rows

    def constants(self, task: Task, group: _Group, start: int, stop: int) -> Floats:
        """Loss of the best constant prediction on each step's batch, (stop - start,)."""
        assert group.constant is not None
        assert group.lanes is not None
        known = self._constants.get(id(group.constant), np.zeros(0))
        if stop > len(known):
            index = self.rows(stop)[len(known) :]
            found = group.constant.of_rows(index.to(group.lanes.rows.index_device))
            if found is None:
                targets = (group.lanes.rows.take(batch)[1] for batch in index.to(group.lanes.rows.index_device))
                found = torch.stack([group.constant.of_targets(task, y, len(y)).float() for y in targets])
            known = self._constants[id(group.constant)] = np.concatenate(
                [known, found.cpu().numpy().astype(np.float64)]
            )
        return known[start:stop]
