"""How a study is trained: which engine, with how many lanes; measured on its own model before the search starts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipefuzz.config import Config
from recipefuzz.engines import prepare
from recipefuzz.engines.job import Job
from recipefuzz.engines.lanes import Lanes
from recipefuzz.engines.memory import lanes_that_fit
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.probe import plain_step, probed, tensors_of
from recipefuzz.engines.program import Start, unscaled_model
from recipefuzz.engines.sequential import flushed_denormals, one_thread
from recipefuzz.errors import RAISED, InputError, describe_exception
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task

TRIED_LANES = (8, 16, 32, 64)
BETTER = 0.95  # of the time a lane took before, that more lanes must save to be worth what they cost the sampler
WORTH_IT = 0.85  # of a sequential step, over which a lane's step is no gain: in a search not all lanes are full
REPEATS = 3  # the least time counts: other processes only ever add to it
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


def planned(config: Config, task: Task, recipe: Recipe, device: torch.device, processes: int) -> Plan:
    """The plan for a config.

    Args:
        recipe: that is measured.
        processes: that will share the machine's memory.

    Raises:
        InputError: `engine: fused`, and the model can't be fused.
    """
    if config.run.engine == "sequential":
        return Plan(0, "as run.engine says")
    try:
        with one_thread(), flushed_denormals(), seeded(config.trial.seed, device):
            plan = _measured(task, recipe, device, processes)
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


def _measured(task: Task, recipe: Recipe, device: torch.device, processes: int) -> Plan:
    with seeded(0, device):
        rows = tensors_of(prepare.rows_for(task, recipe)[0].to(device))
    program = probed(task, recipe, rows, device)
    model = unscaled_model(task, recipe, 0, device)
    order = prepare.BatchOrder(len(rows), recipe.batch_size, 0).draw(2, rows.index_device)
    weights = prepare.trainable(model)
    alone = _least(lambda: plain_step(task, recipe, model, weights, *rows.take(order[0])), device)
    fits = lanes_that_fit(program.bytes_per_lane, program.layout.size, device, processes)
    best, lanes, started = float("inf"), 0, time.perf_counter()
    for tried in TRIED_LANES:
        if tried > max(fits, TRIED_LANES[0]) or time.perf_counter() - started > LONG:
            break
        many = Lanes(program, rows)
        many.replace([], [Job(i, recipe, 0) for i in range(tried)], [Start.of(model)] * tried)
        each = _least(functools.partial(many.run, len(order), lambda *_: order), device) / len(order) / tried
        if each > BETTER * best:
            break
        best, lanes = each, tried
    gain = f"{alone / best:.1f} times as fast as one by one"
    if best > WORTH_IT * alone:
        return Plan(0, f"in {lanes} lanes a step would be {gain}")
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
