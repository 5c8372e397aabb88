"""The whole way from a config to a ranking, in this process and with worker processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

import recipefuzz
from recipefuzz.errors import InputError
from recipefuzz.listening import Silent
from recipefuzz.result import Phase
from recipefuzz.run_folder import RunFolder, fingerprints
from recipefuzz.targets.resolve import user_files
from recipefuzz.working import finish

CASE = """
import torch
from torch import nn

CALLS = []

def load():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=g)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    return x[:200], y[:200], x[200:], y[200:]

def build(width=8, fail=False):
    if fail == "raise":
        raise RuntimeError("no such width")
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CASE)
    return {
        "study": "small",
        "target": {"data": "mine:load", "model": "mine:build"},
        "space": {"lr": {"low": 1e-4, "high": 10, "log": True}, "clip_norm": [None, 1]},
        "recipe": {"optimizer": "momentum"},
        "trial": {"steps": 60, "batch_size": 16},
        "search": {"trials": 12, "confirm": {"top": 2, "seeds": 2}, "diagnose": 0},
        "run": {"workers": 0},
        "base": str(tmp_path),
    }


def same(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Equal but for the time that the trials took."""
    return a.drop(columns="seconds").equals(b.drop(columns="seconds"))


def in_order(trials: pd.DataFrame) -> pd.DataFrame:
    """Confirming runs by number: with several workers they finish in any order."""
    search, confirm = trials[trials.phase == "search"], trials[trials.phase == "confirm"]
    return pd.concat([search, confirm.sort_values(["trial", "seed"])]).reset_index(drop=True)


def test_a_search_finds_confirms_and_ranks(study: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2")
    study["search"]["diagnose"] = 1
    result = recipefuzz.search(study)
    trials = result.trials
    assert list(trials[trials.phase == "search"].trial) == list(range(12))
    assert (trials.phase == "confirm").sum() == 4
    assert set(trials.verdict) <= {"converging", "stalled", "nan"}
    assert result.ranking.iloc[0].safe
    assert result.best is not None
    assert result.best.lr == result.ranking.iloc[0].lr
    pasted = yaml.safe_load((result.folder / "recipe.yaml").read_text())["recipe"]
    assert pasted["lr"] == result.best.lr
    assert not [p.name for p in result.folder.iterdir() if b"hunter2" in p.read_bytes()], "nothing of the environment"
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "config.yaml", "diagnoses.json", "failures.csv", "ranking.csv", "recipe.yaml", "study.journal", "trials.csv",
    ]  # fmt: skip


def test_the_same_study_gives_the_same_trials_with_workers_and_without(study: dict) -> None:
    alone = recipefuzz.search(study)
    pooled = recipefuzz.search(study | {"study": "pooled", "run": {"workers": 2}})
    assert same(in_order(alone.trials), in_order(pooled.trials))


def test_a_run_that_is_complete_is_not_trained_again(study: dict) -> None:
    first = recipefuzz.search(study)
    journal = (first.folder / "study.journal").read_bytes()
    second = recipefuzz.search(study)
    assert same(first.trials, second.trials)
    added = (first.folder / "study.journal").read_bytes().removeprefix(journal)
    assert not added, added


def test_more_trials_continue_the_run(study: dict) -> None:
    first = recipefuzz.search(study)
    study["search"] |= {"trials": 15}
    second = recipefuzz.search(study)
    search = second.trials[second.trials.phase == "search"]
    assert len(search) == 15
    assert same(search.iloc[:12].reset_index(drop=True), first.trials.iloc[:12])


class _Stop:
    """A listener that interrupts the run after some trials, like Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.left = after

    def begin(self, phase: Phase, done: object, total: int) -> None: ...

    def say(self, line: str) -> None: ...

    def finished(self, result: object) -> None:  # noqa: ARG002 - the listener's interface
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 5, 11, 12, 14])
def test_an_interrupted_run_resumes_to_what_an_undisturbed_one_is(study: dict, after: int) -> None:
    whole = recipefuzz.search(study | {"study": "whole"})
    with pytest.raises(KeyboardInterrupt):
        recipefuzz.search(study, listener=_Stop(after))
    written = pd.read_csv("runs/small/trials.csv", keep_default_na=False)
    assert len(written) >= after + 1  # what was finished is in the table already, with all that finished beside it
    assert same(recipefuzz.search(study).trials, whole.trials)


def test_another_config_is_refused_with_a_diff(study: dict) -> None:
    recipefuzz.search(study)
    study["trial"]["steps"] = 80
    with pytest.raises(InputError, match=r"another config or other code(.|\n)*-  steps: 60(.|\n)*\+  steps: 80"):
        recipefuzz.search(study)
    assert recipefuzz.search(study, fresh=True).config.trial.steps == 80
    assert Path("runs/small.old-1/study.journal").exists()


