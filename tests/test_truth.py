"""Verdicts against recipes with known long-run outcomes, scored by the truth sets' own script."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import recipefuzz
from recipefuzz.report.tables import write_csv

TRUTH = Path(__file__).parents[2] / "shared" / "truth"
FOLDERS = sorted(p.parent for p in TRUTH.glob("*/truth.csv"))


def score(folder: Path, verdicts: Path) -> dict:
    spec = importlib.util.spec_from_file_location("score", TRUTH / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    truth, unanimous = module.read_truth(folder)
    labels, steps = module.read_verdicts(verdicts, len(truth))
    short = recipefuzz.load_config(folder / "config.yaml").trial.steps
    return module.score(truth, unanimous, labels, steps, short)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="the truth sets (../shared/truth) are not here")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_verdicts_agree_with_the_long_run(folder: Path, tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.csv"
    write_csv(recipefuzz.judge_recipes(folder / "config.yaml", folder / "recipes.csv"), verdicts)
    found = score(folder, verdicts)
    known = json.loads((folder / "baseline.json").read_text())
    print(folder.name, json.dumps({k: found[k] for k in ("accuracy", "recall", "share_of_short_budget")}))
    simple = max(known["naive_at_fifth"]["accuracy"], known["skill_at_fifth"]["accuracy"])
    assert found["accuracy"] >= known["seed_0_long_run_agrees"] - 0.03, found["wrong_rows"]
    assert found["accuracy"] >= simple - 1e-4, found["wrong_rows"]
    assert found["share_of_short_budget"] <= 0.6
