"""What a long search spends on everything but training: asking, telling, building results, recording, judging, reporting.

A real search, in a process of its own, whose steps are timed from outside:

    python around.py --trials 10000
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from end_to_end import study
from row import Row, seconds

from recipefuzz import searching
from recipefuzz.config import parse_config
from recipefuzz.engines.job import Engine, Job, Outcome
from recipefuzz.engines.pool import cores
from recipefuzz.store import StudySearch
from recipefuzz.trace import COLUMNS, Trace
from recipefuzz.verdict import Budget, judge

WIDTH = 64
MOST = 10.0  # percent of the search's wall time
SAMPLED = 16  # of so many outcomes one is kept, to judge it again
TIMED = {  # what the searching process does beside waiting for the engine
    "ask, tell": (StudySearch, "refill"),
    "result_of": (searching, "to_result"),
    "record": (StudySearch, "record_all"),
    "report": (searching, "_report"),
}


def spend(trials: int) -> dict[str, float]:
    """Seconds of the whole search and of each phase, and the peak memory of this process and of the workers in MB."""
    config = parse_config(study(WIDTH, trials))
    spent = dict.fromkeys(TIMED, 0.0)
    sample: list[Outcome] = []
    for phase, (owner, name) in TIMED.items():
        setattr(owner, name, _timed(getattr(owner, name), spent, phase))
    opened = searching.open_engine
    searching.open_engine = lambda *args: _Sampling(opened(*args), sample)
    results: list[searching.SearchResult] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        wall = seconds(lambda: results.append(searching.search(config)))
    budget = Budget(config.trial.steps, config.trial.extend)
    spent["judge"] = trials * _judge_seconds(sample, budget) / cores()
    return {"wall": wall, **spent, "MB": results[0].peak.search, "worker MB": results[0].peak.worker}


def _timed(call: Any, spent: dict[str, float], phase: str) -> Any:
    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        spent[phase] += seconds(lambda: found.append(call(*args, **kwargs)))
        return found[0]

    return timed


class _Sampling:
    """An engine, some of whose outcomes are kept."""

    def __init__(self, engine: Engine, sample: list[Outcome]) -> None:
        self._engine, self._sample, self._seen = engine, sample, 0
        self.lanes, self.close = engine.lanes, engine.close

    def submit(self, job: Job) -> None:
        self._engine.submit(job)

    def collect(self) -> list[Outcome]:
        outcomes = self._engine.collect()
        self._sample += outcomes[-self._seen % SAMPLED :: SAMPLED]
        self._seen += len(outcomes)
        return outcomes


def _judge_seconds(outcomes: list[Outcome], budget: Budget) -> float:
    """Seconds a trial, asked at each checkpoint that it passed, as the workers do."""
    cut = [
        (_start(o.trace, end), o.baseline) for o in outcomes for end in budget.checkpoints() if end <= o.trace.steps_run
    ]

    def all_of_them() -> None:
        for trace, baseline in cut:
            judge(trace, baseline, budget)

    return seconds(all_of_them) / len(outcomes)


def _start(trace: Trace, steps: int) -> Trace:
    """A trace as it was after some steps."""
    columns = {name: getattr(trace, name)[:steps] for name in COLUMNS}
    bad = trace.first_bad if trace.first_bad is not None and trace.first_bad <= steps else None
    heldout = tuple(h for h in trace.heldout if h[0] <= steps)
    return replace(trace, **columns, first_bad=bad, heldout=heldout, steps_run=steps)


def rows(trials: int) -> Iterator[Row]:
    command = [sys.executable, __file__, f"--trials={trials}"]
    spent = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    wall = spent["wall"]
    peer = f"{wall:.1f} s in all"
    phases = [*TIMED, "judge"]
    total = sum(spent[phase] for phase in phases)
    note = f"{trials / wall:.0f} trials/s, width {WIDTH}; judging runs in the workers: a share of their time, measured after"
    name = f"not training, {trials:,} trials"
    yield Row(f"{name}: all", f"{total:.2f} s", peer, 100 * total / wall, MOST, at_most=True, unit=" %", note=note)
    for phase in phases:
        yield Row(f"  {phase}", f"{spent[phase]:.2f} s", peer, 100 * spent[phase] / wall, unit=" %")
    for key, whose in (("MB", "the process that searches"), ("worker MB", "the largest worker")):
        yield Row(f"  peak memory of {whose}", f"{spent[key]:.0f} MB", "-", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    print(json.dumps(spend(parser.parse_args().trials)))


if __name__ == "__main__":
    main()