def test_changed_code_is_refused(study: dict) -> None:
    recipefuzz.search(study)
    Path("mine.py").write_text(CASE.replace("0.5", "0.7"))
    with pytest.raises(InputError, match=r"other code(.|\n)*mine.py"):
        recipefuzz.search(study)


def test_a_renamed_folder_is_found_and_reported(study: dict) -> None:
    result = recipefuzz.search(study)
    shutil.move(result.folder, "elsewhere")
    Path("elsewhere/trials.csv").unlink()
    from test_cli import cli

    assert cli("report", "elsewhere")[0] == 0
    assert len(pd.read_csv("elsewhere/trials.csv")) == len(result.trials)


def test_errors_of_single_trials_do_not_stop_the_search(study: dict) -> None:
    study["space"]["fail"] = ["no", "raise"]
    result = recipefuzz.search(study)
    failed = result.trials[result.trials.verdict == "error"]
    assert 0 < len(failed) < 12
    assert (failed.fail == "raise").all()
    assert failed.reason.str.contains(r"RuntimeError: no such width \(mine.py:\d+\)").all()
    assert "error" in set(pd.read_csv(result.folder / "failures.csv").verdict)


def test_without_a_safe_recipe_there_is_no_winner(study: dict) -> None:
    study["space"] = {"lr": {"low": 1e-9, "high": 1e-8, "log": True}}
    result = recipefuzz.search(study)
    assert result.best is None
    assert result.ranking.empty
    assert not (result.folder / "recipe.yaml").exists()


def test_the_time_budget_ends_the_search(study: dict) -> None:
    study["search"] |= {"trials": 10_000, "time": 1}
    result = recipefuzz.search(study)
    searched = result.trials[result.trials.phase == "search"]
    assert 0 < len(searched) < 10_000
    assert len(recipefuzz.search(study).trials) == len(result.trials)  # the time is over for good


def test_judging_given_recipes_keeps_rows_and_order(study: dict) -> None:
    del study["space"]
    recipes = pd.DataFrame({"lr": [0.1, 1e-9, 1e6], "clip_norm": [None, 1.0, None], "width": [4, 8, 8]})
    table = recipefuzz.judge_recipes(study, recipes)
    assert list(table.columns) == ["lr", "clip_norm", "width", "verdict", "cause", "skill", "steps", "reason"]
    assert list(table.verdict) == ["converging", "stalled", "nan"]
    assert table.steps.between(1, 300).all()


def test_a_folder_that_is_no_run_is_not_touched(study: dict) -> None:
    theirs = Path("project")
    theirs.mkdir()
    (theirs / "trials.csv").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"project: the folder has files in it"):
            recipefuzz.search(study | {"run": {"workers": 0, "folder": "project"}}, fresh=fresh)
    assert [p.name for p in theirs.iterdir()] == ["trials.csv"]
    assert (theirs / "trials.csv").read_text() == "precious"


def test_tables_without_their_journal_are_not_written_over(study: dict) -> None:
    result = recipefuzz.search(study)
    (result.folder / "study.journal").write_bytes(b"")
    with pytest.raises(InputError, match="the folder has files in it"):
        recipefuzz.search(study)


def test_the_end_of_a_shared_run_is_reported_and_other_code_is_known(study: dict) -> None:
    study["search"]["diagnose"] = 1
    result = recipefuzz.search(study | {"run": {"workers": 0, "storage": "file"}})
    assert result.diagnoses
    folder = RunFolder(result.folder)
    (folder.path / "ranking.csv").unlink()
    found = finish(folder.load_config(), folder, Silent())
    assert (folder.path / "ranking.csv").exists()
    assert found.diagnoses.keys() == result.diagnoses.keys()
    assert folder.is_of(folder.load_config(), fingerprints(user_files(folder.load_config())))
    assert not folder.is_of(folder.load_config(), {"model.py": "0123456789ab"})


def test_a_search_from_python_is_no_batch_job(study: dict) -> None:
    with pytest.raises(recipefuzz.InputError, match=r"run\.launcher: what is called from Python(.|\n)*found: +slurm"):
        recipefuzz.search(study | {"run": {"launcher": "slurm"}})


def test_a_loss_whose_constant_is_zero_is_refused(study: dict) -> None:
    Path("mine.py").write_text(CASE + "\ndef loss(output, target):\n    return output.var() + 0 * output.sum()\n")
    study["target"]["loss"] = "mine:loss"
    with pytest.raises(InputError, match="a constant prediction already has loss 0"):
        recipefuzz.search(study)


def test_numbers_as_pyyaml_reads_them(study: dict) -> None:
    study["space"]["lr"] = {"low": "1e-4", "high": "1e1", "log": True}
    assert len(recipefuzz.search(study).trials) == 16
