"""A queue of workers at one log: who trains, who waits, and how long, by the events of a simulated clock."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from recipefuzz.working import Pace


@dataclass(frozen=True)
class Service:
    """What a turn takes, in seconds.

    Attributes:
        alone: a turn with the log, for nobody else meanwhile; and
        each: so much more for each trial after the first.
        beside: of the worker's time, while others have their turns.
        polls: pauses of those who wait between looks whether the log is free: the first, their growth, the longest. None
            if the log wakes the next in the row.
    """

    alone: float
    each: float
    beside: float
    polls: tuple[float, float, float] | None


@dataclass(frozen=True)
class Found:
    """Attributes: busy: the share of the workers' time in which they train; trials and turns a second."""

    busy: float
    trials: float
    turns: float


def simulate(service: Service, workers: int, mean: float, *, batches: bool, cycles: int = 12, seed: int = 0) -> Found:
    """Workers that train one trial after the other.

    The worst case: nothing is trained while a worker waits for its turn. Trials take exponential times (the share
    of short ones is large, as where recipes diverge early), so turns come at random.

    Args:
        mean: seconds of a trial.
        batches: turns as `working.Pace` has them, which come the less often the longer they take, for more trials
            each; not one for each trial.
        cycles: of a pause and its turn that each worker makes about, the first third of which is not counted.
    """
    numbers, pace = random.Random(seed), Pace(1, 1)
    horizon = cycles * max(pace.pause(0.0) if batches else 0.0, mean + service.beside, workers * service.alone)
    start = horizon / 3
    queue = [(numbers.uniform(0, mean), n, "done") for n in range(workers)]  # they came one by one
    heapq.heapify(queue)
    line = _Line(service.polls, numbers)
    held, came, pauses = [1] * workers, [0.0] * workers, [0.0] * workers
    trained = trials = turns = 0.0
    while queue:
        now, who, what = heapq.heappop(queue)
        if now > horizon:
            break
        if what == "done":
            came[who] = now
            heapq.heappush(queue, (now + service.beside, who, "want"))
            continue
        if (retry := line.enter(now, who, pauses)) is not None:
            heapq.heappush(queue, (retry, who, "want"))
            continue
        left = line.serve(now, service.alone + service.each * (held[who] - 1))
        pauses[who] = 0.0
        pause = pace.pause(left - came[who])
        size = pace.room(1 / mean, left - came[who]) if batches else 1
        spent, done = 0.0, 0
        while done < size and spent < pause:
            spent += numbers.expovariate(1 / mean)
            done += 1
        held[who] = done
        heapq.heappush(queue, (left + spent, who, "done"))
        inside = max(0.0, min(left + spent, horizon) - max(left, start))
        trained += inside
        trials += done * inside / spent
        turns += left > start
    span = horizon - start
    return Found(trained / (workers * span), trials / span, turns / span)


class _Line:
    """The lock: one has it at a time; the others look again, or are in a row."""

    def __init__(self, polls: tuple[float, float, float] | None, numbers: random.Random) -> None:
        self._polls, self._numbers, self._free = polls, numbers, 0.0

    def enter(self, now: float, who: int, pauses: list[float]) -> float | None:
        """When to look again; None if it is this one's turn."""
        if self._polls is None or now >= self._free:
            return None
        first, growth, longest = self._polls
        pauses[who] = min(longest, pauses[who] * growth) if pauses[who] else first
        return now + pauses[who] * self._numbers.uniform(0.9, 1.1)

    def serve(self, now: float, seconds: float) -> float:
        """When its turn ends, that comes now or after those before it in the row."""
        self._free = max(now, self._free) + seconds
        return self._free


def least_mean(service: Service, workers: int, share: float) -> float:
    """Seconds of a trial from which on workers with a turn for each train for that share of their time, within 10 %."""
    low, high = 0.001, 1000.0
    while high / low > 1.1:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if simulate(service, workers, middle, batches=False).busy >= share else (middle, high)
    return high
