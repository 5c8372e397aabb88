"""The CSV files of a run. Their columns are a contract: in the README, and only ever appended to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from recipefuzz.atomic import write_atomically
from recipefuzz.diagnosis import Diagnosis
from recipefuzz.ranking import Ranked
from recipefuzz.report.failures import Bucket
from recipefuzz.result import ERROR, TrialResult

TRIAL_COLUMNS = (
    "verdict",
    "cause",
    "skill",
    "score",
    "heldout_skill",
    "loss",
    "baseline",
    "steps",
    "first_bad",
)
TRIAL_TAIL = ("seconds", "reason")
VERDICT_COLUMNS = ("verdict", "cause", "skill", "steps", "reason")
RANKING_COLUMNS = (
    "safe",
    "passed",
    "runs",
    "pass_low",
    "pass_high",
    "skill",
    "heldout_skill",
    "steps",
    "score",
)
FAILURE_COLUMNS = ("cause", "verdict", "trials", "share", "where", "example_trial", "reason")
DIAGNOSIS_COLUMNS = ("root", "phase", "op", "module", "file", "line", "explanation")  # of the example; then its fix


def trials_frame(results: Iterable[TrialResult], axes: Sequence[str]) -> pd.DataFrame:
    """One row a finished trial: number, phase, seed, a column per axis, then what came of it."""
    columns = ["trial", "phase", "seed", *axes, *TRIAL_COLUMNS, *TRIAL_TAIL]
    frame = pd.DataFrame([_trial_row(r, axes) for r in results], columns=columns, dtype=object)
    return _typed(frame, axes).astype({"first_bad": "Int64"})


def _typed(frame: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Give columns their own types, but for axes of integers and nulls: pandas would make 16 into 16.0."""
    mixed = [a for a in axes if int in (types := set(map(type, frame[a]))) and len(types) > 1]
    return frame.astype({c: dtype for c, dtype in frame.infer_objects().dtypes.items() if c not in mixed})


def _trial_row(result: TrialResult, axes: Sequence[str]) -> dict[str, object]:
    own = {name: getattr(result, name) for name in ("seed", *TRIAL_COLUMNS, "seconds")}
    head = {"trial": result.trial, "phase": str(result.phase)}
    verdict = {"verdict": result.verdict or ERROR, "reason": result.error or result.reason}
    return head | own | verdict | {axis: result.values.get(axis) for axis in axes}


def ranking_frame(ranking: Sequence[Ranked], axes: Sequence[str]) -> pd.DataFrame:
    """One row a recipe that converged in the search, best first."""
    rows = [
        {"rank": rank, "trial": row.trial.trial}
        | {axis: row.trial.values.get(axis) for axis in axes}
        | {name: getattr(row, name) for name in RANKING_COLUMNS if hasattr(row, name)}
        | {"pass_low": round(row.low, 4), "pass_high": round(row.high, 4), "score": row.trial.score}
        for rank, row in enumerate(ranking, start=1)
    ]
    return _typed(pd.DataFrame(rows, columns=["rank", "trial", *axes, *RANKING_COLUMNS], dtype=object), axes)


def failures_frame(buckets: Sequence[Bucket]) -> pd.DataFrame:
    """One row a bucket of failing trials, the largest first."""
    rows = [
        (b.cause, b.verdict, b.trials, round(b.share, 4), b.where, b.example.trial, b.reason)
        + tuple(getattr(b.diagnosis, name) or None for name in DIAGNOSIS_COLUMNS if b.diagnosis)
        + ((_fix(b.diagnosis),) if b.diagnosis else (None,) * (len(DIAGNOSIS_COLUMNS) + 1))
        for b in buckets
    ]
    frame = pd.DataFrame(rows, columns=[*FAILURE_COLUMNS, *DIAGNOSIS_COLUMNS, "fix"])
    return frame.astype({"line": "Int64"})


def _fix(found: Diagnosis) -> str | None:
    """The change of the recipe that was seen to work; what to do about code and data."""
    return found.fix.change if found.fix else found.advice or None


def verdicts_frame(recipes: pd.DataFrame, results: Sequence[TrialResult]) -> pd.DataFrame:
    """The recipes as they were given, a row each in the same order, with their verdicts."""
    found = pd.DataFrame(
        [(r.verdict or ERROR, r.cause, r.skill, r.steps, r.error or r.reason) for r in results],
        columns=list(VERDICT_COLUMNS),
        index=recipes.index,
    )
    return recipes.drop(columns=[c for c in VERDICT_COLUMNS if c in recipes]).join(found)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table. Null is an empty cell; numbers keep all their digits, so a recipe can be run again."""
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))
