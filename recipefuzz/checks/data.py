"""The data: values that are not finite, columns that say nothing, scales, labels, rows in both sets."""

from __future__ import annotations

from collections.abc import Iterator

from recipefuzz.checks.data_columns import column_problems, scale_problems
from recipefuzz.checks.data_labels import label_problems
from recipefuzz.checks.data_overlap import shared_rows
from recipefuzz.checks.data_parts import Part, Problem, part_of
from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.finding import Finding, Level
from recipefuzz.targets.seeding import seeded

NAME = "data"


def check(patient: Patient) -> list[Finding]:
    """Look at inputs and targets of both sets."""
    with seeded(0):
        train, test = part_of(patient.task.train), part_of(patient.task.test)
        problems = list(_problems(patient, train, test))
    found = [Finding(NAME, p.level, p.seen, p.todo, evidence=p.evidence) for p in problems if p.level != Level.PASS]
    if found:
        return found
    told = [f"{_size(train)} training rows, {_size(test)} held-out", *(p.seen for p in problems)]
    return [
        Finding(NAME, Level.PASS, "; ".join(told), evidence={k: v for p in problems for k, v in p.evidence.items()})
    ]


def _size(part: Part) -> str:
    return f"{part.total}" if part.whole else f"{part.total} ({len(part)} read)"


def _problems(patient: Patient, train: Part, test: Part) -> Iterator[Problem]:
    yield from _not_finite(patient)
    yield from _types(train, test)
    yield from column_problems(train)
    yield from scale_problems(patient, train)
    yield from label_problems(patient.task.loss_kind, train, test)
    yield from shared_rows(train, test)


def _not_finite(patient: Patient) -> Iterator[Problem]:
    harmful = harmful_rows(patient.task, patient.recipe, patient.seed)
    known = True  # they are tried in this order, up to the first that does harm
    for finding in patient.task.non_finite:
        seen, evidence = f"{finding}: {finding.found}", {"not_finite": finding.count, "row": finding.row}
        if finding == harmful:
            yield Problem(Level.FAIL, seen, "drop or fill those rows in load()", evidence)
            known = False
        elif known:
            yield Problem(Level.PASS, f"{seen}, which do no harm: model or loss leaves them out", "", evidence)
        else:
            yield Problem(Level.WARN, seen, "look whether model or loss leaves them out", evidence)


def _types(train: Part, test: Part) -> Iterator[Problem]:
    for letter, one, other in (("x", train.x, test.x), ("y", train.y, test.y)):
        if one is None or other is None:
            continue
        if one.dtype != other.dtype:
            seen = f"{letter}_train is {_kind(one.dtype)}, {letter}_test is {_kind(other.dtype)}"
            yield Problem(Level.WARN, seen, "give both sets one type in load()")
        if one.shape[1:] != other.shape[1:]:
            shapes = f"{tuple(one.shape[1:])}, of {letter}_test {tuple(other.shape[1:])}"
            seen = f"rows of {letter}_train have the shape {shapes}"
            yield Problem(Level.WARN, seen, "look at the split in load(): the two sets should look alike")
        if str(one.dtype) == "torch.float64":
            seen = f"{letter}_train is float64: models are float32 unless told otherwise"
            yield Problem(Level.WARN, seen, f"{letter} = {letter}.float() in load()")
    if train.x is not None and str(train.x.dtype) == "torch.uint8":
        seen = "x_train is uint8, which neither input_norm nor a layer other than an embedding takes"
        yield Problem(Level.WARN, seen, "x = x.float() / 255 in load()")


def _kind(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
