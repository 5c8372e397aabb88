"""Training alone, once all is compiled and warm: our lanes against JAX's, both cores busy."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from row import Row

STEPS, CHUNK = 200, 40  # of a trial; of one call, about what the engine trains between two checkpoints
SIZES = (8, 16, 32, 64)  # lanes in each process that the engine chooses among, see plan.TRIED_LANES
PROCESSES = 2
_barrier: Any = None


def _enter(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _train(width: int, lanes: int, steps: int, repeats: int) -> list[float]:
    """Seconds of each repeat, all lanes of this process; the other process runs at the same time."""
    import torch

    from recipefuzz.config import parse_config
    from recipefuzz.engines import prepare
    from recipefuzz.engines.job import Job
    from recipefuzz.engines.lanes import Lanes
    from recipefuzz.engines.memory import keep_freed_memory
    from recipefuzz.engines.probe import probed
    from recipefuzz.engines.program import Start
    from recipefuzz.targets.resolve import resolve

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    model = {"data": "digits", "model": "mlp", "model_args": {"width": width, "depth": 3}}
    config = parse_config({"target": model, "recipe": {"optimizer": "momentum", "clip_norm": 1}})
    task, device, recipe = resolve(config), torch.device("cpu"), config.default_recipe()
    rows: Any = prepare.rows_for(task, recipe)[0]
    many = Lanes(probed(task, recipe, rows, device), rows)
    rates = torch.logspace(-3, -1, lanes).tolist()
    start = Start.of(prepare.build_model(task, recipe, device))
    many.replace([], [Job(i, recipe.but(lr=rate), 0) for i, rate in enumerate(rates)], [start] * lanes)
    orders = [prepare.BatchOrder(len(rows), recipe.batch_size, seed).draw(steps, device) for seed in range(lanes)]
    order_of = lambda job, first, last: orders[job.key].roll(-first, 0)[: last - first]  # noqa: E731
    many.run(CHUNK, order_of)
    times = []
    for _ in range(repeats):
        _barrier.wait()
        started = time.perf_counter()
        for _ in range(steps // CHUNK):
            many.run(CHUNK, order_of)
        times.append(time.perf_counter() - started)
    return times


def ours(width: int, lanes: int, steps: int, repeats: int) -> float:
    """Seconds a trial, two processes of so many lanes each."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, _enter, (context.Barrier(PROCESSES),)) as pool:
        times = pool.starmap(_train, [(width, lanes, steps, repeats)] * PROCESSES, chunksize=1)
    return min(map(max, zip(*times, strict=True))) / (PROCESSES * lanes) * STEPS / steps


def jax(width: int, lanes: int, steps: int, repeats: int, processes: int) -> float:
    """Seconds a trial, all lanes in one process with a thread a core, or split over processes with a core each."""
    command = [sys.executable, str(Path(__file__).with_name("jax_lanes.py")), f"--width={width}", f"--steps={steps}"]
    command += [f"--lanes={lanes // processes}"]
    cores = sorted(os.sched_getaffinity(0))[:processes] if processes > 1 else [-1]
    # the barrier is a line on stdin: each waits for it, compiled and warm
    running = [subprocess.Popen([*command, f"--core={core}"], text=True, stdin=-1, stdout=-1) for core in cores]
    times = []
    try:
        if any(p.stdout.readline() != "ready\n" for p in running):  # type: ignore[union-attr]
            raise RuntimeError("jax_lanes.py failed")
        for _ in range(repeats):
            for process in running:
                print(file=process.stdin, flush=True)
            times.append(max(float(p.stdout.readline()) for p in running))  # type: ignore[union-attr]
    finally:
        for process in running:
            process.communicate()
    return min(times) / lanes * STEPS / steps


def rows(cases: list[tuple[int, int]], steps: int, repeats: int) -> Iterator[Row]:
    """A row for each (width, lanes in all)."""
    for width in dict.fromkeys(width for width, _ in cases):
        wanted = [lanes for w, lanes in cases if w == width]
        sizes = [size for size in SIZES if size <= max(wanted) // PROCESSES]
        known = {size: ours(width, size, steps, repeats) for size in sizes}
        for lanes in wanted:
            mine, size = min((known[s], s) for s in sizes if s <= lanes // PROCESSES)
            name = f"training alone, width {width}, {lanes} lanes"
            shown, note = f"{1e3 * mine:.2f} ms/trial", f"ours: {PROCESSES} processes of {size} lanes"
            if importlib.util.find_spec("jax") is None:
                yield Row(name, shown, "-", None, 1.0, note="JAX is not installed: pip install jax")
                continue
            for processes, split in ((1, "one process"), (PROCESSES, f"{PROCESSES} processes, a core each")):
                theirs = jax(width, lanes, steps, repeats, processes)
                yield Row(
                    f"{name}, JAX in {split}", shown, f"{1e3 * theirs:.2f} ms/trial", theirs / mine, 1.0, note=note
                )
