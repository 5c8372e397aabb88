"""A ladder for people: predictions after each rung, and at the end where to look."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recipefuzz.engines.predictions import Kind, Predictions
from recipefuzz.recipe import shown
from recipefuzz.report.checked import checked
from recipefuzz.report.terminal import short_path
from recipefuzz.run_folder import RunFolder
from recipefuzz.rung import Rung


def climbed(rung: Rung) -> RenderableType:
    """One rung: its checks, the best recipe, and what the model trained by it really says."""
    parts: list[RenderableType] = [checked(finding) for finding in rung.findings]
    if rung.winner is None:
        return Group(*parts, Text(f"✗ {rung.name}: {rung.failure}", style="bold red"), "")
    values = ", ".join(f"{name} {shown(rung.winner.trial.values[name])}" for name in rung.config.axes.names)
    parts.append(Text(f"✓ {rung.name}: {values}", style="green"))
    if rung.shown is not None:
        parts.append(predicted(rung.shown))
    return Group(*parts, "")


def predicted(found: Predictions) -> RenderableType:
    """What the model says, beside what is true."""
    if found.kind is Kind.TEXT:
        return Text.assemble(("  sampled: ", "dim"), (f"{found.prompt}|", "dim"), (found.sampled, "bold"))
    if found.kind is Kind.NONE:
        return Text("  no predictions to show: the model's output or the target is no single tensor", style="dim")
    table = Table.grid(padding=(0, 1))
    whole = found.kind is Kind.CLASSES
    for name, values in (("predicted", found.predicted), ("true", found.true)):
        table.add_row(Text(f"  {name}", style="dim"), *(f"{v:.0f}" if whole else f"{v:.3g}" for v in values))
    if not whole:
        return table
    right = sum(a == b for a, b in zip(found.predicted, found.true, strict=True))
    return Group(table, Text(f"  {right} of {len(found.true)} held-out rows right", style="dim"))


def summary(rungs: Sequence[Rung]) -> RenderableType:
    """The rungs that were climbed, and the first that fails."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("", "rung", "checks", "converge", "skill", "held-out", "files"):
        table.add_column(column)
    for rung in rungs:
        mark = Text("✓", style="green") if rung.winner else Text("✗", style="bold red")
        skills = (rung.winner.skill, rung.winner.heldout_skill) if rung.winner else (math.nan, math.nan)
        table.add_row(
            mark,
            f"{rung.number} {rung.name}",
            rung.checks,
            f"{rung.converging} of {len(rung.trials)}" if rung.trials else "-",
            *(f"{skill:.3f}" if math.isfinite(skill) else "-" for skill in skills),
            short_path(RunFolder.of(rung.config).path) if rung.trials else "-",
        )
    last = rungs[-1]
    if last.winner:
        return Group(table, Text(f"all {last.of} rungs hold: each has a safe recipe", style="bold green"))
    where = Text(f"look at rung {last.number} of {last.of}, {last.name}: {last.failure}", style="bold red")
    return Group(table, where, Text(f"  {_advice(last)}"))


def _advice(rung: Rung) -> str:
    if rung.number == 1:
        return "the simplest model fails already: look at the data, the loss and the space before any larger model"
    return f"rung {rung.number - 1} holds on the same data and loss: look at what this model adds, or widen the space"
