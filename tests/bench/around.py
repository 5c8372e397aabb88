"""What a long search spends on everything but training: asking, telling, recording, judging, reporting.

The trials' outcomes are those of some real trials, used over and over. A process of its own, for its peak memory:

    python around.py OUTCOMES.pickle --trials 10000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from end_to_end import study
from row import Row, seconds

from recipefuzz.config import parse_config
from recipefuzz.engines.job import Job, Outcome, run
from recipefuzz.trace import COLUMNS, Trace
from recipefuzz.verdict import Budget, judge

WIDTH, AHEAD = 64, 128  # as select.ask_ahead has it for two workers
MOST = 10.0  # percent of the training's wall time
PHASES = ("ask, tell", "record", "result_of", "judge", "report")


def real_outcomes(trials: int) -> tuple[list[Outcome], float]:
    """Of recipes picked at random, and the trials per second that the engine trained them at, started and warm."""
    from recipefuzz.engines.ahead import Ahead
    from recipefuzz.engines.select import open_engine
    from recipefuzz.targets.resolve import resolve

    config = parse_config(study(WIDTH, trials) | {"search": {"trials": trials, "sampler": "random"}})
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(_search(folder, config, 2 * trials)) as opened:
        recipes = [config.recipe_of(asked.values) for asked in opened.search.refill()]
    jobs = [Job(i, recipe, 0) for i, recipe in enumerate(recipes)]
    with contextlib.closing(open_engine(config, resolve(config), lambda _: None, Ahead())) as engine:
        list(run(engine, jobs[: trials // 4]))
        outcomes: list[Outcome] = []
        took = seconds(lambda: outcomes.extend(run(engine, jobs)))
    return outcomes, trials / took


class _search:  # noqa: N801 - a context, closed as a store is
    def __init__(self, folder: str, config, window: int) -> None:
        from recipefuzz.store import Store

        self._store = Store(Path(folder) / "journal", write=True)
        self.search = self._store.begin({}, config.axes, config.search, window)
        self.close = self._store.close


def spend(outcomes: list[Outcome], trials: int) -> dict[str, float]:
    """Seconds of each phase, and the peak memory of this process in MB."""
    from recipefuzz.report.ranked import rank_run
    from recipefuzz.report.write import write_reports
    from recipefuzz.result import Phase
    from recipefuzz.searching import to_result

    config = parse_config(study(WIDTH, trials))
    spent = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[phase] += time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder, contextlib.closing(_search(folder, config, AHEAD)) as opened:
        while True:
            with timed("ask, tell"):
                asked = opened.search.refill()
            if not asked:
                break
            for trial in asked:
                found = outcomes[trial.number % len(outcomes)]
                outcome = replace(found, job=Job(trial.number, config.recipe_of(trial.values), 0))
                with timed("result_of"):
                    result = to_result(config, outcome, Phase.SEARCH)
                with timed("record"):
                    opened.search.record(result)
        with timed("report"):
            ranked, winner = rank_run(config, opened.search.results)
            write_reports(Path(folder), config, opened.search.results, ranked, winner)
    spent["judge"] = trials * _judge_seconds(outcomes, Budget(config.trial.steps, config.trial.extend))
    return spent | {"MB": _peak_megabytes()}


def _peak_megabytes() -> float:
    """Of this process alone: `ru_maxrss` may begin with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


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


def rows(trials: int, sample: int) -> Iterator[Row]:
    outcomes, rate = real_outcomes(sample)
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(outcomes))
        file.flush()
        command = [sys.executable, __file__, file.name, f"--trials={trials}"]
        spent = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    training = trials / rate
    peer = f"{training:.0f} s of training"
    total = sum(spent[phase] for phase in PHASES)
    name = f"around the engine, {trials:,} trials"
    note = f"{rate:.0f} trials/s at width {WIDTH}; ours is one core's time, training both cores'"
    yield Row(f"{name}: all", f"{total:.1f} s", peer, 100 * total / training, MOST, at_most=True, unit=" %", note=note)
    for phase in PHASES:
        yield Row(f"  {phase}", f"{spent[phase]:.1f} s", peer, 100 * spent[phase] / training, unit=" %")
    yield Row("  peak memory", f"{spent['MB']:.0f} MB", "-", None, note="of the process that searches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("--trials", type=int, default=10_000)
    args = parser.parse_args()
    print(json.dumps(spend(pickle.loads(args.outcomes.read_bytes()), args.trials)))


if __name__ == "__main__":
    main()
