"""The studies run, and give the kind of answer that they promise: at a small part of their budget."""

from __future__ import annotations

from pathlib import Path

import pytest

import recipefuzz
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.diagnosing import diagnose
from recipefuzz.errors import EXIT_BAD_INPUT, InputError
from recipefuzz.laddering import ladder

STUDIES = Path(__file__).parent.parent / "studies"
SEARCHED = {
    "adam_lr",
    "init_scale",
    "normalization",
    "own_model",
    "quickstart",
    "rnn_clipping",
    "standardizing",
    "trainability_map",
}
LADDERS = {"ladder_charlm"}
DIAGNOSED = {"own_loss": ("code", "log_of_zero"), "missing_cell": ("data", "data_nonfinite")}


def tiny(name: str, folder: Path) -> Config:
    data = load_config(STUDIES / f"{name}.yaml").resolved()
    data["trial"] |= {"steps": 30, "extend": 0}
    data["search"] |= {"trials": 4, "confirm": {"top": 1, "seeds": 1}, "diagnose": 0}
    data["run"] |= {"workers": 0, "engine": "sequential", "folder": str(folder / name)}
    return parse_config(data)


def test_every_study_is_run_here() -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == SEARCHED | LADDERS | set(DIAGNOSED)


@pytest.mark.parametrize("name", [*sorted(SEARCHED)])
def test_a_search_judges_every_trial(name: str, tmp_path: Path) -> None:
    config = tiny(name, tmp_path)
    trials = recipefuzz.search(config).trials
    searched = trials[trials["phase"] == "search"]
    assert len(searched) == 4
    assert set(searched["verdict"]) <= {"nan", "stalled", "converging"}
    assert set(config.axes.names) <= set(trials.columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LADDERS))
def test_a_ladder_climbs_until_a_rung_fails(name: str, tmp_path: Path) -> None:
    config = tiny(name, tmp_path)
    rungs = list(ladder(config))
    assert 1 <= len(rungs) <= len(config.ladder)
    assert all(rung.findings for rung in rungs)
    assert all(rung.winner for rung in rungs[:-1])
    assert bool(rungs[-1].failure) is (rungs[-1].winner is None)


@pytest.mark.parametrize("name", DIAGNOSED)
def test_a_diagnosis_names_root_and_cause(name: str) -> None:
    found = diagnose(load_config(STUDIES / f"{name}.yaml").but(workers="0")).record()
    assert (found["root"], found["cause"]) == DIAGNOSED[name]


def test_the_search_refuses_the_missing_cell_and_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finite: row 17, column 1") as caught:
        recipefuzz.search(tiny("missing_cell", tmp_path))
    assert caught.value.exit_code == EXIT_BAD_INPUT
