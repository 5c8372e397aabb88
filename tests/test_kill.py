"""kill -9 at random moments: nothing that was finished is lost, nothing is done twice, and the trials are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import MEDICAL

KILLS = 20
STUDY = f"""{MEDICAL}
search: {{trials: 160, confirm: {{top: 5, seeds: 3}}}}
run: {{workers: 1, engine: sequential}}
"""
# on one engine: which one a run takes, and with how many lanes, is measured at each start, and each rounds otherwise


def start(name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from recipefuzz.cli import main; main()", "search", f"{name}.yaml"]
    with Path(f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finished(name: str) -> list[tuple[int, str, int]]:
    """(trial, phase, seed) of every result in the journal, in the order in which they were written."""
    journal = Path(f"runs/{name}/study.journal")
    found = []
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        entry = json.loads(line) if line.endswith(b"}") else {}
        result = entry.get("user_attr", {}).get("result") or entry.get("user_attrs", {}).get("result")
        if result:
            found.append((result["trial"], result["phase"], result["seed"]))
    return found


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "killed"):
        Path(f"{name}.yaml").write_text(STUDY)
    assert start("whole").wait(timeout=300) == 0, Path("whole.log").read_text()

    moments = random.Random(1)
    before: list[tuple[int, str, int]] = []
    for _ in range(KILLS):
        process = start("killed")
        time.sleep(moments.uniform(0.5, 6.0))
        whole_group = moments.random() < 0.5  # else the parent alone: its workers must leave by themselves
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        now = finished("killed")
        assert now[: len(before)] == before, "a finished trial was lost"
        before = now
    assert start("killed").wait(timeout=300) == 0, Path("killed.log").read_text()

    done = finished("killed")
    assert len(done) == len(set(done)), "a trial was done twice"
    whole, killed = (
        pd.read_csv(f"runs/{name}/trials.csv", keep_default_na=False).drop(columns="seconds")
        for name in ("whole", "killed")
    )
    pd.testing.assert_frame_equal(whole, killed)
    print(
        f"{KILLS} kills; {len(before)} of {len(done)} results were there before the last start; none lost, none doubled"
    )
