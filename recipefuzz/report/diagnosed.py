"""A diagnosis for people: what, where, why and what mends it, in about ten lines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recipefuzz.diagnosis import Diagnosis, Fix, Root
from recipefuzz.recipe import Recipe, Scalar, shown
from recipefuzz.verdict import Label

LONGEST = 32  # operations of a loop's body that is told once
SHOWN = 3  # changes of the recipe beside the recommended one
STYLES: dict[str, str] = {Label.NAN: "bold red", Label.STALLED: "bold yellow", Label.CONVERGING: "bold green"}
NAMES = {Root.RECIPE: "the recipe", Root.CODE: "a bug in the code", Root.DATA: "the data"}


def diagnosed(found: Diagnosis, recipe: Mapping[str, Scalar], seed: int, threshold: str = "") -> RenderableType:
    """All that `recipefuzz diagnose` prints.

    Args:
        threshold: from where on the recipe fails, in words; empty where that was not asked.
    """
    table = Table.grid(padding=(0, 1))
    for name, text in _rows(found, threshold):
        if text:
            table.add_row("", Text(name, style="dim"), Text(text))
    table.add_row("", Text("recipe", style="dim"), Text(f"{_told(recipe)}, seed {seed}", style="dim"))
    return Group(_head(found), table)


def _told(recipe: Mapping[str, Scalar]) -> str:
    """The learning rate, and what is not as it is by default."""
    usual = Recipe().values()
    return ", ".join(f"{k} {shown(v)}" for k, v in recipe.items() if k == "lr" or v != usual.get(k))


def _head(found: Diagnosis) -> Text:
    if not found.cause:
        healthy = found.verdict == Label.CONVERGING
        text = f"{found.verdict}: nothing to mend" if healthy else found.verdict
        return Text(text, style=STYLES[Label.CONVERGING] if healthy else "bold")
    at = f" at step {found.step}" if found.step else ""
    blame = NAMES.get(Root(found.root), "") if found.root else ""
    name = found.verdict or "the held-out rows"
    return Text(f"{name}{at}: {found.cause}" + (f", {blame}" if blame else ""), style=STYLES.get(found.verdict, "bold"))


def _rows(found: Diagnosis, threshold: str) -> list[tuple[str, str]]:
    where = [found.where, found.phase and f"in the {found.phase}", found.module and f"module {found.module}"]
    route = _route([step.split(" at ")[0] for step in found.chain])
    return [
        ("where", ", ".join(w for w in where if w)),
        ("line", found.source),
        ("what", found.explanation),
        ("way", route if len(found.chain) > 1 else ""),
        ("from", threshold),
        *_mended(found),
    ]


def _route(steps: list[str]) -> str:
    """Operations in their order; what a loop repeats is told once: "(mm > add) x 70 > addmm"."""
    parts, at = [], 0
    while at < len(steps):
        spans = range(1, min(LONGEST, (len(steps) - at) // 2) + 1)
        loops = [(n, times) for n in spans if (times := _repeats(steps, at, n)) > 1]
        span, times = max(loops, key=lambda loop: (loop[0] * loop[1], -loop[0]), default=(1, 1))
        turn = _route(steps[at : at + span]) if times > 1 else steps[at]
        parts.append(turn if times == 1 else f"{turn} x {times}" if span == 1 else f"({turn}) x {times}")
        at += span * times
    return " > ".join(parts)


def _repeats(steps: list[str], start: int, span: int) -> int:
    """How many times in a row the steps of one turn come."""
    end = start + span
    while steps[end : end + span] == steps[start : start + span]:
        end += span
    return (end - start) // span


def elsewhere(found: Diagnosis) -> str:
    """What mends a failure that is not the recipe's."""
    return f"no recipe fixes it; in the {found.root}: {found.advice}" if found.advice else "no recipe fixes it"


def _mended(found: Diagnosis) -> list[tuple[str, str]]:
    if not found.cause:
        return []
    if found.root != Root.RECIPE:
        return [("fix", elsewhere(found))]
    if found.fix is None:
        text = f"none of {len(found.fixes)} changes of the recipe that were run converges on every seed"
        finite = [f for f in found.fixes if f.verdict != Label.NAN]
        nearly = max(found.fixes, key=lambda f: f.converged / f.seeds, default=None)
        if nearly and nearly.converged:
            text += f"; the nearest: {_fix(nearly)}"
        elif found.verdict == Label.NAN and finite:
            text += f"; {len(finite)} stay finite, the smallest: {finite[0].change}"
        return [("fix", text)]
    others = [f for f in found.fixes if f.works and f is not found.fix][:SHOWN]
    failed = sum(f.verdict != Label.CONVERGING for f in found.fixes)
    also = "; ".join(map(_fix, others))
    tried = f"{failed} of {len(found.fixes)} changes that were run don't help" if failed else ""
    return [("fix", _fix(found.fix)), ("or", also), ("tried", tried)]


def _fix(fix: Fix) -> str:
    skill = f", skill {fix.skill:.2f}" if fix.skill is not None else ""
    return f"{fix.change} ({fix.converged} of {fix.seeds} seeds converge{skill})"
