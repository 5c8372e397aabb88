"""How a study is trained: which engine, with how many lanes; measured on its own model before the search starts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipefuzz.config import Config
from recipefuzz.engines import prepare
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Job
from recipefuzz.engines.lanes import Lanes
from recipefuzz.engines.memory import lanes_that_fit
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.probe import plain_step, probed, tensors_of
from recipefuzz.engines.program import Start, unscaled_model
from recipefuzz.engines.sequential import flushed_denormals, is_lack_of_memory, one_thread
from recipefuzz.errors import RAISED, InputError, describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task

TRIED_LANES = (8, 16, 32, 64)  # each twice the one before
BETTER = 0.95  # of the time a lane took before, that more lanes must save to be worth what they cost the sampler
WORTH_IT = 0.85  # of a sequential step, over which a lane's step is no gain: in a search not all lanes are full
REPEATS = 3  # the least time counts: other processes only ever add to it
TYPICAL = 0.5  # of its budget's steps a trial takes: many are decided earlier
LONG = 2.0  # seconds that the measuring may take; then the best so far is taken


@dataclass(frozen=True)
class Plan:
    """An engine, and for the fused one its lanes in each process; `why` is what users are told.

    Attributes:
        lanes: 0 for the sequential engine.
    """

    lanes: int
    why: str

    @property
    def engine(self) -> str:
        return "fused" if self.lanes else "sequential"


@dataclass(frozen=True)
class Times:
    """Seconds that were measured.

    Attributes:
        alone: of a step of the model alone.
        steps: of a step of so many lanes.
        setup: of making a structure's program.
    """

    alone: float
    steps: dict[int, float]
    setup: float

    def lane(self, lanes: float) -> float:
        """A lane's step among so many: a part of a step takes as long for any number, which few lanes have to bear."""
        few, *more = sorted(self.steps)
        if lanes >= few:
            return min(self.steps[n] / n for n in self.steps if n <= lanes)
        fixed = max(0.0, 2 * self.steps[few] - self.steps[2 * few]) if 2 * few in more else self.steps[few]
        return fixed / max(1.0, lanes) + (self.steps[few] - fixed) / few


def planned(config: Config, task: Task, recipe: Recipe, device: torch.device, ahead: Ahead) -> Plan:
    """The plan for a config.

    Args:
        recipe: that is measured.

    Raises:
        InputError: `engine: fused`, and the model can't be fused.
    """
    if config.run.engine == "sequential":
        return Plan(0, "as run.engine says")
    try:
        with one_thread(), flushed_denormals(), seeded(config.trial.seed, device):
            plan = _measured(task, recipe, device, ahead, config.trial.steps)
    except RAISED as error:
        reason = str(error) if isinstance(error, NotFusableError) else describe_exception(error)
        if config.run.engine == "fused":
            raise InputError(
                f"this target can't be fused: {reason}",
                place=config.source.place("run", "engine"),
                fix="engine: auto takes the sequential engine for it",
            ) from error
        return Plan(0, f"it can't be fused: {reason}")
    if config.run.engine == "fused" and not plan.lanes:
        return Plan(TRIED_LANES[0], f"as run.engine says, though {plan.why}")
    return plan


def _measured(task: Task, recipe: Recipe, device: torch.device, ahead: Ahead, budget: int) -> Plan:
    with seeded(0, device):
        rows = tensors_of(prepare.rows_for(task, recipe)[0].to(device))
    begun = time.perf_counter()
    program = probed(task, recipe, rows, device)
    setup = time.perf_counter() - begun
    model = unscaled_model(task, recipe, 0, device)
    order = prepare.BatchOrder(len(rows), recipe.batch_size, 0).draw(2, rows.index_device)
    weights = prepare.trainable(model)
    alone = _least(lambda: plain_step(task, recipe, model, weights, *rows.take(order[0])), device)

    def lanes_step(lanes: int) -> float:
        many = Lanes(program, rows)
        many.replace([], [Job(i, recipe, 0) for i in range(lanes)], [Start.of(model)] * lanes)
        return _least(functools.partial(many.run, len(order), lambda *_: order), device) / len(order)

    fits = lanes_that_fit(program.bytes_per_lane, program.layout.size, device, ahead.processes)
    steps, fits = _steps_of_lanes(lanes_step, fits)
    return chosen(Times(alone, steps, setup), fits, ahead, budget)


def _steps_of_lanes(lanes_step: Callable[[int], float], fits: int) -> tuple[dict[int, float], int]:
    """Seconds of a step by its lanes, while more are better; and how many fit: fewer, if these ran out of memory."""
    steps: dict[int, float] = {}
    started, tried = time.perf_counter(), TRIED_LANES[0]
    most = max(tried, min(fits, TRIED_LANES[-1]))
    while tried <= most:
        try:
            seconds = lanes_step(tried)
        except RAISED as error:
            if not is_lack_of_memory(error) or tried == 1:
                raise
            most = fits = tried // 2
            tried = max(steps, default=0) * 2 or fits
            continue
        best = min((s / n for n, s in steps.items()), default=float("inf"))
        steps[tried] = seconds
        if seconds / tried > BETTER * best or time.perf_counter() - started > LONG:
            break
        tried *= 2
    return steps, fits


def chosen(times: Times, fits: int, ahead: Ahead, budget: int) -> Plan:
    """The faster engine: for full lanes, and for as many recipes of a structure as there are to be.

    Args:
        fits: lanes at most.
        budget: steps of a trial, at most.
    """
    best, lanes = float("inf"), 0
    for tried, seconds in times.steps.items():
        if seconds / tried > BETTER * best:
            break
        best, lanes = seconds / tried, tried
    gain = f"{times.alone / best:.1f} times as fast as one by one"
    if best > WORTH_IT * times.alone:
        return Plan(0, f"in {lanes} lanes a step would be {gain}")
    if ahead.structures:
        each = ahead.trials / ahead.structures
        filled = times.lane(min(each, lanes)) + times.setup / (each * TYPICAL * budget)
        if filled > WORTH_IT * times.alone:
            few = f"{ahead.trials} trials of {ahead.structures} structures"
            return Plan(
                0, f"{few}, which can't share lanes, would be {times.alone / filled:.1f} times as fast in lanes"
            )
    return Plan(min(lanes, fits), f"a step of {lanes} lanes is {gain}")


def _least(call: Callable[[], object], device: torch.device) -> float:
    """Least seconds of some calls, the first not counted."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
