"""What engines take and give: a job in, an outcome out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from recipefuzz.recipe import Recipe
from recipefuzz.trace import Trace
from recipefuzz.verdict import Verdict

# optimizers of one family differ in numbers only, see `lane_updates`
FAMILIES = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam", "rmsprop": "rmsprop"}

# axes that are columns of the batched program: recipes of one structure may differ in them
NUMBERS = ("lr", "init_scale", "clip_norm", "clip_value", "weight_decay", "warmup_steps")


@dataclass(frozen=True)
class Job:
    """One trial to run.

    Attributes:
        key: the caller's name for it, handed back with the outcome.
        whole: run the whole short budget even where the verdict is evident before: skills of different recipes are
            then compared at the same step, and a NaN that comes late is seen.
    """

    key: int
    recipe: Recipe
    seed: int
    whole: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a trace with its verdict, or an error with its reason.

    Attributes:
        baseline: loss of the best constant predictor for this recipe's scaling of the targets.
        seconds: time it took where it ran.
        peak: MB that the worker process that ran it has held at most; 0 where it ran in this process.
    """

    job: Job
    trace: Trace
    verdict: Verdict | None
    baseline: float = float("nan")
    error: str = ""
    seconds: float = 0.0
    peak: int = 0


def structure(recipe: Recipe) -> Hashable:
    """What of a recipe decides which operations are launched: lanes of one program are alike in it."""
    family, scaling = FAMILIES[recipe.optimizer], (recipe.input_norm, recipe.target_norm)
    return (recipe.norm, family, recipe.precision, recipe.batch_size, scaling, recipe.extra)


def once(say: Callable[[str], None]) -> Callable[[str, str], None]:
    """`say(line)` as a function of a reason and a line, which says one line for each reason."""
    known: set[str] = set()

    def note(reason: str, line: str) -> None:
        if reason not in known:
            known.add(reason)
            say(line)

    return note


def described(recipe: Recipe) -> str:
    """What tells a recipe's structure from the default one, in words for the user."""
    usual = Recipe(batch_size=recipe.batch_size).values()
    values = {n: v for n, v in recipe.values().items() if n not in NUMBERS and (n not in usual or v != usual[n])}
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "the default structure"


class Engine(Protocol):
    """Trains jobs, many at a time. Jobs may be submitted while others are under way."""

    @property
    def lanes(self) -> int:
        """Trials that are trained side by side in each process; 0 where it is one by one."""
        ...

    def submit(self, job: Job) -> None: ...

    def collect(self) -> list[Outcome]:
        """Wait until at least one submitted job is done; return those that are. Empty if none is left."""
        ...

    def close(self) -> None: ...


def run(engine: Engine, jobs: Iterable[Job]) -> Iterator[Outcome]:
    """All of `jobs`, in the order in which they finish."""
    for job in jobs:
        engine.submit(job)
    while outcomes := engine.collect():
        yield from outcomes
