"""Tables, picture, status and the files of a run, from results that are made up."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
import string
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from recipefuzz.atomic import write_atomically
from recipefuzz.axes import TAKEN
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.peak import Peak
from recipefuzz.ranking import best, rank
from recipefuzz.recipe import NORMS, Recipe, shown
from recipefuzz.report import write as write_module
from recipefuzz.report.failures import buckets, region
from recipefuzz.report.grid_map import grid_map
from recipefuzz.report.picture import picture, sparkline
from recipefuzz.report.progress import Progress
from recipefuzz.report.status import status_lines
from recipefuzz.report.tables import failures_frame, ranking_frame, trials_frame, verdicts_frame, write_csv
from recipefuzz.report.terminal import PLAIN, summary
from recipefuzz.report.write import winner_yaml, write_reports
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder, identity
from recipefuzz.space import Choice, Range, Space
from recipefuzz.template import write_template

steady = settings(
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

CONFIG = {
    "study": "made-up",
    "target": {"data": "digits", "model": "mlp"},
    "space": {
        "lr": {"low": 1e-5, "high": 10, "log": True},
        "clip_norm": [None, 1, 5],
        "hidden": [None, 16, 32],
        "bias": [True, False],
    },
    "recipe": {"optimizer": "adam"},
    "search": {"trials": 6, "confirm": {"top": 2, "seeds": 2}},
}


def config(**changes) -> Config:
    return parse_config(CONFIG | changes)


def trial(number: int, phase: Phase = Phase.SEARCH, *, seed: int = 0, made=None, **more) -> TrialResult:
    values = {"lr": 0.1 * (number + 1), "clip_norm": [None, 1, 5][number % 3], "hidden": [16, None, 32][number % 3]}
    recipe = (made or config()).recipe_of(values | {"bias": number % 2 == 0})
    return TrialResult(number, phase, seed, recipe.values(), **more)


def results() -> list[TrialResult]:
    return [
        trial(
            0,
            verdict="converging",
            skill=0.9,
            score=0.8,
            heldout_skill=0.7,
            loss=0.1,
            baseline=2.3,
            steps=38,
            seconds=0.25,
        ),
        trial(
            1,
            verdict="nan",
            cause="exploding_parameters",
            reason="not finite, at step 7",
            steps=7,
            first_bad=7,
            baseline=2.3,
        ),
        trial(
            2, verdict="stalled", cause="lr_too_low", reason='flat: "no"', skill=0.0, score=0.0, steps=300, baseline=2.3
        ),
        trial(3, error="ValueError: bad width (case.py:7)"),
        trial(4, verdict="converging", skill=0.5, score=0.95, heldout_skill=0.6, loss=1.1, baseline=2.3, steps=300),
        trial(
            0,
            Phase.CONFIRM,
            seed=1,
            verdict="converging",
            skill=0.8,
            heldout_skill=0.6,
            loss=0.2,
            baseline=2.3,
            steps=300,
        ),
        trial(
            0,
            Phase.CONFIRM,
            seed=2,
            verdict="converging",
            skill=0.6,
            heldout_skill=0.4,
            loss=0.4,
            baseline=2.3,
            steps=300,
        ),
        trial(
            4,
            Phase.CONFIRM,
            seed=1,
            verdict="stalled",
            cause="unknown",
            reason="flat",
            skill=0.0,
            baseline=2.3,
            steps=300,
        ),
    ]


def cells(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def reported(folder: Path, found=None, made=None) -> Path:
    found, made = results() if found is None else found, made or config()
    ranking = rank(found, made.search.rank_by)
    write_reports(folder, made, found, ranking, best(ranking, confirmed=made.search.confirm.top > 0), {})
    return folder


# --- tables


TRIALS = """\
trial,phase,seed,lr,clip_norm,hidden,bias,optimizer,verdict,cause,skill,score,heldout_skill,loss,baseline,steps,first_bad,seconds,reason
0,search,0,0.1,,16,True,adam,converging,,0.9,0.8,0.7,0.1,2.3,38,,0.25,
1,search,0,0.2,1.0,,False,adam,nan,exploding_parameters,,,,,2.3,7,7,0.0,"not finite, at step 7"
2,search,0,0.30000000000000004,5.0,32,True,adam,stalled,lr_too_low,0.0,0.0,,,2.3,300,,0.0,"flat: ""no\"""
3,search,0,0.4,,16,False,adam,error,,,,,,,0,,0.0,ValueError: bad width (case.py:7)
4,search,0,0.5,1.0,,True,adam,converging,,0.5,0.95,0.6,1.1,2.3,300,,0.0,
0,confirm,1,0.1,,16,True,adam,converging,,0.8,,0.6,0.2,2.3,300,,0.0,
0,confirm,2,0.1,,16,True,adam,converging,,0.6,,0.4,0.4,2.3,300,,0.0,
4,confirm,1,0.5,1.0,,True,adam,stalled,unknown,0.0,,,,2.3,300,,0.0,flat
"""
RANKING = """\
rank,trial,lr,clip_norm,hidden,bias,optimizer,safe,passed,runs,pass_low,pass_high,skill,heldout_skill,steps,score
1,0,0.1,,16,True,adam,True,2,2,0.3424,1.0,0.7,0.5,300.0,0.8
2,4,0.5,1.0,,True,adam,False,0,1,0.0,0.7935,0.5,0.6,300.0,0.95
"""
FAILURES = """\
cause,verdict,trials,share,where,example_trial,reason,root,phase,op,module,file,line,explanation,fix
exploding_parameters,nan,1,0.2,,1,"not finite, at step 7",,,,,,,,
lr_too_low,stalled,1,0.2,,2,"flat: ""no\""",,,,,,,,
ValueError: bad width (case.py:7),error,1,0.2,,3,ValueError: bad width (case.py:7),,,,,,,,
"""


@pytest.mark.parametrize(
    ("file", "text"), [("trials.csv", TRIALS), ("ranking.csv", RANKING), ("failures.csv", FAILURES)]
)
def test_csv_files_to_the_letter(tmp_path, file, text):
    """Columns are a contract: only ever appended to."""
    assert (reported(tmp_path) / file).read_bytes().decode() == text


@pytest.mark.parametrize("file", ["trials.csv", "ranking.csv", "failures.csv"])
def test_empty_run_has_its_headers(tmp_path, file):
    text = {"trials.csv": TRIALS, "ranking.csv": RANKING, "failures.csv": FAILURES}[file]
    assert (reported(tmp_path, []) / file).read_text() == text.splitlines()[0] + "\n"
    assert not (tmp_path / "recipe.yaml").exists()


def test_frames_have_types_to_calculate_with():
    frame = trials_frame(results(), config().axis_names)
    assert {name: str(frame[name].dtype) for name in ("trial", "seed", "steps")} == dict.fromkeys(
        ("trial", "seed", "steps"), "int64"
    )
    assert {str(frame[name].dtype) for name in ("lr", "clip_norm", "skill", "score", "loss", "seconds")} == {"float64"}
    assert str(frame["first_bad"].dtype) == "Int64"
    assert str(frame["bias"].dtype) == "bool"
    assert frame["hidden"].tolist()[:3] == [16, None, 32]
    ranking = ranking_frame(rank(results()), config().axis_names)
    assert (str(ranking["safe"].dtype), str(ranking["pass_low"].dtype)) == ("bool", "float64")
    assert failures_frame([]).empty


def test_verdicts_frame_keeps_the_recipes_as_given_and_their_order():
    given_table = pd.DataFrame(
        {"lr": ["1e-3", "", "0.50"], "note": ["a", "b", "c"], "verdict": ["old"] * 3}, index=[7, 3, 5]
    )
    frame = verdicts_frame(given_table, [results()[i] for i in (2, 3, 0)])
    assert list(frame.columns) == ["lr", "note", "verdict", "cause", "skill", "steps", "reason"]
    assert frame["lr"].tolist() == ["1e-3", "", "0.50"]
    assert frame["verdict"].tolist() == ["stalled", "error", "converging"]
    assert frame["reason"].tolist() == ['flat: "no"', "ValueError: bad width (case.py:7)", ""]
    assert frame.index.tolist() == [7, 3, 5]


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
OWN = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | FLOATS | st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=5).filter(
    lambda n: n not in TAKEN and n not in Recipe().values()
)
RECIPE = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-300, 1e300),
        "clip_norm": st.none() | st.floats(1e-9, 1e9),
        "norm": st.sampled_from([None, *NORMS]),
        "batch_size": st.integers(1, 9999),
    }
)


@steady
@given(NAMES.flatmap(lambda name: st.lists(st.tuples(RECIPE, OWN.map(lambda v: {name: v})), min_size=1, max_size=4)))
@example([({"lr": 0.1 + 0.2}, {"w": 16}), ({"lr": 5e-324}, {"w": None})])
@example([({"lr": 1.0}, {"w": 1}), ({"lr": 1.0}, {"w": 1.0}), ({"lr": 1.0}, {"w": True}), ({"lr": 1.0}, {"w": "one"})])
@example([({"lr": 1.0}, {"w": "inf"}), ({"lr": 1.0}, {"w": "nan"}), ({"lr": 1.0}, {"w": "none"})])
def test_recipes_are_read_back_from_trials_csv_as_they_were(tmp_path, rows):
    from recipefuzz.report.recipes_csv import parse_cell, read_table

    rows = [own | extra for own, extra in rows if not {"null", "true", "false"} & set(map(str, extra.values()))]
    found = [TrialResult(i, Phase.SEARCH, 0, Recipe.of(v).values(), "nan") for i, v in enumerate(rows)]
    axes = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(trials_frame(found, axes), tmp_path / "trials.csv")
    table = read_table(tmp_path / "trials.csv") if rows else []
    for i, result in enumerate(found):
        again = Recipe.of({axis: parse_cell(axis, table[axis].iloc[i]) for axis in axes})
        assert again == result.recipe
        assert again.fingerprint == result.recipe.fingerprint
        assert [type(v) for v in again.values().values()] == [type(v) for v in result.recipe.values().values()]


# --- failures


SPACE = Space(
    (("lr", Range(1e-5, 10, log=True)), ("width", Range(1, 100, integer=True)), ("norm", Choice((None, "batch"))))
)


def points(*rows) -> list[dict]:
    return [dict(zip(SPACE.names, row, strict=True)) for row in rows]


WIDE = points((0.1, 10, None), (0.1, 20, "batch"), (0.2, 30, None), (0.2, 40, "batch"))
REGIONS = [
    ("above", points((2.0, 10, None), (4.0, 20, "batch"), (8.0, 30, None)), WIDE, "lr > 1.1"),
    ("below", points((0.01, 10, None), (0.04, 20, "batch"), (0.03, 30, None)), WIDE, "lr < 0.07"),
    ("a choice", points((0.1, 10, "batch"), (0.2, 30, "batch"), (0.2, 20, "batch")), WIDE[::2], "norm = batch"),
    ("null", points((0.1, 10, None), (0.2, 40, None), (0.2, 20, None)), WIDE[1::2], "norm = null"),
    ("integers", points((0.1, 80, None), (0.2, 90, "batch"), (0.2, 99, None)), WIDE, "width > 60"),
    ("most of them", points((2.0, 1, None), (4.0, 40, "batch"), (0.1, 20, None)), WIDE, "lr > 1.1"),
    ("the same", WIDE, WIDE, ""),
    ("too few", points((2.0, 10, None), (4.0, 20, "batch")), WIDE, ""),
    ("no others", WIDE, [], ""),
]


@pytest.mark.parametrize(
    ("inside", "outside", "text"), [case[1:] for case in REGIONS], ids=[case[0] for case in REGIONS]
)
def test_region(inside, outside, text):
    assert region(inside, outside, SPACE) == text


@steady
@given(st.randoms(use_true_random=True))
def test_region_does_not_depend_on_the_order(chance):
    inside = points(*[(chance.uniform(0.5, 9), chance.randint(1, 9), chance.choice([None, "batch"])) for _ in range(6)])
    outside = points(
        *[(chance.uniform(1e-5, 2), chance.randint(3, 99), chance.choice([None, "batch"])) for _ in range(6)]
    )
    text = region(inside, outside, SPACE)
    assert region(chance.sample(inside, 6), chance.sample(outside, 6), SPACE) == text
    assert text


def gain(cut: float, inside: list[int], outside: list[int], sign: int) -> float:
    ours, others = (sum(sign * v > sign * cut for v in values) / len(values) for values in (inside, outside))
    return ours - others


@steady
@given(*[st.lists(st.integers(1, 9), min_size=3, max_size=20)] * 2)
def test_region_of_one_axis_is_its_best_cut(inside, outside):
    """Against every threshold there is."""
    space = Space((("width", Range(1, 9, integer=True)),))
    best = max(gain(cut + 0.5, inside, outside, sign) for cut in range(1, 9) for sign in (1, -1))
    text = region([{"width": v} for v in inside], [{"width": v} for v in outside], space)
    if text:
        _, sign, cut = text.split()
        assert gain(float(cut), inside, outside, 1 if sign == ">" else -1) == pytest.approx(best)
    else:
        assert best < 0.25 + 1e-9


@pytest.mark.parametrize(
    ("inside", "outside", "text"),
    [
        ([11, 12, 13], [8, 9, 10], "width > 10"),
        ([8, 9, 10], [11, 12, 13], "width < 11"),
        ([105, 110, 112], [102, 103, 104], "width > 104"),
        ([102, 103, 104], [105, 110, 112], "width < 105"),
        ([800, 900, 999], [100, 200, 300], "width > 550"),
        ([100, 200, 300], [801, 900, 999], "width < 550"),
        ([1234567, 1234568, 1234569], [1, 2, 1234566], "width > 1234566"),
    ],
)
def test_region_of_whole_numbers_names_a_whole_number_on_the_right_side(inside, outside, text):
    space = Space((("width", Range(1, 2_000_000, integer=True)),))
    assert region([{"width": v} for v in inside], [{"width": v} for v in outside], space) == text


@steady
@given(st.lists(st.floats(1e-5, 10.0), min_size=6, max_size=20, unique=True), st.sampled_from("><"))
@example([1.0, 1.001, 1.002, 1.003, 1.004, 1.005], ">")
@example([1.0, *np.nextafter(1.0, [2.0, 0.0]), 2.0, 3.0, 0.5], "<")
def test_region_of_values_that_a_cut_tells_apart_has_just_those_on_its_side(values, sign):
    space = Space((("lr", Range(1e-5, 10.0, log=True)),))
    values = sorted(values, reverse=sign == ">")
    inside, outside = values[: len(values) // 2], values[len(values) // 2 :]
    name, found, cut = region([{"lr": v} for v in inside], [{"lr": v} for v in outside], space).split()
    assert (name, found) == ("lr", sign)
    assert [v for v in values if (v > float(cut) if sign == ">" else v < float(cut))] == inside


def failed(number: int, lr: float, **more) -> TrialResult:
    return TrialResult(
        number, Phase.SEARCH, 0, Recipe(lr=lr).values() | {"width": 1 + number * 7 % 16, "norm": None}, **more
    )


def test_a_bucket_says_whose_diagnosis_it_shows():
    trials = [failed(i, 5.0, verdict="nan", cause="exploding_activations") for i in range(3)]
    diagnoses = {1: Diagnosis("nan", Root.RECIPE, "exploding_parameters")}
    (bucket,) = buckets(trials, SPACE, diagnoses)
    assert str(bucket) == "3 trials like trial 1: exploding_parameters"
    (alone,) = buckets(trials[1:2], SPACE, diagnoses)
    assert str(alone) == "1 trial: exploding_parameters"


def test_buckets():
    trials = [
        *[failed(i, 5.0, verdict="nan", cause="exploding_parameters", reason=f"at step {i}") for i in range(4)],
        *[failed(i, 0.1, verdict="converging") for i in range(4, 8)],
        *[failed(i, 1e-4, verdict="stalled", cause="lr_too_low") for i in range(8, 14)],
        failed(14, 0.1, error=f"RuntimeError: {'x' * 100}a"),
        failed(15, 0.1, error=f"RuntimeError: {'x' * 100}b"),
        TrialResult(0, Phase.CONFIRM, 1, Recipe().values(), "nan", cause="exploding_parameters"),
    ]
    slow, exploding, error = buckets(trials, SPACE)
    assert (slow.verdict, slow.cause, slow.trials, slow.share) == ("stalled", "lr_too_low", 6, 6 / 16)
    assert (exploding.trials, exploding.where, exploding.example.trial, exploding.reason) == (
        4,
        "lr > 2.5",
        2,
        "at step 2",
    )
    assert str(exploding) == "4 trials: exploding_parameters (lr > 2.5)"
    assert slow.where == "lr < 0.05"
    assert (error.verdict, error.trials, error.where) == ("error", 2, "")
    assert error.reason.endswith("xb")
    assert str(buckets([failed(0, 1.0, verdict="nan")], SPACE)[0]) == "1 trial: nan"
    assert buckets([failed(0, 1.0, verdict="converging")], SPACE) == buckets([], SPACE) == []


# --- picture and summary


def printed(what) -> str:
    out = io.StringIO()
    Console(file=out, width=140, color_system=None, **PLAIN).print(what)
    return out.getvalue()


KINDS = {
    "lr": {"low": 1e-5, "high": 10, "log": True},
    "dropout": {"low": 0.0, "high": 1.0},
    "width": {"low": 1, "high": 4},
    "depth": {"low": 1, "high": 64, "log": True},
    "noise": {"low": -1, "high": 1, "step": 0.5},
    "norm": [None, "none", "batch"],
    "bias": [True, False],
    "act": ["[relu]", "[/]", ":smile:"],
    "only": [1],
}


@pytest.mark.parametrize("count", [0, 1, 3, 40])
@pytest.mark.parametrize("name", KINDS)
def test_picture_of_every_kind_of_axis(name, count):
    made = config(space={name: KINDS[name]})
    axis = made.axes[name]
    drawn = axis.grid(count) if isinstance(axis, Range) and count else [getattr(axis, "low", None)] * 0
    drawn = drawn if isinstance(axis, Range) else [axis.options[i % len(axis.options)] for i in range(count)]
    kinds = [{"verdict": "converging"}, {"verdict": "stalled"}, {"verdict": "nan"}, {"error": "boom"}]
    found = [TrialResult(i, Phase.SEARCH, 0, {name: value}, **kinds[i % 4]) for i, value in enumerate(drawn)]
    legend, line = printed(picture(found, made.axes)).splitlines()
    assert line.split()[0] == name
    for option in KINDS[name] if isinstance(KINDS[name], list) else ():
        assert shown(option) in line
    assert ("converging" in legend) is bool(found)
    for result in found:
        assert f"{result.verdict or 'error'} " in legend


def test_picture_shows_the_share_that_converged():
    space = Space((("norm", Choice((None, "batch"))), ("lr", Range(0, 1))))
    found = [
        TrialResult(i, Phase.SEARCH, 0, {"norm": None, "lr": i / 3}, "converging" if i else "nan") for i in range(4)
    ]
    lines = printed(picture(found, space)).splitlines()
    assert lines[0].endswith("■ converging 3  ■ nan 1  ")
    assert "null ▆ 75%  batch · -" in lines[1]
    assert lines[2].split()[1:] == ["0", "▁·······█·······█······█", "1"]


def test_values_of_a_coarse_axis_are_its_columns():
    lr, width = Range(1e-4, 1, log=True), Range(16, 64, integer=True, step=16)
    space = Space((("lr", lr), ("width", width)))
    of_width = {16: "nan", 32: "converging", 48: "stalled", 64: "converging"}
    found = [
        TrialResult(0, Phase.SEARCH, 0, {"lr": x, "width": w}, of_width[w]) for x in lr.grid(5) for w in width.grid(5)
    ]
    drawn = printed(picture(found, space, grid_points=5)).splitlines()[1:]
    assert [line.split()[1:4] for line in drawn] == [["0.0001", "▄▄▄▄▄", "1"], ["16", "▁█▁█", "64"]]
    on_no_grid = printed(picture(found, space)).splitlines()[1:]
    assert [len(line.split()[2]) for line in on_no_grid] == [24, 4]  # the values of a step are known without one


CLIP = Choice((None, 5))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("clip", CLIP, "lr", Range(0, 2)), ["clip", "null ××░░██", "5 ××░░██", "lr 0 to 2"]),
        (("lr", Range(0, 2), "clip", CLIP), ["clip", "null ××░░██", "5 ××░░██", "lr 0 to 2"]),
        (("a", Range(0, 2), "lr", Range(0, 2)), ["a", "2 ××░░██", "1 ××░░██", "0 ××░░██", "lr 0 to 2"]),
    ],
    ids=["choice and range", "range and choice", "two ranges"],
)
def test_a_grid_of_two_axes_is_drawn_as_a_map(axes, expected):
    space = Space(((axes[0], axes[1]), (axes[2], axes[3])))
    (up, rows), (lr, columns) = sorted(space.axes, key=lambda pair: pair[0])
    verdicts = ["nan", "stalled", "converging"]
    found = [
        TrialResult(0, Phase.SEARCH, 0, {up: u, lr: x}, verdict)
        for u in rows.grid(3)
        for x, verdict in zip(columns.grid(3), verdicts, strict=True)
    ]
    legend, *lines = printed(grid_map(found, space, 3)).splitlines()
    assert [" ".join(line.split()) for line in lines] == expected
    assert legend.split()[-6:] == ["██", "converging", "░░", "stalled", "××", "nan"]
    first = printed(grid_map(found[1:], space, 3)).splitlines()[2 if len(rows.grid(3)) == 2 else -2]
    assert first.split()[1:] == ["·", "░░██"], "the recipe that is still to come"


def test_only_a_grid_that_fits_is_drawn_as_a_map():
    lr, clip = ("lr", Range(0, 1)), ("clip", CLIP)
    for axes, points in [((lr,), 3), ((clip, ("norm", CLIP)), 3), ((lr, clip, ("b", lr[1])), 3), ((lr, clip), 25)]:
        assert grid_map([], Space(axes), points) is None
    searched = {"space": {"lr": KINDS["lr"], "clip_norm": [None, 1]}, "search": {"sampler": "grid"}}
    for sampler, drawn in (("grid", True), ("random", False)):
        made = config(**searched | {"search": {"sampler": sampler}})
        found = [TrialResult(0, Phase.SEARCH, 0, {"lr": 1e-5, "clip_norm": 1}, "nan")]
        text = printed(summary(Path(), made, found, [], {}, Peak(0, 0)))
        assert ("every recipe of the grid" in text) is drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (0.123456, "0.123"), (1e-05, "1e-05"), (64, "64"), (True, "true"), ("rms", "rms")],
)
def test_values_for_people(value, text):
    assert shown(value) == text


@steady
@given(st.lists(st.floats(-1e300, 1e300), max_size=50))
@example([1.0])
def test_sparkline_is_a_block_for_each_of_at_most_16_stretches(values):
    line = sparkline(values)
    assert len(line) == min(16, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█")
    assert not values or "▁" in line


@pytest.mark.parametrize("found", [[], results()[:3], results()], ids=["empty", "unconfirmed", "all"])
def test_summary_is_printed_whatever_there_is(tmp_path, found):
    text = printed(summary(reported(tmp_path, found), config(), found, rank(found), {}, Peak(300, 280)))
    assert "files in " in text
    assert "peak memory: 300 MB, and 280 MB in a worker at most" in text
    assert ("1 safe recipe" in text) is (len(found) > 5)
    assert ("1 trial: exploding_parameters" in text) is bool(found)


# --- progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_draws_by_the_clock_and_not_by_the_trial(monkeypatch, terminal):
    drawn = []
    monkeypatch.setattr(Progress, "_render", lambda _: drawn.append(1) or "bar")
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None, **PLAIN)
    progress, start = Progress(screen, ["lr"]), time.monotonic()
    progress.begin(Phase.SEARCH, [], 2000)
    for number in range(2000):
        progress.finished(trial(0, verdict="converging" if number == 7 else "nan"))
    progress.close()
    assert len(drawn) <= (5 + 10 * (time.monotonic() - start) if terminal else 0)
    assert "search 2000/2000; 1 converging, 1999 nan; " in screen.file.getvalue()
    assert screen.file.getvalue().endswith("; best so far trial 0: lr 0.1\n")


# --- files


def test_recipe_yaml_can_be_pasted_into_a_config(tmp_path):
    text = (reported(tmp_path) / "recipe.yaml").read_text()
    assert (
        text.splitlines()[0]
        == "# the best recipe of study made-up (trial 0): 2 of 2 confirming runs converged, skill 0.7"
    )
    assert list(yaml.safe_load(text)["recipe"]) == list(config().axis_names)
    (tmp_path / "pasted.yaml").write_text(f"target: {{data: digits, model: mlp}}\n{text}")
    assert load_config(tmp_path / "pasted.yaml").default_recipe() == results()[0].recipe


@steady
@given(st.dictionaries(NAMES, OWN, min_size=1, max_size=4), st.floats(1e-300, 1e300))
@example({"act": "1e5", "on": "no", "n": "null", "x": " a: b # c\n"}, 1e-5)
def test_any_recipe_can_be_pasted_into_a_config(tmp_path, own, lr):
    made = config(space={"lr": [lr]}, recipe=own)
    found = [TrialResult(0, Phase.SEARCH, 0, made.recipe_of({"lr": lr}).values(), "converging")]
    text = winner_yaml(rank(found)[0], made)
    (tmp_path / "pasted.yaml").write_text(f"target: {{data: digits, model: mlp}}\n{text}")
    assert load_config(tmp_path / "pasted.yaml").default_recipe() == found[0].recipe


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("step", ["trials_frame", "ranking_frame", "failures_frame", "buckets", "winner_yaml"])
def test_what_goes_wrong_in_the_middle_leaves_every_file_whole(tmp_path, monkeypatch, step):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    old, new = contents(reported(folder, results()[:1] + results()[5:7])), contents(reported(other))
    assert old["trials.csv"] != new["trials.csv"]

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, step, broken)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        reported(folder)
    now = contents(folder)
    assert now.keys() == old.keys()
    assert all(text in (old[name], new[name]) for name, text in now.items())


def test_full_disk_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    old = contents(reported(tmp_path))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunFailedError, match=r"trials\.csv: can't write the file: No space left on device\n  fix: +make room"
    ):
        reported(tmp_path, [])
    assert contents(tmp_path) == old


@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError, OSError(errno.EIO, "Input/output error")])
def test_nothing_half_written_is_left_behind(tmp_path, monkeypatch, what):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def broken(_):
        raise what

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunFailedError if isinstance(what, OSError) else what, match=r"Input/output error|^$"):
        write_atomically(path, "new")
    assert contents(tmp_path) == {"file.txt": "old"}


def test_atomic_file_is_as_any_other(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "lines\nend in \\n, ä, and half a character: \ud800\n")
    assert path.read_bytes() == b"lines\nend in \\n, \xc3\xa4, and half a character: \\ud800\n"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    before = os.umask(0o077)
    try:
        write_atomically(path, "for my eyes")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunFailedError, match=r"missing/file\.txt: can't write the file: No such file or directory"):
        write_atomically(tmp_path / "missing" / "file.txt", "")


def test_winner_that_is_none_any_more_is_taken_away(tmp_path):
    assert (reported(tmp_path) / "recipe.yaml").exists()
    assert not (reported(tmp_path, results()[:5]) / "recipe.yaml").exists()
    unconfirmed = config(search={"confirm": {"top": 0}})
    assert (reported(tmp_path, results()[:5], unconfirmed) / "recipe.yaml").exists()


# --- status


def run(folder: Path, made: Config, found: list[TrialResult], *, held: bool = False) -> list[str]:
    """The status of a run with these results."""
    run_folder = RunFolder(folder)
    store = run_folder.open(made, {}, fresh=False)
    study = store.begin(identity(made, {}), made.axes, made.search, 4)
    waiting = []
    for result in found:
        while result.phase is Phase.SEARCH and result.trial not in waiting:
            waiting += [asked.number for asked in study.refill()]
        study.record_all([result], elapsed=2.0 * (result.trial + 1), peak=Peak(300 + result.trial, 290 - result.trial))
    if not held:
        store.close()
    try:
        return list(status_lines(run_folder))
    finally:
        store.close()


def test_status_of_a_new_run(tmp_path):
    assert run(tmp_path / "run", config(), []) == [
        f"made-up: stopped; 6 trials are left: recipefuzz search {tmp_path}/run/config.yaml",
        "  search   0 of 6 trials: none yet",
        "  confirm  0 of 0 runs: none yet",
    ]


def test_status_of_a_stopped_run(tmp_path):
    assert run(tmp_path / "run", config(), results()[:5]) == [
        f"made-up: stopped; 1 trials are left: recipefuzz search {tmp_path}/run/config.yaml",
        "  search   5 of 6 trials: 2 converging, 1 stalled, 1 nan, 1 error",
        "  confirm  0 of 4 runs: none yet",
        "  speed    0.50 trials/s over 10 s of search",
        "  memory   at its peak 304 MB, and 290 MB in a worker at most",
        "  best     trial 4: lr 0.5, clip_norm 1, hidden null, bias true; skill 0.500, passed 0/0",
    ]


def test_status_of_a_run_that_is_at_work_and_of_one_that_is_done(tmp_path):
    made = config(search={"trials": 5, "confirm": {"top": 2, "seeds": 2}})
    assert run(tmp_path / "run", made, results()[:2], held=True)[0] == "made-up: running"
    state, search, confirm, *_, best_so_far = run(tmp_path / "run", made, results()[2:])
    assert state == f"made-up: stopped; 1 confirming runs are left: recipefuzz search {tmp_path}/run/config.yaml"
    assert search == "  search   5 of 5 trials: 2 converging, 1 stalled, 1 nan, 1 error"
    assert confirm == "  confirm  3 of 4 runs: 2 converging, 1 stalled"
    assert best_so_far == "  best     trial 0: lr 0.1, clip_norm null, hidden 16, bias true; skill 0.700, passed 2/2"
    done = run(tmp_path / "run", made, [trial(4, Phase.CONFIRM, seed=2, verdict="nan")])
    assert (done[0], done[2]) == ("made-up: done", "  confirm  4 of 4 runs: 2 converging, 1 stalled, 1 nan")


def test_status_of_a_grid_that_has_no_more_points(tmp_path):
    made = config(space={"norm": [None, "batch"]}, search={"sampler": "grid", "trials": 100})
    found = [TrialResult(i, Phase.SEARCH, 0, {"norm": None}, "stalled") for i in range(2)]
    assert run(tmp_path / "run", made, found)[:2] == ["made-up: done", "  search   2 of 2 trials: 2 stalled"]


# --- init


@pytest.mark.parametrize("name", ["study.yaml", "my study.yaml", "1e5.yaml", "2024.yml", "no.yaml", "config.yaml"])
def test_template_is_a_config_and_overwrites_nothing(tmp_path, name):
    path = tmp_path / name
    lines = write_template(path, "my_model:build", "my_model:load", "cross_entropy")
    assert lines == [
        f"wrote {path}",
        f"wrote {tmp_path / 'my_model.py'}: put your model and data there",
        f"next: recipefuzz search {path}",
    ]
    made = load_config(path)
    assert (made.target.model, made.target.data, made.target.loss) == (
        "my_model:build",
        "my_model:load",
        "cross_entropy",
    )
    assert made.axes.names == ("lr", "init_scale", "clip_norm")
    assert made.default_recipe().optimizer == "adam"
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"the file exists\n  fix: +give another name"):
        write_template(path, "mlp", "digits", "mse")
    assert contents(tmp_path) == before
    write_template(tmp_path / "other.yaml", "my_model:build", "digits", "mse")
    assert contents(tmp_path)["my_model.py"] == before["my_model.py"]


def test_template_for_what_is_built_in_writes_no_module(tmp_path):
    assert len(write_template(tmp_path / "a.yaml", "mlp", "digits", "mse")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    with pytest.raises(InputError, match=r"missing: no such folder"):
        write_template(tmp_path / "missing" / "a.yaml", "mlp", "digits", "mse")


def test_score_and_curve_of_numbers_at_the_edge_are_finite():
    from recipefuzz.trace import Trace

    curve = Trace(loss=pd.Series([1.7e308] * 100 + [math.inf, math.nan]).to_numpy()).curve(8)
    assert all(map(math.isfinite, curve))
    assert len(curve) == 8
