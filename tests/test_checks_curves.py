"""Loss curves: their shape by name on synthetic ones, on planted faults, and on healthy models; the chart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipefuzz.checks import loss_curves
from recipefuzz.checks.curve_shape import Curves, Name, shape
from recipefuzz.config import Config, parse_config
from recipefuzz.diagnosing import as_patient
from recipefuzz.finding import Finding, Level
from recipefuzz.report.chart import BOTH, COLUMNS, HELDOUT, ROWS, TRAIN, chart
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import TensorRows
from recipefuzz.trace import Trace
from recipefuzz.verdict import Label, Verdict

STEPS, AT = 200, tuple(range(25, 201, 25))
FALLING = 0.2 + 2.1 * np.exp(-np.arange(STEPS) / 30)  # from 2.3, a constant's loss
CONVERGING = Verdict(Label.CONVERGING, "skill 0.9", "", {})


def curves(train=FALLING, *, noise=0.02, heldout=None, seen=None, spread=0.02, epoch=10.0, seed=0, **more) -> Curves:
    """Curves with noise on the steps, and `spread` between 16 parts of the rows, four batches each."""
    draw = np.random.default_rng(seed)
    loss = train + noise * draw.standard_normal(STEPS)
    seen = np.asarray([train[step - 1] for step in AT] if seen is None else seen)
    heldout = np.asarray(seen if heldout is None else heldout)
    parts = spread * draw.standard_normal((2, 16))
    trace = Trace(loss=loss, constant=np.full(STEPS, 2.3))
    values = {"verdict": CONVERGING, "baseline": 2.3, "part": 4.0} | more
    return Curves(
        trace, at=AT, epoch=epoch, heldout=heldout[:, None] + parts[0], seen=seen[:, None] + parts[1], **values
    )


SEEN = np.array([FALLING[step - 1] for step in AT])
RISING = np.array([1.2, 0.8, 0.6, 0.7, 0.9, 1.1, 1.3, 1.5])  # its least is the third
SHAPES = {
    "both fall": (curves(), Name.HEALTHY),
    "held-out a little above": (curves(heldout=SEEN + 0.1), Name.HEALTHY),
    "a gap that opens late": (curves(heldout=np.maximum(SEEN, 0.6), epoch=50.0), Name.HEALTHY),
    "held-out rises by less than noise": (curves(heldout=SEEN + np.linspace(0, 0.05, 8), spread=1.0), Name.HEALTHY),
    "held-out bounces up once": (curves(heldout=np.array([1, 0.5, 0.3, 0.3, 2, 0.3, 0.3, 0.3])), Name.HEALTHY),
    "noise of small batches": (curves(noise=1.5, spread=0.75), Name.HEALTHY),
    "held-out rises": (curves(heldout=RISING), Name.OVERFITTING),
    "both rise": (curves(heldout=RISING, seen=RISING), Name.HEALTHY),
    "held-out never learns": (curves(heldout=np.linspace(2.3, 5, 8)), Name.MEMORIZING),
    "nothing learned, held-out a bit above": (curves(seen=np.full(8, 2.2), heldout=np.full(8, 2.9)), Name.HEALTHY),
    "apart at once": (curves(heldout=SEEN + 0.5, epoch=50.0), Name.APART),
    "apart, but after many passes": (curves(heldout=SEEN + 0.5, epoch=5.0), Name.HEALTHY),
    "apart by luck": (curves(heldout=SEEN + 0.5, spread=2.0, epoch=50.0), Name.HEALTHY),
    "train above held-out": (curves(heldout=SEEN - 0.15, epoch=50.0), Name.HEALTHY),
    "steps swing": (curves(noise=1.5), Name.NOISY),
    "stalled": (curves(verdict=Verdict(Label.STALLED, "flat", "unknown", {})), Name.STALLED),
    "not finite": (replace(curves(), trace=replace(curves().trace, first_bad=7)), Name.NOT_FINITE),
    "no baseline": (curves(baseline=float("nan")), Name.UNKNOWN),
}


@pytest.mark.parametrize(("given", "name"), SHAPES.values(), ids=SHAPES)
def test_shape_of_synthetic_curves(given: Curves, name: Name) -> None:
    assert shape(given)[0] is name


def test_words_name_the_step_and_the_numbers() -> None:
    assert shape(curves(heldout=RISING))[1].startswith("overfitting from step 75: held-out rises from 0.6")
    assert "flat at the end" in shape(curves())[1]
    assert "still falling" in shape(curves(np.linspace(2.3, 0.5, STEPS)))[1]
    assert "from step 25 on" in shape(curves(heldout=SEEN + 0.5, epoch=50.0))[1]


@pytest.mark.parametrize("seed", range(40))
def test_noise_alone_has_no_shape(seed: int) -> None:
    """Curves of a mediocre model whose held-out rows are few and differ."""
    train = 2.0 + 0.3 * np.exp(-np.arange(STEPS) / 30)
    assert shape(curves(train, noise=0.3, spread=0.3, epoch=60.0, seed=seed))[0] is Name.HEALTHY


@pytest.mark.parametrize("factor", [1e-3, 1e4])
@pytest.mark.parametrize("case", SHAPES)
def test_unit_of_the_loss_does_not_matter(case: str, factor: float) -> None:
    given, name = SHAPES[case]
    trace = replace(given.trace, loss=given.trace.loss * factor, constant=given.trace.constant * factor)
    changes = {key: getattr(given, key) * factor for key in ("heldout", "seen", "baseline")}
    assert shape(replace(given, trace=trace, **changes))[0] is name


def config(data: str = "digits", model: str = "mlp", **more) -> Config:
    tabular = data in ("wine", "breast_cancer", "diabetes")
    sizes = {"text": {"size": 12_000, "length": 16}, "adding": {"length": 6, "rows": 512}}
    recipe = {"optimizer": "adam", "lr": 3e-3, "input_norm": "standardize" if tabular else "none"}
    if data == "diabetes":
        recipe["target_norm"] = "standardize"
    loss = "mse" if data in ("diabetes", "adding") else "cross_entropy"
    target = {"data": data, "data_args": sizes.get(data, {}), "model": model, "loss": loss}
    return parse_config(
        {
            "target": target | {"model_args": more.pop("model_args", {})},
            "recipe": recipe | more,
            "trial": {"steps": 160, "batch_size": 32, "extend": 1},
            "run": {"workers": 0},
        }
    )


def found(study: Config, change=lambda task: task) -> Finding:
    task = change(resolve(study))
    with as_patient(study, task, study.default_recipe(), 0) as patient:
        (finding,) = loss_curves.check(patient)
    return finding


PAIRS = [
    ("digits", "mlp"), ("digits", "cnn"), ("wine", "mlp"), ("breast_cancer", "mlp"), ("diabetes", "mlp"),
    ("text", "rnn"), ("text", "gru"), ("text", "lstm"), ("text", "transformer"), ("adding", "gru"),
    ("adding", "transformer"),
]  # fmt: skip
NORMS = ("none", "batch", "layer", "group", "rms")


@pytest.mark.parametrize(("data", "model", "norm", "dropout"), [
    (*pair, NORMS[i % 5], (i % 2) * 0.3) for i, pair in enumerate(PAIRS)
])  # fmt: skip
def test_healthy_models_pass(data: str, model: str, norm: str, dropout: float) -> None:
    finding = found(config(data, model, norm=norm, model_args={"dropout": dropout}))
    assert finding.level is Level.PASS, finding.seen
    assert finding.lines


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.3])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(("data", "model"), [*PAIRS, ("adding", "lstm"), ("adding", "rnn")])
def test_every_healthy_model_passes(data: str, model: str, norm: str, dropout: float) -> None:
    test_healthy_models_pass(data, model, norm, dropout)


def shuffled(task):
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
    return replace(task, train=TensorRows(task.train.x[:200], task.train.y[order][:200]))


def shifted(task):
    """Held-out labels are counted from one."""
    return replace(task, test=TensorRows(task.test.x, (task.test.y + 1) % 10))


def prepared_otherwise(task):
    """Half of the held-out rows come upside down."""
    x = task.test.x.clone()
    x[::2] = x[::2].flip(1)
    return replace(task, train=task.train, test=TensorRows(x, task.test.y))


FAULTS = {
    "shuffled labels": (config(), shuffled, Level.FAIL, "memorizing"),
    "held-out labels off by one": (config(), shifted, Level.FAIL, "memorizing"),
    "held-out prepared otherwise": (
        config(lr=0.01),
        prepared_otherwise,
        Level.WARN,
        "apart from the start|overfitting",
    ),
    "learning rate far too low": (config(lr=1e-8), lambda t: t, Level.WARN, "stalled"),
    "learning rate that overflows": (config(lr=1e30, optimizer="sgd"), lambda t: t, Level.WARN, "not finite"),
}


@pytest.mark.parametrize(("study", "change", "level", "name"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_named(study: Config, change, level: Level, name: str) -> None:
    finding = found(study, change)
    assert finding.level is level, finding.seen
    assert finding.evidence["shape"] in name.split("|"), finding.seen
    assert finding.todo
    json.dumps(finding.record(), allow_nan=False)


def test_the_run_is_the_trial_and_leaves_no_trace() -> None:
    study = config("digits", "mlp", norm="batch", model_args={"dropout": 0.3})
    task, recipe = resolve(study), study.default_recipe()
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with as_patient(study, task, recipe, 0) as patient:
        first, second, trial = loss_curves.measured(patient), loss_curves.measured(patient), patient.train()
    np.testing.assert_array_equal(first.trace.loss, trial.trace.loss)
    np.testing.assert_array_equal(first.heldout, second.heldout)
    assert first.trace.heldout == trial.trace.heldout
    assert len(first.at) > len(trial.trace.heldout)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_chart() -> None:
    lines = chart([2.0 - i / 100 for i in range(120)], [(30, 1.9), (60, 1.4), (120, 0.81)])
    assert len(lines) == ROWS + 2
    assert all(len(line) <= COLUMNS + 11 for line in lines)
    assert lines[0].split() == ["2", "│·····"]
    assert "0.81" in lines[ROWS - 1]
    assert TRAIN in lines[0]
    assert HELDOUT in "".join(lines[:ROWS])
    assert BOTH in "".join(lines[:ROWS])
    assert lines[-1].endswith("step 120")


@pytest.mark.parametrize(
    "train", [[], [1.0], [1.0, 1.0], [float("nan")] * 3, [1.0, float("inf")], [-1.0, 1e300], [-1.7e308, 1.7e308]]
)
def test_chart_of_odd_curves(train: list[float]) -> None:
    lines = chart(train, [(1, float("nan"))])
    assert len(lines) in (0, ROWS + 2)


def test_chart_is_logarithmic_where_the_loss_falls_far() -> None:
    lines = chart([10.0 ** (2 - i / 50) for i in range(200)], [])
    assert "(log)" in lines[-1]
    assert [TRAIN in line for line in lines[:ROWS]] == [True] * ROWS


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recipefuzz import cli

    (tmp_path / "wine.yaml").write_text(
        "target: {data: wine, model: mlp}\nrecipe: {optimizer: adam, input_norm: standardize}\n"
        "trial: {steps: 60}\nrun: {workers: 0}\n"
    )
    picture = tmp_path / "curves.svg"
    cli.app(["check", str(tmp_path / "wine.yaml"), "--picture", str(picture)], standalone_mode=False)
    assert "<svg" in picture.read_text()
    assert "held-out" in picture.read_text().replace("&#160;", " ")
    assert "loss curves: healthy" in capsys.readouterr().out
