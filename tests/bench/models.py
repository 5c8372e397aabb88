"""Each built-in model: whole jobs through the fused and the sequential engine, all cores busy, started and warm."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from row import Row, seconds

from recipefuzz.config import Config, parse_config
from recipefuzz.engines.ahead import Ahead
from recipefuzz.engines.job import Engine, Job, run
from recipefuzz.engines.select import open_engine
from recipefuzz.recipe import Recipe
from recipefuzz.targets.resolve import resolve

STEPS = 60
ROUNDS = 3  # of all lanes of all workers that one repeat trains
SEQUENTIAL_JOBS = 16
ENOUGH, REPEATS = 4.0, 5  # seconds of the fused engine after which a case is not repeated; an engine's best counts
RATES = torch.logspace(-3, -1.5, 8).tolist()
NEVER_SLOWER = 0.95


@dataclass(frozen=True)
class Case:
    """A model on its data; `bar`: what its fused engine is to reach."""

    name: str
    data: str
    model: str
    args: dict[str, Any]
    norm: str | None = None
    bar: float | None = None

    def config(self, engine: str) -> Config:
        loss = "mse" if self.data == "adding" else "cross_entropy"
        recipe = {"optimizer": "momentum", "clip_norm": 1} | ({"norm": self.norm} if self.norm else {})
        return parse_config(
            {
                "target": {"data": self.data, "model": self.model, "model_args": self.args, "loss": loss},
                "space": {"lr": {"low": RATES[0], "high": RATES[-1], "log": True}},
                "recipe": recipe,
                "trial": {"steps": STEPS, "extend": 0},
                "run": {"engine": engine},
            }
        )


CASES = (
    Case("mlp", "digits", "mlp", {}),
    Case("mlp, batch norm", "digits", "mlp", {}, norm="batch", bar=1.3),
    Case("cnn", "digits", "cnn", {}, bar=1.3),
    Case("cnn, batch norm", "digits", "cnn", {}, norm="batch", bar=1.3),
    Case("rnn", "adding", "rnn", {}),
    Case("gru", "adding", "gru", {}),
    Case("lstm", "adding", "lstm", {}),
    Case("stacked lstm", "adding", "lstm", {"depth": 2}, bar=3.0),
    Case("transformer, text", "text", "transformer", {}, bar=1.3),
    Case("transformer, digits", "digits", "transformer", {}, bar=1.3),
)
QUICK = ("mlp", "cnn, batch norm", "stacked lstm")


class Trained:
    """An engine and the jobs it is timed with, of which each repeat has a fixed number."""

    def __init__(self, engine: Engine, config: Config, jobs: int) -> None:
        self.engine, self.jobs = engine, jobs
        self.best = float("inf")
        self._numbers = itertools.count()
        self._recipes: list[Recipe] = [config.recipe_of({"lr": rate}) for rate in RATES]
        self._train(2 * max(1, engine.lanes))  # workers start, programs are recorded

    def _train(self, count: int) -> None:
        jobs = [Job(i, self._recipes[i % len(RATES)], 0, whole=True) for i in itertools.islice(self._numbers, count)]
        errors = [outcome.error for outcome in run(self.engine, jobs) if outcome.error]
        if errors:
            raise RuntimeError(errors[0])

    def repeat(self) -> float:
        took = seconds(lambda: self._train(self.jobs))
        self.best = min(self.best, took / self.jobs)
        return took


def rows(names: tuple[str, ...], rounds: int = ROUNDS) -> Iterator[Row]:
    for case in (c for c in CASES if c.name in names):
        yield from _case(case, rounds)


def _case(case: Case, rounds: int) -> Iterator[Row]:
    task = resolve(case.config("auto"))
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        trained = {}
        for kind in ("auto", "sequential", "fused"):
            config = case.config(kind)
            engine = stack.enter_context(contextlib.closing(open_engine(config, task, said.append, Ahead())))
            jobs = 2 * rounds * engine.lanes if engine.lanes else SEQUENTIAL_JOBS
            trained[kind] = Trained(engine, config, jobs)
        spent = 0.0
        for _ in range(REPEATS):  # in turn: what slows the machine down slows down both
            trained["auto"].repeat()
            trained["sequential"].repeat()
            spent += trained["fused"].repeat()
            if spent > ENOUGH:
                break
        lanes, picked = trained["fused"].engine.lanes, trained["auto"].engine.lanes
    fused, alone, auto = (trained[kind].best for kind in ("fused", "sequential", "auto"))
    shown, peers = f"{1 / fused:.1f} trials/s", f"{1 / alone:.1f} trials/s"
    yield Row(f"{case.name}: fused", shown, peers, alone / fused, case.bar, note=f"{lanes} lanes a worker")
    note = f"picks {f'fused, {picked} lanes' if picked else 'sequential'}: {said[0].rpartition(': ')[2]}"
    yield Row(f"{case.name}: auto", f"{1 / auto:.1f} trials/s", peers, alone / auto, NEVER_SLOWER, note=note)
