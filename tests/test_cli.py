"""The commands: what they print, where to, and their exit codes."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipefuzz import cli as commands

QUICK = """
study: quick
target: {data: wine, model: mlp, model_args: {width: 8, depth: 2}}
space: {lr: {low: 1e-3, high: 1, log: true}}
recipe: {input_norm: standardize, optimizer: momentum}
trial: {steps: 40, batch_size: 16}
search: {trials: 6, confirm: {top: 1, seeds: 2}}
run: {workers: 0}
"""


def cli(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, ["recipefuzz", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            commands.main()
    except SystemExit as stop:
        return int(stop.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = old
    return 0, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").write_text(QUICK)


def test_search_status_and_report() -> None:
    code, out, _ = cli("search", "quick.yaml")
    assert code == 0
    for expected in (
        "search 6/6",
        "confirm 2/2",
        "1 safe recipe (✓)",
        "what fails" if "stalled" in out else "files in",
    ):
        assert expected in out
    code, out, _ = cli("status", "quick")
    assert code == 0
    assert "quick: done" in out
    assert "6 of 6 trials" in out
    Path("runs/quick/ranking.csv").unlink()
    code, out, _ = cli("report", "runs/quick", "--svg", "picture.svg")
    assert code == 0
    assert Path("runs/quick/ranking.csv").exists()
    assert Path("picture.svg").read_text().startswith("<svg")


def test_no_safe_recipe_is_exit_code_1() -> None:
    Path("quick.yaml").write_text(QUICK.replace("low: 1e-3, high: 1,", "low: 1e-12, high: 1e-11,"))
    code, out, _ = cli("search", "quick.yaml")
    assert code == 1
    assert "no recipe converged" in out


def test_run_writes_a_row_a_recipe_in_the_same_order() -> None:
    Path("recipes.csv").write_text("lr,clip_norm,optimizer\n0.1,,momentum\n1e-9,5,adam\n1e12,,sgd\n")
    code, out, _ = cli("run", "quick.yaml", "recipes.csv")
    assert code == 0
    assert "written to verdicts.csv" in out
    lines = Path("verdicts.csv").read_text().splitlines()
    assert lines[0] == "lr,clip_norm,optimizer,verdict,cause,skill,steps,reason"
    assert [line.split(",")[:4] for line in lines[1:]] == [
        ["0.1", "", "momentum", "converging"],
        ["1e-9", "5", "adam", "stalled"],
        ["1e12", "", "sgd", "nan"],
    ]


RECIPES = {
    "unknown column": ("lr,widht\n0.1,3\n", r"recipes.csv:1: unknown column 'widht'(.|\n)*did you mean 'width'"),
    "missing column": ("clip_norm\n1\n", r"recipes.csv:1: the column 'lr' is missing"),
    "bad value": ("lr\n0.1\nfast\n", r"recipes.csv:3: lr: not a value of lr(.|\n)*found: +fast"),
    "bad word": ("lr,norm\n0.1,bacth\n", r"recipes.csv:2: norm: not a value(.|\n)*one of none, batch"),
    "no rows": ("lr\n", "recipes.csv: no recipes"),
    "empty file": ("", "recipes.csv: an empty file"),
    "longer row": ("lr,norm\n0.1,none,3,4\n", r"recipes.csv:2: a row of another length(.|\n)*4 cells"),
    "shorter row": ("lr,norm\n0.1,none\n0.1\n", r"recipes.csv:3: a row of another length(.|\n)*1 cells"),
    "column twice": ("lr,lr\n0.1,0.2\n", "recipes.csv:1: the column 'lr' stands twice"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipes(name: str) -> None:
    text, message = RECIPES[name]
    Path("recipes.csv").write_text(text)
    code, _, err = cli("run", "quick.yaml", "recipes.csv")
    assert code == 2
    import re

    assert re.search(message, err), err
    assert not Path("verdicts.csv").exists()


def test_a_missing_recipes_file() -> None:
    code, _, err = cli("run", "quick.yaml", "none.csv")
    assert code == 2
    assert "none.csv: no such file" in err


def test_bad_config_is_exit_code_2_without_a_traceback() -> None:
    Path("quick.yaml").write_text(QUICK.replace("momentum", "momentun"))
    code, _, err = cli("search", "quick.yaml")
    assert code == 2
    assert "quick.yaml:5: recipe.optimizer" in err
    assert "did you mean 'momentum'" in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_an_unwritable_folder_is_exit_code_3() -> None:
    Path("file").write_text("")
    code, _, err = cli("search", "quick.yaml", "--folder", "file/run")
    assert code == 3
    assert "can't make the run's folder" in err


def test_a_damaged_store_is_told_with_its_line() -> None:
    assert cli("search", "quick.yaml")[0] == 0
    journal = Path("runs/quick/study.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"rubbish\n", *lines[3:]]))
    for command in (("search", "quick.yaml"), ("status", "quick"), ("report", "quick")):
        code, _, err = cli(*command)
        assert code == 2
        assert "study.journal:4: the run's journal is damaged" in err


def test_init_writes_a_study_that_runs() -> None:
    assert cli("init", "mine.yaml")[0] == 0
    code, out, _ = cli("search", "mine.yaml", "--trials", "3", "--workers", "0")
    assert code in (0, 1)
    assert "search 3/3" in out
    code, _, err = cli("init", "mine.yaml")
    assert code == 2
    assert "the file exists" in err


def test_help_is_quick_and_needs_no_torch() -> None:
    heavy = ("torch", "optuna", "pandas", "pydantic")
    code = f"import sys, recipefuzz.cli; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_run() -> None:
    code, _, err = cli("status", "nothing")
    assert code == 2
    assert "no run there" in err


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on() -> None:
    import os
    import signal

    text = QUICK.replace("trials: 6", "trials: 1000000").replace("workers: 0", "workers: 2")  # never done in time
    Path("quick.yaml").write_text(text)
    # a shell that was started in the background has its children ignore Ctrl-C
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from recipefuzz.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "search", "quick.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    journal = Path("runs/quick/study.journal")
    for _ in range(600):
        time.sleep(0.1)
        if journal.exists() and journal.read_text().count('"result"') > 5:
            break
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "Go on with: recipefuzz search quick.yaml" in out
    assert "Traceback" not in out
    finished = len(Path("runs/quick/trials.csv").read_text().splitlines()) - 1
    assert finished >= 5
    assert cli("status", "quick")[0] == 0


def test_a_terminal_without_blocks_gets_question_marks() -> None:
    assert cli("search", "quick.yaml")[0] == 0
    command = [sys.executable, "-m", "recipefuzz", "report", "quick"]
    done = subprocess.run(command, capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 safe recipe (?)" in done.stdout


def test_what_the_command_line_says_wrong_is_not_blamed_on_the_file() -> None:
    code, _, err = cli("search", "quick.yaml", "--trials", "0")
    assert code == 2
    assert "--trials: " in err
    assert "quick.yaml" not in err


@pytest.mark.parametrize("out", ["recipes.csv", "nowhere/verdicts.csv"])
def test_verdicts_that_can_not_be_written_are_said_first(out: str) -> None:
    Path("recipes.csv").write_text("lr\n0.1\n")
    code, text, err = cli("run", "quick.yaml", "recipes.csv", "--out", out)
    assert (code, text) == (2, "")
    assert "can't write the verdicts there" in err
    assert Path("recipes.csv").read_text() == "lr\n0.1\n"


def test_version() -> None:
    assert cli("--version")[1].startswith("recipefuzz 0.")


def test_what_imports_made_is_exempt_from_collection_and_collecting_goes_on():
    code = """
import gc
from recipefuzz.garbage import imports_kept
with imports_kept():
    during = gc.isenabled()
    import numpy
print(during, gc.isenabled(), gc.get_freeze_count() > 10_000)
try:
    with imports_kept():
        raise ValueError
except ValueError:
    print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True"]
