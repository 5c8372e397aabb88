"""The README says what is so: commands, keys, axes, columns, and a config that loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from recipefuzz.cli import app
from recipefuzz.config import Config, load_config
from recipefuzz.recipe import AXES
from recipefuzz.report import tables
from recipefuzz.targets.builtin.data import DATA
from recipefuzz.targets.builtin.models import MODELS
from recipefuzz.verdict import Label

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ("pip install . && recipefuzz search studies/quickstart.yaml", "pip install '.[test]' && pytest -n auto")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_are_the_ones_that_ci_runs(command: str) -> None:
    assert f"```sh\n{command}\n```" in README
    ci = (ROOT / ".ci" / "run").read_text().replace("--quiet ", "")
    assert command in ci


def test_every_command_is_listed_and_no_other() -> None:
    block = README.split("## Commands")[1].split("```")[1]
    listed = re.findall(r"^recipefuzz (\w+)", block, flags=re.MULTILINE)
    registered = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(listed) == registered


def keys(model: type[BaseModel]) -> set[str]:
    found = set()
    for name, info in model.model_fields.items():
        found.add(name)
        kind: Any = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys(kind)
    return found


def test_the_config_reference_loads_and_has_every_key(tmp_path: Path) -> None:
    block = re.search(r"## Config\n+```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    path = tmp_path / "study.yaml"
    path.write_text(block[1])
    config = load_config(path)
    defaults = Config.model_validate({"target": {"data": "digits", "model": "mlp"}})
    assert config.trial == defaults.trial
    assert config.search == defaults.search
    assert config.run == defaults.run
    for key in keys(Config):
        assert re.search(rf"\b{key}:", block[1]), key


@pytest.mark.parametrize("name", [*AXES, *Label, *DATA, *MODELS])
def test_names_are_explained(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize(
    "table",
    ["TRIAL_COLUMNS", "TRIAL_TAIL", "VERDICT_COLUMNS", "RANKING_COLUMNS", "FAILURE_COLUMNS", "DIAGNOSIS_COLUMNS"],
)
def test_columns_are_documented(table: str) -> None:
    for column in getattr(tables, table):
        assert f"`{column}`" in README, column


def test_the_picture_is_there() -> None:
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("study", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_studies_load_and_open_with_their_question(study: Path) -> None:
    config = load_config(study)
    text = study.read_text()
    assert config.axes.names or "recipefuzz diagnose" in text, "what is it for?"
    assert text.startswith("# ")
    assert "?" in text.split("\n\n")[0].split("study:")[0]
