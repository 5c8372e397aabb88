"""The ladder: its config, the narrowing of the space, predictions, and the climb from the simplest model up."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recipefuzz import cli
from recipefuzz.axes import parse_space
from recipefuzz.checks.every import CHECKS
from recipefuzz.config import load_config, parse_config
from recipefuzz.engines.predictions import SAMPLED, Kind, predictions
from recipefuzz.errors import InputError
from recipefuzz.finding import Level
from recipefuzz.laddering import ladder, rung_config
from recipefuzz.narrowing import ends, narrowed, safe_region
from recipefuzz.ranking import rank
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder, identity
from recipefuzz.source import Source
from recipefuzz.space import Range
from recipefuzz.targets.task import TensorRows

CPU = torch.device("cpu")
CASE = """
import torch
from torch import nn

def load():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=g)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    return x[:200], y[:200], x[200:], y[200:]

class Zero(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * x.new_zeros(len(x), 2)

def linear():
    return nn.Linear(6, 2)

def deep(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

def broken():
    return Zero()

def raising():
    raise RuntimeError("no such model")
"""
STUDY = """\
study: small
target: {{data: "mine:load", model: "mine:deep"}}
ladder:
{rungs}
space:
  lr: {{low: 1e-4, high: 100, log: true}}
  clip_norm: [null, 1]
recipe: {{optimizer: momentum}}
trial: {{steps: 40, batch_size: 16, extend: 0}}
search: {{trials: 16, confirm: {{top: 2, seeds: 2}}, diagnose: 0}}
run: {{workers: 0, engine: sequential}}
"""


def write(tmp_path: Path, *rungs: str) -> Path:
    (tmp_path / "mine.py").write_text(CASE)
    path = tmp_path / "small.yaml"
    path.write_text(STUDY.format(rungs="\n".join(f"  - {rung}" for rung in rungs)))
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_modules: None) -> None:  # noqa: ARG001 - for its effect
    monkeypatch.chdir(tmp_path)


# config


def test_rungs_are_names_or_models_with_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, '"mine:linear"', '{model: "mine:deep", model_args: {width: 4}}')
    config = load_config(path)
    assert [(r.model, r.model_args) for r in config.ladder] == [("mine:linear", {}), ("mine:deep", {"width": 4})]
    assert parse_config(config.resolved()).ladder == config.ladder


BAD = {
    "no list": ("rnn", r"study.yaml:2: ladder: a list belongs here(.|\n)*found: +rnn(.|\n)*: \[\{model: rnn"),
    "unknown key": ("[{modle: rnn}]", r"study.yaml:2: ladder\[0\].(model|modle): (.|\n)*"),
    "typo beside": ("[{model: rnn, args: {}}]", r"ladder\[0\].args: unknown key 'args'\n +expected: model, model_args"),
    "no model": ("[rnn, {model_args: {depth: 1}}]", r"the key 'ladder\[1\].model' is missing(.|\n)*built-in model"),
    "a number": ("[3]", r"ladder\[0\]: a section of keys belongs here(.|\n)*expected: model, model_args"),
    "bad arguments": ("[{model: rnn, model_args: {depth: .inf}}]", r"ladder\[0\].model_args: (.|\n)*keyword arguments"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_faults_of_a_ladder_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"target: {{data: text, model: lstm}}\nladder: {text}\n")
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_a_ladder_is_no_part_of_the_searchs_identity(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '"mine:linear"'))
    other = parse_config(config.resolved() | {"ladder": []})
    assert identity(config, {}) == identity(other, {})


def test_a_rung_is_a_study_beside_the_studys_own(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '"mine:linear"', '{model: "mine:deep", model_args: {width: 4}}'))
    rung = rung_config(config, 1, {"lr": {"low": 0.01, "high": 1, "log": True}})
    assert rung.target.model_args == {"width": 4}
    assert rung.search.trials == 8
    assert RunFolder.of(rung).path == tmp_path / "runs" / "small-ladder" / "rung-2-deep"
    assert rung.axes["lr"] == Range(0.01, 1, log=True)
    assert rung.source.place("target", "model").line == 5


# narrowing

LR = {"low": 1e-5, "high": 10, "log": True}


def trial(number: int, **values) -> TrialResult:
    return TrialResult(number, Phase.SEARCH, 0, values, verdict="converging")


def narrow(section: dict, safe: list[dict], tried: list[dict] | None = None) -> dict:
    results = [trial(i, **values) for i, values in enumerate(safe if tried is None else tried)]
    return narrowed(section, parse_space(section, Source()), safe, results)


SECTIONS = {
    "one decade on each side of one recipe": ({"lr": LR}, [{"lr": 1e-3}], {"lr": LR | {"low": 1e-4, "high": 0.01}}),
    "further where two are far apart": ({"lr": LR}, [{"lr": 1e-3}, {"lr": 0.01}], {"lr": LR | {"low": 1e-5, "high": 1}}),
    "never beyond the range": ({"lr": LR}, [{"lr": 1e-5}, {"lr": 10}], {"lr": LR}),
    "nothing safe": ({"lr": LR}, [], {"lr": LR}),
    "steps": (
        {"width": {"low": 16, "high": 128, "step": 16}}, [{"width": 64}], {"width": {"low": 32, "high": 96, "step": 16}}
    ),
    "whole numbers": ({"depth": {"low": 1, "high": 2}}, [{"depth": 1}], {"depth": {"low": 1, "high": 2}}),
    "straight": ({"dropout": {"low": 0.0, "high": 0.6}}, [{"dropout": 0.3}], {"dropout": {"low": 0.2, "high": 0.4}}),
}  # fmt: skip


@pytest.mark.parametrize(("section", "safe", "expected"), SECTIONS.values(), ids=SECTIONS)
def test_narrowed_ranges(section: dict, safe: list[dict], expected: dict) -> None:
    found = narrow(section, safe)
    assert found == {
        name: spec | {k: pytest.approx(spec[k]) for k in ("low", "high")} for name, spec in expected.items()
    }


def test_a_choice_is_dropped_that_was_tried_and_never_safe() -> None:
    section = {"norm": ["none", "batch", "layer"], "bias": [1, 0]}
    tried = [{"norm": "none", "bias": 1}] + 3 * [{"norm": "batch", "bias": 1}] + 2 * [{"norm": "layer", "bias": 1}]
    assert narrow(section, tried[:1], tried) == {"norm": ["none", "layer"], "bias": [1, 0]}


def test_region_is_of_what_converged_and_was_not_refuted() -> None:
    results = [trial(0, lr=0.1), trial(1, lr=0.2), trial(2, lr=0.3)]
    for number, verdict in ((0, "converging"), (1, "nan")):
        results.append(TrialResult(number, Phase.CONFIRM, 1, results[number].values, verdict=verdict))
    assert sorted(values["lr"] for values in safe_region(rank(results))) == [0.1, 0.3]


RANGES = st.one_of(
    st.just(Range(1e-5, 10, log=True)),
    st.just(Range(0.0, 1.0)),
    st.just(Range(0.0, 1.0, step=0.1)),
    st.just(Range(1, 7, integer=True)),
    st.just(Range(1, 1000, log=True, integer=True)),
    st.just(Range(16, 128, step=16, integer=True)),
)


@given(RANGES, st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_narrowed_range_holds_the_values_and_lies_in_the_old_one(axis: Range, shares: list[float]) -> None:
    grid = axis.grid(101)
    values = [float(grid[round(share * (len(grid) - 1))]) for share in shares]
    low, high = ends(axis, values)
    assert axis.low <= low < high <= axis.high
    assert low <= min(values)
    assert max(values) <= high
    if axis.integer:
        assert (low, high) == (int(low), int(high))
    if axis.step and low > axis.low:
        assert axis.contains(low)


# predictions


class Parity(nn.Module):
    """Logits of two classes that know the sign of the first feature."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x[:, 0], x[:, 0]], 1)


class Next(nn.Module):
    """The next token is one more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 99.0 * nn.functional.one_hot((x + 1) % 3, 3).float()


def test_predictions_of_classes_numbers_and_text() -> None:
    x = torch.tensor([[1.0], [-1.0], [2.0]])
    classes = predictions(Parity(), TensorRows(x, torch.tensor([1, 0, 0])), "cross_entropy", "", CPU)
    assert (classes.kind, classes.predicted, classes.true) == (Kind.CLASSES, (1, 0, 1), (1, 0, 0))
    numbers = predictions(nn.Identity(), TensorRows(x, x), "mse", "", CPU)
    assert (numbers.kind, numbers.predicted, numbers.true) == (Kind.NUMBERS, (1, -1, 2), (1, -1, 2))
    chances = predictions(nn.Identity(), TensorRows(0 * x, x), "bce", "", CPU)
    assert chances.predicted == (0.5, 0.5, 0.5)
    tokens = TensorRows(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[1, 2, 0, 1]]))
    text = predictions(Next(), tokens, "cross_entropy", "abc", CPU)
    assert text.prompt == "abca"
    assert text.sampled == ("bca" * SAMPLED)[:SAMPLED]
    assert predictions(Next(), tokens, "cross_entropy", "", CPU).predicted == (1,)


def test_predictions_leave_model_and_random_numbers_alone() -> None:
    model, state = nn.Dropout(0.5).train(), torch.random.get_rng_state()
    rows = TensorRows(torch.ones(4, 1), torch.ones(4, 1))
    assert predictions(model, rows, "mse", "", CPU).predicted == (1, 1, 1, 1)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


# the climb


def test_each_rung_starts_where_the_last_one_was_safe(tmp_path: Path) -> None:
    path = write(tmp_path, '"mine:linear"', '"mine:deep"')
    first, second = ladder(path)
    assert not first.failure
    assert not second.failure
    assert first.config.axes == load_config(path).axes
    assert (second.config.axes["lr"].low, second.config.axes["lr"].high) != (1e-4, 100)
    safe = [row.trial.values["lr"] for row in first.ranking if row.safe]
    assert all(second.config.axes["lr"].contains(lr) for lr in safe)
    assert first.checks is Level.PASS
    assert first.shown is not None
    assert sum(a == b for a, b in zip(first.shown.predicted, first.shown.true, strict=True)) >= 8
    assert len(first.trials) == len(second.trials) == 8
    again = [rung.results for rung in ladder(path)]  # resumed: nothing is trained, nothing is refused
    assert again == [first.results, second.results]


def test_the_cheap_checks_of_a_rung_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    counted = replace(CHECKS[0], run=lambda patient: made.append(patient) or [])
    monkeypatch.setattr("recipefuzz.checks.every.CHECKS", (counted,))
    (rung,) = ladder(write(tmp_path, '"mine:linear"'))
    assert (rung.failure, len(made)) == ("", 1)


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipefuzz", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def test_first_rung_that_fails_is_where_to_look(tmp_path: Path) -> None:
    path = write(tmp_path, '"mine:linear"', '"mine:broken"', '"mine:deep"')
    code, out, _ = command("ladder", str(path))
    assert code == 1
    assert "rung 2 of 3: mine:broken" in out
    assert "look at rung 2 of 3, mine:broken:" in out
    assert "rung 1 holds on the same data and loss" in out
    assert "rung 3 of 3" not in out
    assert "held-out rows right" in out
    assert not (tmp_path / "runs" / "small").exists()


def test_a_ladder_that_holds(tmp_path: Path) -> None:
    code, out, _ = command("ladder", str(write(tmp_path, '"mine:linear"')))
    assert code == 0
    assert "all 1 rungs hold" in out


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        (['{model: "mine:raising"}'], r"small.yaml:4: target.model: building the model raised RuntimeError"),
        (["mpl"], r"small.yaml:4: target.model: no built-in model of that name(.|\n)*did you mean 'mlp'"),
        (['{model: mlp, model_args: {widht: 3}}'], r"small.yaml:4: target.model_args(.|\n)*widht"),
    ],
)  # fmt: skip
def test_faults_of_a_rungs_code_point_at_its_line(tmp_path: Path, rungs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(ladder(write(tmp_path, *rungs)))


def test_a_config_without_a_ladder_is_told_what_one_is(tmp_path: Path) -> None:
    path = write(tmp_path, "mlp")
    path.write_text(path.read_text().replace("ladder:\n  - mlp\n", ""))
    code, _, err = command("ladder", str(path))
    assert code == 2
    assert "nothing to climb: the config has no ladder" in err
