"""Findings of the preflight checks for people: a line each, and what belongs to it below."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recipefuzz.finding import Finding, Level

MARKS = {Level.PASS: ("✓", "green"), Level.WARN: ("!", "yellow"), Level.FAIL: ("✗", "bold red")}
INDENT = " " * 4


def checked(finding: Finding) -> RenderableType:
    """One finding."""
    mark, style = MARKS[finding.level]
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(mark, style=style), Text(f"{finding.check}:", style=style), Text(finding.seen))
    if finding.todo:
        table.add_row("", "", Text(finding.todo, style="bold"))
    return Group(table, *(Text(INDENT + line) for line in finding.lines))
