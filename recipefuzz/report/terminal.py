"""What a finished run prints: the picture, the best recipes, what fails most and why, where the files are."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from recipefuzz.config import Config
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.peak import Peak
from recipefuzz.ranking import Ranked
from recipefuzz.recipe import shown
from recipefuzz.report.diagnosed import elsewhere
from recipefuzz.report.failures import Bucket, buckets
from recipefuzz.report.grid_map import grid_map
from recipefuzz.report.picture import picture, sparkline
from recipefuzz.result import Phase, TrialResult

TOP = 8
FAILURES = 5
LOG_WIDTH = 140
PLAIN: dict[str, Any] = {
    "highlight": False,
    "markup": False,
    "emoji": False,
}  # the user's words, such as [relu], as they are


def summary(
    folder: Path,
    config: Config,
    results: Sequence[TrialResult],
    ranking: Sequence[Ranked],
    diagnoses: Mapping[int, Diagnosis],
    peak: Peak,
) -> RenderableType:
    """Everything that is printed at the end of a search."""
    searched = [r for r in results if r.phase is Phase.SEARCH]
    parts: list[RenderableType] = []
    if searched:
        parts += [*_pictures(searched, config), ""]
    parts += [
        _verdict_line(ranking),
        *_top(ranking, config),
        *_failures(results, config, diagnoses),
        "",
        _files(folder),
    ]
    if peak.search:
        parts.append(Text(f"peak memory: {peak}", style="dim"))
    return Group(*parts)


def _pictures(searched: Sequence[TrialResult], config: Config) -> list[RenderableType]:
    if config.search.sampler != "grid":
        return [picture(searched, config.axes)]
    points = config.search.grid_points
    lines, drawn = picture(searched, config.axes, points), grid_map(searched, config.axes, points)
    return [lines, "", drawn] if drawn else [lines]


def _verdict_line(ranking: Sequence[Ranked]) -> Text:
    safe = [r for r in ranking if r.safe]
    if safe:
        noun = "recipe" if len(safe) == 1 else "recipes"
        return Text(f"{len(safe)} safe {noun} (✓): converging on every confirming seed", style="bold green")
    if not ranking:
        return Text("no recipe converged", style="bold red")
    if all(r.runs == 0 for r in ranking):
        return Text(f"converged, but confirmed on no other seeds: {len(ranking)}", style="bold yellow")
    return Text("no recipe converged on every confirming seed", style="bold red")


def _top(ranking: Sequence[Ranked], config: Config) -> list[RenderableType]:
    if not ranking:
        return []
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = config.axes.names
    for column in ("", *names, "passed", "skill", "held-out", "loss", "trial"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for place, row in enumerate(ranking[:TOP], start=1):
        passed = f"{row.passed}/{row.runs}" if row.runs else "-"
        table.add_row(
            f"{'✓' if row.safe else ' '} {place}",
            *(shown(row.trial.values[n]) for n in names),
            passed,
            _number(row.skill),
            _number(row.heldout_skill),
            Text(sparkline(row.trial.curve), style="green"),
            str(row.trial.trial),
            style="" if row.safe else "dim",
        )
    more = [Text(f"and {len(ranking) - TOP} more in ranking.csv", style="dim")] if len(ranking) > TOP else []
    return [table, *more, *_overfits(ranking[0])]


def _overfits(best: Ranked) -> list[RenderableType]:
    """A warning where the winner learned its training rows and not the rest (skill apart by more than half)."""
    if not math.isfinite(best.heldout_skill) or best.skill - best.heldout_skill < 0.5:
        return []
    text = "the winner does much better on training rows than on held-out ones; search: {rank_by: heldout_skill}"
    return [Text(text, style="yellow")]


def _failures(
    results: Sequence[TrialResult], config: Config, diagnoses: Mapping[int, Diagnosis]
) -> list[RenderableType]:
    found = buckets(results, config.axes, diagnoses)
    if not found:
        return []
    lines: list[RenderableType] = ["", Text("what fails", style="bold")]
    for bucket in found[:FAILURES]:
        example = (
            f"trial {bucket.example.trial}, diagnosed"
            if bucket.is_diagnosed
            else f"such as trial {bucket.example.trial}"
        )
        lines += [
            Text(f"  {bucket}"),
            Text(f"      {example}: {bucket.reason}", style="dim"),
            *([Text(f"      fix: {fix}")] if (fix := _fix(bucket)) else []),
        ]
    if len(found) > FAILURES:
        lines.append(Text(f"  and {len(found) - FAILURES} more kinds in failures.csv", style="dim"))
    return lines


def _fix(bucket: Bucket) -> str:
    """What was seen to mend the representative, or what to do about code and data."""
    found = bucket.diagnosis
    if found is None or not found.cause:
        return ""
    if found.root != Root.RECIPE:
        return elsewhere(found)
    fix = found.fix
    return f"{fix.change} ({fix.converged} of {fix.seeds} seeds converge)" if fix else ""


def _files(folder: Path) -> Text:
    names = [n for n in ("recipe.yaml", "ranking.csv", "trials.csv", "failures.csv") if (folder / n).exists()]
    return Text(f"files in {short_path(folder)}: {', '.join(names)}", style="dim")


def short_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return min(relative, str(path), key=len)


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def drawing(shown: RenderableType, title: str) -> str:
    """What the terminal shows as an SVG picture, without rich's fonts from the network."""
    paper = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, **PLAIN)
    paper.print(shown)
    return re.sub(r"@font-face \{.*?\}", "", paper.export_svg(title=title), flags=re.DOTALL)


def console() -> Console:
    """Colours and width of the terminal; no wrapping in a batch job's log."""
    screen = Console(**PLAIN)
    return screen if screen.is_terminal else Console(width=LOG_WIDTH, **PLAIN)
