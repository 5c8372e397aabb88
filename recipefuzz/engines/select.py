"""Which engine, on which devices, with how many workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from recipefuzz.config import Config
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.fused import FusedEngine
from recipefuzz.engines.job import Engine, once
from recipefuzz.engines.plan import planned
from recipefuzz.engines.pool import PoolEngine, cores
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import InputError
from recipefuzz.recipe import Recipe
from recipefuzz.targets.task import Task
from recipefuzz.verdict import Budget

# for each worker: not the lanes that were measured, which differ from run to run, since the trials depend on it
AHEAD = 256


def open_engine(
    config: Config, task: Task, say: Callable[[str], None], ahead: Ahead, recipe: Recipe | None = None
) -> Engine:
    """The engine that suits the config's model on this machine.

    Args:
        say: gets one line about what was picked, and why; later, in `collect`, one for each reason why recipes are
            trained otherwise.
        ahead: there are no more workers than trials.
        recipe: that the engines are measured with; by default the default recipe.

    Raises:
        InputError: a device that this machine does not have; `engine: fused` for a model that can't be.
    """
    device = pick_device(config)
    budget = Budget(config.trial.steps, config.trial.extend)
    devices = worker_devices(device, config.run.workers)
    if ahead.trials:
        devices = devices[: ahead.trials]
    ahead = replace(ahead, processes=max(1, len(devices)))
    pool = PoolEngine(config, budget, devices, config.trial.timeout, lanes=None, say=say) if devices else None
    try:
        plan = planned(config, task, recipe or config.default_recipe(), torch.device(device), ahead)
    except BaseException:
        if pool:
            pool.close()
        raise
    where = f"{len(devices)} worker process{'es' if len(devices) > 1 else ''}" if devices else "this process"
    lanes = f" of {plan.lanes} lanes" if plan.lanes else ""
    say(f"{plan.engine} engine{lanes}, {where} on {device}: {plan.why}")
    if pool:
        pool.use(plan.lanes, ahead)
        return pool
    on = torch.device(device)
    alone = SequentialEngine(task, budget, on)
    return FusedEngine(task, budget, on, alone, plan.lanes, ahead, once(say)) if plan.lanes else alone


def ask_ahead(config: Config, engine: Engine) -> int:
    """Recipes to ask for ahead of results: enough that no lane waits, as few as that allows.

    What the sampler has not seen it can't learn from: on a synthetic space where 72 % of the recipes fail, 60
    trials of tpe failed in 39 % with 4 recipes ahead, in 52 % with 16 (see tests/test_store.py). So lanes get a
    quarter of the search at most.
    """
    if isinstance(config.search.window, int):
        return config.search.window
    workers = max(1, len(worker_devices(pick_device(config), config.run.workers)))
    least = max(4, 2 * workers)
    return max(least, min(config.search.trials // 4, AHEAD * workers)) if engine.lanes else least


def pick_device(config: Config) -> str:
    """`auto` is a CUDA GPU if there is one, else the CPU; MPS is slower than the CPU on small models."""
    wanted = config.run.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    place = config.source.place("run", "device")
    kind, _, index = wanted.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if there <= int(index or 0):
        have = "a CPU" + (f" and {torch.cuda.device_count()} CUDA GPUs" if torch.cuda.is_available() else " only")
        raise InputError(
            "this machine has no such device",
            place=place,
            found=wanted,
            expected=f"it has {have}",
            fix="device: auto",
        )
    return wanted


def worker_devices(device: str, workers: int | str) -> list[str]:
    """The device of each worker: `auto` is one a core on the CPU, one a GPU on CUDA."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    count = (cores() if device == "cpu" else len(gpus)) if isinstance(workers, str) else workers
    return [gpus[i % len(gpus)] for i in range(count)]
