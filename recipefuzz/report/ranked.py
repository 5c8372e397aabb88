"""The ranking of a run as its config asks for it, for tables, terminal and status alike."""

from __future__ import annotations

from collections.abc import Sequence

from recipefuzz.config import Config
from recipefuzz.ranking import Ranked, best, rank
from recipefuzz.result import TrialResult


def rank_run(config: Config, results: Sequence[TrialResult]) -> tuple[list[Ranked], Ranked | None]:
    """The ranking as the config asks for it, and the winner if there is one."""
    confirm = config.search.confirm
    ranking = rank(results, config.search.rank_by, wanted=confirm.seeds)
    return ranking, best(ranking, confirmed=confirm.top > 0)
