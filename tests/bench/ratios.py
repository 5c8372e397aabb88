"""How fast it is, as ratios to what a user could use instead; all in one run, on this machine.

    python tests/bench/ratios.py                                  # about half an hour on two cores
    python tests/bench/ratios.py --quick                          # two minutes: smaller everywhere, noisier
    python tests/bench/ratios.py --only steady,models
    python tests/bench/ratios.py --only end-to-end --full         # the peer runs all trials, too: an hour

Parts: `end-to-end` (a whole search from a cold start against baseline_optuna.py), `steady` (training alone against
JAX), `models` (each built-in model, fused against sequential, and what `auto` picks), `search` (of a long search, the
share of wall time that is not training, and its peak memory), `watch` (what `recipefuzz.watch` adds to a step).

Read the ratio, not the seconds: both sides ran one after the other on the same cores. Other work on the machine
falsifies it; the load before the run is printed. Of repeats the best counts. A dash is something that was not
measured, or that has no bar; the note says which. End to end, ours stops a trial once its verdict is known and the
peer at a NaN only: the steps a trial in the note tell how much of the ratio is that. A peer of a few dozen trials
(--peer-trials) is mostly start-up, which flatters ours; of fewer than ours but some hundred, its sampler is faster. Exit code 1 if a bar is not met. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import around
import end_to_end
import models
import steady
import watch_overhead
from rich.console import Console
from rich.table import Table
from row import Row

BASELINE = Path(__file__).resolve().parents[3] / "shared" / "bench" / "baseline_optuna.py"
BARS = {(64, 256): 8.0, (64, 4096): 20.0, (16, 4096): 40.0}  # width, trials
PARTS = ("end-to-end", "steady", "models", "search", "watch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--full", action="store_true", help="the peer runs as many trials as ours")
    parser.add_argument("--trials", help="of the end-to-end searches (default 256,4096; --quick: 256)")
    parser.add_argument("--peer-trials", type=int, help="of the peer at most (default 256)")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    return args


def measured(args: argparse.Namespace) -> Iterator[Row]:
    parts, quick = args.only.split(","), args.quick
    if "end-to-end" in parts:
        counts = [int(n) for n in (args.trials or ("256" if quick else "256,4096")).split(",")]
        cases = [(w, n, BARS.get((w, n))) for n in counts for w in ((64,) if quick else (64, 16))]
        most = sys.maxsize if args.full else args.peer_trials or 256
        jobs = (2,) if quick else end_to_end.JOBS
        yield from end_to_end.rows(args.baseline, cases, most, jobs, repeats=1 if quick else 2)
    if "steady" in parts:
        wanted = [(64, 32)] if quick else [(w, n) for w in (16, 64, 256) for n in (32, 64, 128)]
        yield from steady.rows(wanted, steps=80 if quick else steady.STEPS, repeats=3)
    if "models" in parts:
        names = models.QUICK if quick else tuple(case.name for case in models.CASES)
        yield from models.rows(names, rounds=1 if quick else models.ROUNDS)
    if "search" in parts:
        yield from around.rows(1000 if quick else 10_000)
    if "watch" in parts:
        yield from watch_overhead.rows(pairs=40 if quick else 200)


def main() -> int:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 200)
    load = os.getloadavg()[0]
    title = (
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before"
    )
    table = Table("work", "ours", "the peer", "ratio", "bar", "", "note", title=title)
    rows = []
    for row in measured(args):
        rows.append(row)
        table.add_row(*row.cells())
        print(*row.cells(), sep=" | ", file=sys.stderr)
    console.print(table)
    print(json.dumps({"load": load, "rows": [asdict(row) | {"met": row.met} for row in rows]}))
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
