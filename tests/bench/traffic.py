"""Workers of a shared study that train nothing: they ask and tell as `recipefuzz.working` does, or as Optuna's users do."""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna

from recipefuzz.board import Item
from recipefuzz.config import Config, parse_config
from recipefuzz.entry_log import EntryLog
from recipefuzz.result import CURVE_POINTS, Phase, TrialResult
from recipefuzz.sampling import distribution
from recipefuzz.sharing import SharedStudy
from recipefuzz.working import Pace

SPACE = {
    "lr": {"low": 1e-5, "high": 10, "log": True},
    "init_scale": {"low": 0.01, "high": 30, "log": True},
    "norm": ["none", "batch", "layer"],
    "clip_norm": [None, 1, 5, 10, 15],
}

optuna.logging.set_verbosity(optuna.logging.ERROR)
Open = Callable[[], EntryLog]


def study(trials: int, sampler: str) -> Config:
    return parse_config(
        {
            "target": {"data": "digits", "model": "mlp"},
            "space": SPACE,
            "search": {"trials": trials, "sampler": sampler, "confirm": {"top": 0}},
            "run": {"storage": "file"},
        }
    )


def made_up(config: Config, item: Item) -> TrialResult:
    """As large as a real one, and no flatter for the sampler."""
    numbers, at = random.Random(item.trial), math.log10(item.values["lr"])  # type: ignore[arg-type]
    score = round(0.9 / (1 + (at + 1) ** 2) * numbers.uniform(0.9, 1), 6)
    found: dict[str, Any] = {"verdict": "converging", "score": score, "skill": score, "heldout_skill": score}
    if at > 0:
        found = {"verdict": "nan", "score": 0.0, "cause": "exploding_parameters", "first_bad": 3}
    return TrialResult(
        item.trial,
        item.phase,
        item.seed,
        config.recipe_of(item.values).values(),
        reason="skill 0.93 at the end of 300 steps, 0.90 on the held-out rows",
        loss=round(2.3 * (1 - score), 6),
        baseline=2.30217,
        steps=300,
        seconds=round(numbers.random(), 4),
        curve=tuple(float(f"{2.3 - 2 * numbers.random():.4g}") for _ in range(CURVE_POINTS)),
        **found,
    )


@dataclass(frozen=True)
class Done:
    """What a worker did: the trials that it was given, and how long each of its turns took."""

    given: list[int]
    turns: list[float]


def ours(open_log: Open, config: Config, name: str, duration: float, *, batches: bool) -> Done:
    """Until the study is over.

    Args:
        duration: seconds of a trial.
        batches: turns as a worker of ours takes them, and not one for each trial.
    """
    log, pace = open_log(), Pace(1, 1)
    shared, held, given = SharedStudy(log, config, {}, name), list[Item](), list[int]()
    done, turns, rate, last = list[TrialResult](), list[float](), 0.0, 0.0
    while True:
        start = time.monotonic()
        room = pace.room(rate, turns[-1] if turns else 0.0) - len(held) if batches else 1
        turn = shared.turn(done, most=max(0, room), least=1)
        turns.append(time.monotonic() - start)
        held, done, last = held + turn.taken, [], time.monotonic()
        given += [item.trial for item in turn.taken]
        if turn.over:
            log.close()
            return Done(given, turns)
        if not held:
            time.sleep(0.01)
        while held:
            if duration:
                time.sleep(duration)
            done.append(made_up(config, held.pop(0)))
            if not batches or time.monotonic() - last >= pace.pause(turns[-1]):
                break
        rate = len(done) / max(time.monotonic() - last, 1e-3)


def optunas(open_storage: Callable[[], Any], sampler: str, seed: int, trials: int, duration: float) -> Done:
    """Plain ask and tell, so many times."""
    axes = {name: distribution(axis) for name, axis in study(1, sampler).axes.axes}
    made = {
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    }
    found = optuna.load_study(study_name=Phase.SEARCH, storage=open_storage(), sampler=made[sampler]())
    given, turns = list[int](), list[float]()
    for _ in range(trials):
        start = time.monotonic()
        trial = found.ask(axes)
        turns.append(time.monotonic() - start)
        if duration:
            time.sleep(duration)
        given.append(trial.number)
        start = time.monotonic()
        found.tell(trial, math.log10(trial.params["lr"]) ** 2)
        turns[-1] += time.monotonic() - start
    return Done(given, turns)


def together(jobs: list[Callable[[], Done]]) -> tuple[float, list[Done]]:
    """Run them in a process each; return the seconds from the moment when all are ready, and what they did."""
    context = multiprocessing.get_context("fork")  # nothing is to be imported anew
    barrier, results = context.Barrier(len(jobs) + 1), context.Queue()

    def run(job: Callable[[], Done]) -> None:
        barrier.wait()
        results.put(job())

    processes = [context.Process(target=run, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.monotonic()
    done = [results.get(timeout=600) for _ in jobs]
    seconds = time.monotonic() - start
    for process in processes:
        process.join()
    return seconds, done
