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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipefuzz.engines import aot, prepare
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.baselines import Baselines
from recipefuzz.engines.compiling import Compiling, Left, least_seconds
from recipefuzz.engines.job import Job, Outcome, described, structure
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

NOTHING = Ahead()
LITTLE_LEFT = 1.0  # seconds of work, under which it is not asked whether compiling pays
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
    compiling: Compiling | None = None
    settled: bool = False  # whether it is compiled
    lane_steps: int = 0  # trained so far, of all lanes together, in so many seconds,
    seconds: float = 0.0
    finished: int = 0  # with so many verdicts
    step_seconds: float = 0.0  # of a lane's step by the recording alone; 0 while it is not known

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
        ahead: what the search has before it, as far as it is known: whether compiling pays depends on it.
        note: gets what users are told of a structure: a reason, of which once is enough, and a line that gives it.
    """

    def __init__(
        self,
        task: Task,
        budget: Budget,
        device: torch.device,
        alone: SequentialEngine,
        lanes: int,
        ahead: Ahead = NOTHING,
        note: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self._task, self._budget = with_own_loss(task, device), budget
        self._device, self.lanes = device, lanes
        self._alone = alone
        self._baselines = Baselines(task, device)
        self._groups: dict[Hashable, _Group] = {}
        self._apart: deque[Job] = deque()
        self._heldout: dict[tuple[str, str], list[tuple[float, Tensor, Tensor]]] = {}
        self._starts: OrderedDict[Any, Start] = OrderedDict()
        self._orders: dict[tuple[int, int], _Order] = {}
        self._ahead, self._begun, self._finished, self._note = ahead, time.monotonic(), 0, note
        self._cache = aot.cache_folder() if device.type == "cpu" and ahead.trials else None
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
        for key in list(self._groups):
            self._drop(key)
        self._apart.clear()

    def _drop(self, key: Hashable) -> None:
        if (compiling := self._groups.pop(key).compiling) is not None:
            compiling.close()

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
            self._give_up(key, str(error))
        except RAISED as error:
            if is_lack_of_memory(error) and self.lanes > 1:
                self.lanes = max(1, min(self.lanes, len(group.lanes.lanes) if group.lanes else self.lanes) // 2)
                self._restart(group)
            elif group.lanes and group.lanes.program.compiled:
                self._restart(group)
                group.settled = True
            else:
                self._give_up(
                    key, f"{'a step' if group.lanes else 'its program'} raised {type(error).__name__}: {error}"
                )
        return []

    def _give_up(self, key: Hashable, reason: str) -> None:
        """Train a structure's jobs one by one, now and later."""
        jobs = self._jobs(self._groups[key])
        self.reasons[key] = reason
        self._note(reason, f"{described(jobs[0].recipe)} is trained one by one, not in lanes: {reason}")
        self._apart.extend(jobs)
        self._drop(key)

    def _jobs(self, group: _Group) -> list[Job]:
        running = [lane.job for lane in group.lanes.lanes] if group.lanes else []
        return [*running, *group.waiting]

    def _restart(self, group: _Group) -> None:
        """Jobs begin anew, with a new program."""
        group.waiting = deque(self._jobs(group))
        group.lanes = None
        if group.compiling is not None:
            group.compiling.close()
        group.compiling, group.settled = None, False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _chunk(self, group: _Group) -> list[Outcome]:
        started = time.perf_counter()
        if group.lanes is None:
            self._forget_idle()
            self._open(group)
        assert group.lanes is not None
        self._let_in(group)
        begun = time.process_time()
        lanes = group.lanes.lanes
        steps = min(self._next_checkpoint(lane.done) - lane.done for lane in lanes)
        group.lanes.run(steps, self._order_of)
        outcomes = self._judge(group, [i for i, lane in enumerate(lanes) if self._at_checkpoint(lane.done)])
        for lane in lanes:
            lane.seconds += (time.perf_counter() - started) / len(lanes)
        group.seconds += time.process_time() - begun
        group.lane_steps += steps * len(lanes)
        group.finished += len(outcomes)
        self._finished += len(outcomes)
        self._compile(group)
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
            self._drop(key)

    def _compile(self, group: _Group) -> None:
        """Take the structure further on the way to a compiled step, where there is work enough left."""
        assert group.lanes is not None
        program, many = group.lanes.program, len(group.lanes.lanes)
        if self._cache is None or group.settled or not (group.finished and program.recorded and many >= aot.FEWEST):
            return
        seconds = self._seconds_left(group)
        if group.compiling is None and seconds < LITTLE_LEFT:
            return
        try:
            with torch.inference_mode():
                line = self._advance(group, self._cache, group.lanes.inputs(), seconds)
        except RAISED as error:  # whatever it is, no trial is worse off
            group.settled, line = True, f"steps go on uncompiled: {type(error).__name__}: {error}"
        if line:
            self._note(line, f"{described(program.recipe)}: {line}")

    def _advance(self, group: _Group, cache: Path, inputs: list[Tensor], seconds: float) -> str:
        assert group.lanes is not None
        program, many = group.lanes.program, len(group.lanes.lanes)
        if group.compiling is None:
            group.compiling = Compiling(program, inputs, cache, self._ahead.processes)
            group.step_seconds = least_seconds(program.recorded_step, inputs) / many
        share = min(1.0, group.step_seconds * group.lane_steps / group.seconds)
        line = group.compiling.advance(inputs, Left(seconds, share), group.step_seconds * many)
        group.settled = group.compiling.settled
        return line

    def _seconds_left(self, group: _Group) -> float:
        """Of all processes together, if trials go on to be of this structure as often, and to take as long."""
        ahead = self._ahead
        seconds = ahead.left(self._finished) * group.seconds / max(1, self._finished)
        if ahead.seconds is None:
            return seconds
        return min(seconds, ahead.processes * max(0.0, self._begun + ahead.seconds - time.monotonic()))

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
