"""Programs with a planted fault, diagnosed by the command and scored by the set's own script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "nan"
FOLDERS = sorted(p.parent for p in CASES.glob("*/expected.json"))
SHARE = 0.9  # of the cases, for each question, is to be answered right


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="the NaN cases (../shared/nan) are not here")
def test_planted_faults_are_found_and_healthy_programs_are_left_alone(tmp_path: Path) -> None:
    for folder in FOLDERS:
        command = [sys.executable, "-m", "recipefuzz", "diagnose", str(folder / "config.yaml"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        if done.returncode:
            print(folder.name, done.stderr)
        (tmp_path / f"{folder.name}.json").write_text(done.stdout)
    scored = subprocess.run(
        [sys.executable, str(CASES / "score.py"), str(tmp_path), str(CASES)],
        capture_output=True,
        text=True,
        check=False,
    )
    print(scored.stdout, scored.stderr)
    shares = json.loads(scored.stdout.splitlines()[-1])
    assert shares.keys() >= {"found", "phase", "op", "line", "root", "cause", "fix"}
    assert min(shares.values()) >= SHARE
    assert shares["fix"] == 1.0
    assert shares.get("clean", 1.0) == 1.0
