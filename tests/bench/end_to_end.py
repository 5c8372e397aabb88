"""A whole study by the command line, from a cold start, against what a careful user writes with Optuna."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from row import Row, seconds

STEPS, JOBS = 300, (1, 2)
REPEATED = 256  # trials up to which a search is repeated
NO_SAFE_RECIPE = 1  # an exit code that is an answer: with confirm.top 0, nothing is confirmed


def study(width: int, trials: int) -> dict:
    """The space, the model and the seed of baseline_optuna.py."""
    return {
        "study": "bench",
        "target": {"data": "digits", "model": "mlp", "model_args": {"width": width, "depth": 3}},
        "space": {
            "lr": {"low": 1e-5, "high": 10, "log": True},
            "init_scale": {"low": 0.01, "high": 30, "log": True},
            "norm": ["none", "batch", "layer"],
            "clip_norm": [None, 1, 5, 10, 15],
        },
        "recipe": {"optimizer": "momentum"},
        "trial": {"steps": STEPS, "batch_size": 64, "seed": 0},
        "search": {"trials": trials, "sampler": "tpe", "confirm": {"top": 0}, "diagnose": 0},
    }


def ours(width: int, trials: int) -> tuple[float, str]:
    """Seconds of one process, from its start to its end; how long its trials were."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench.yaml").write_text(json.dumps(study(width, trials)))
        command = [sys.executable, "-m", "recipefuzz", "search", "bench.yaml"]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        wall = time.perf_counter() - started
        if done.returncode not in (0, NO_SAFE_RECIPE):
            raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
        with (Path(folder) / "runs" / "bench" / "trials.csv").open() as file:
            rows = list(csv.DictReader(file))
    if len(rows) != trials or any(row["verdict"] == "error" for row in rows):
        raise RuntimeError(f"{len(rows)} trials of {trials}, {sum(row['verdict'] == 'error' for row in rows)} errors")
    return wall, f"{sum(int(row['steps']) for row in rows) / trials:.0f} steps a trial"


def peer(baseline: Path, width: int, trials: int, jobs: int) -> float:
    """Seconds of the whole process."""
    sizes = ["--trials", str(trials), "--steps", str(STEPS), "--width", str(width), "--jobs", str(jobs)]
    command = [sys.executable, str(baseline), *sizes]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def rows(
    baseline: Path, cases: list[tuple[int, int, float | None]], peer_trials: int, jobs: tuple[int, ...], repeats: int
) -> Iterator[Row]:
    """A row a case.

    Args:
        cases: width, trials, bar.
        peer_trials: the peer runs as many at most; the more it runs, the slower its sampler gets.
        repeats: of short searches, ours and the peer's; the least time counts.
    """
    known: dict[tuple[int, int], tuple[float, int]] = {}
    for width, trials, bar in cases:
        wall, steps = min(ours(width, trials) for _ in range(repeats if trials <= REPEATED else 1))
        name, mine = f"search, width {width}, {trials:,} trials, cold", trials / wall
        shown = f"{mine:.1f} trials/s ({wall:.1f} s)"
        if not baseline.is_file():
            yield Row(name, shown, "-", None, bar, note=f"no {baseline}")
            continue
        count = min(trials, peer_trials)
        if (width, count) not in known:
            tries = jobs * (repeats if count <= REPEATED else 1)
            known[width, count] = max((count / peer(baseline, width, count, j), j) for j in tries)
        rate, best = known[width, count]
        note = f"{steps}, {STEPS} the peer's or up to NaN" + (f"; peer on {count:,} trials" if count < trials else "")
        peers = f"{rate:.2f} trials/s (jobs {best})"
        yield Row(name, shown, peers, mine / rate, bar, note=f"confirm.top 0, diagnose 0; {note}")
