"""Where a run stands, read from its store without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from recipefuzz.config import Config
from recipefuzz.errors import shorten
from recipefuzz.ranking import confirming_runs
from recipefuzz.recipe import shown
from recipefuzz.report.picture import COLORS, outcome
from recipefuzz.report.ranked import rank_run
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder
from recipefuzz.sampling import total

SHOWN = ("job", "node", "gpus", "holds", "since")  # of what a worker tells of itself


def status_lines(folder: RunFolder, *, queued: bool = False, again: str = "search") -> Iterator[str]:
    """Counts by verdict, throughput, what is left, the best so far: a line each.

    Args:
        queued: whether a cluster has jobs of the run that will go on with it.
        again: the command that goes on with it otherwise.
    """
    config = folder.load_config()
    results, elapsed, peak = folder.read(config)
    searched = [r for r in results if r.phase is Phase.SEARCH]
    confirming = [r for r in results if r.phase is Phase.CONFIRM]
    yield f"{config.study}: {_state(folder, config, searched, confirming, queued, again)}"
    yield f"  search   {len(searched)} of {total(config.search, config.axes)} trials: {_counts(searched)}"
    yield f"  confirm  {len(confirming)} of {_wanted(config, searched)} runs: {_counts(confirming)}"
    if searched and elapsed > 0:
        yield f"  speed    {len(searched) / elapsed:.2f} trials/s over {elapsed:.0f} s of search"
    yield from _workers(folder, config)
    if peak.search:
        yield f"  memory   at its peak {peak}"
    ranking, _ = rank_run(config, results)
    if ranking:
        top = ranking[0]
        values = ", ".join(f"{n} {shown(top.trial.values[n])}" for n in config.axes.names)
        yield f"  best     trial {top.trial.trial}: {values}; skill {top.skill:.3f}, passed {top.passed}/{top.runs}"


def _workers(folder: RunFolder, config: Config) -> Iterator[str]:
    """Of a shared run: who is at work, and who has been silent for so long that the others take its trials."""
    for name, beat in sorted(folder.workers(config).items()) if folder.is_shared(config) else ():
        about = ", ".join(
            f"{key} {shorten(value)}" for key, value in beat.about.items() if key in SHOWN and value != ""
        )
        silent = f"silent for {beat.silent:.0f} s: counts as gone" if beat.silent > config.run.lease else "at work"
        yield f"  worker   {shorten(name)}: {silent}; {about}"


def _state(
    folder: RunFolder,
    config: Config,
    searched: list[TrialResult],
    confirming: list[TrialResult],
    queued: bool,
    again: str,
) -> str:
    if folder.is_held() or folder.is_busy(config):
        return "running"
    trials, runs = total(config.search, config.axes) - len(searched), _wanted(config, searched) - len(confirming)
    stopped, how = ("queued or starting", "") if queued else ("stopped", f": recipefuzz {again} {folder.config}")
    if trials > 0 and not confirming:  # once it confirms, the search was over, perhaps by its time
        return f"{stopped}; {trials} trials are left{how}"
    if runs > 0:
        return f"{stopped}; {runs} confirming runs are left{how}"
    return "done"


def _wanted(config: Config, searched: list[TrialResult]) -> int:
    return len(confirming_runs(searched, config))


def _counts(results: list[TrialResult]) -> str:
    counts = Counter(outcome(r) for r in results)
    return ", ".join(f"{counts[k]} {k}" for k in COLORS if counts[k]) or "none yet"
