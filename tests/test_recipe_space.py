"""Recipes are values, axes know what they accept, and the distance in a space is a metric."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from recipefuzz.recipe import AXES, NORMS, OPTIMIZERS, PRECISIONS, SCALINGS, AxisRule, Recipe
from recipefuzz.space import Choice, Range, Space

steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

RULED = {
    "lr": st.floats(1e-12, 1e6),
    "init_scale": st.floats(1e-12, 1e6),
    "norm": st.sampled_from([None, *NORMS]),
    "clip_norm": st.none() | st.floats(1e-6, 1e6) | st.integers(1, 100),
    "clip_value": st.none() | st.floats(1e-6, 1e6),
    "optimizer": st.sampled_from(OPTIMIZERS),
    "weight_decay": st.none() | st.floats(0, 10),
    "warmup_steps": st.integers(0, 1000),
    "batch_size": st.integers(1, 4096),
    "precision": st.sampled_from(PRECISIONS),
    "input_norm": st.sampled_from(SCALINGS),
    "target_norm": st.sampled_from(SCALINGS),
}
SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
EXTRA = st.dictionaries(st.sampled_from(["width", "depth", "dropout", "bias"]), SCALARS)
VALUES = st.fixed_dictionaries({}, optional=RULED).flatmap(lambda own: EXTRA.map(lambda extra: own | extra))


@steady
@given(VALUES)
def test_recipe_gives_back_its_values(values):
    recipe = Recipe.of(values)
    assert recipe.values() == Recipe().values() | values
    assert Recipe.of(recipe.values()) == recipe
    assert recipe.but(lr=3) == Recipe.of(values | {"lr": 3.0})


@steady
@given(VALUES, st.randoms(use_true_random=False))
def test_order_of_the_values_does_not_matter(values, random):
    names = list(values)
    random.shuffle(names)
    recipe, other = Recipe.of(values), Recipe.of({name: values[name] for name in names})
    assert recipe == other
    assert hash(recipe) == hash(other)
    assert recipe.fingerprint == other.fingerprint


@steady
@given(VALUES, VALUES)
@example({"width": 1}, {"width": 1.0})
@example({"bias": True}, {"bias": 1})
@example({"dropout": 0.0}, {"dropout": -0.0})
@example({"width": None}, {})
@example({"width": "1"}, {"width": 1})
@example({"clip_norm": 5}, {"clip_norm": 5.0})
@example({"lr": math.nextafter(0.1, 1)}, {"lr": 0.1})
def test_fingerprints_are_equal_exactly_where_recipes_are(one, two):
    one, two = Recipe.of(one), Recipe.of(two)
    assert (one.fingerprint == two.fingerprint) == (one == two)


def test_fingerprint_is_the_same_on_every_machine():
    assert Recipe().fingerprint == "c45f4b0494e4"
    assert Recipe.of({"lr": 0.1, "width": 64, "clip_norm": None, "bias": False}).fingerprint == "1a173f4db2d0"


def test_recipe_is_frozen_and_hashable():
    recipe = Recipe.of({"lr": 0.1, "width": 64})
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'lr'"):
        recipe.lr = 1.0
    assert len({recipe, Recipe.of({"width": 64, "lr": 0.1}), Recipe()}) == 2


def test_but_refuses_what_of_refuses():
    with pytest.raises(ValueError, match=r"^lr = -1: expected a number > 0$"):
        Recipe().but(lr=-1)


def test_known_axes_are_the_fields_and_defaults_obey_their_rules():
    names = [field.name for field in dataclasses.fields(Recipe)]
    assert names == [*AXES, "extra"]
    assert all(AXES[name].accepts(value) for name, value in Recipe().values().items())


HUGE, NAN, INF = 10**400, math.nan, math.inf
NOT_NUMBERS = [True, "1", "", NAN, INF, -INF, HUGE]
RULES = [
    # axis, accepted, refused
    ("lr", [1, 0.1, 1e-300], [0, 0.0, -1, None, *NOT_NUMBERS]),
    ("init_scale", [1, 30.5], [0, -0.1, None, *NOT_NUMBERS]),
    ("norm", [None, *NORMS], ["Batch", "instance", "", 0, False, 1.5, NAN]),
    ("clip_norm", [None, 1, 0.5], [0, -1, *NOT_NUMBERS]),
    ("clip_value", [None, 1, 0.5], [0, -1, *NOT_NUMBERS]),
    ("optimizer", OPTIMIZERS, [None, "SGD", "lion", 1, True]),
    ("weight_decay", [None, 0, 0.0, 0.1], [-0.1, *NOT_NUMBERS]),
    ("warmup_steps", [0, 10, 10.0], [-1, 0.5, None, *NOT_NUMBERS]),
    ("batch_size", [1, 64, 64.0], [0, 1.5, None, *NOT_NUMBERS]),
    ("precision", PRECISIONS, [None, "float32", 32]),
    ("input_norm", SCALINGS, [None, "standardise", False]),
    ("target_norm", SCALINGS, [None, "standardise", False]),
]


def test_every_axis_is_in_the_table():
    assert [axis for axis, *_ in RULES] == list(AXES)


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis, good, _ in RULES for value in good])
def test_axis_accepts(axis, value):
    kept = Recipe.of({axis: value}).values()[axis]
    assert kept == value
    if not (value is None or AXES[axis].words):
        assert type(kept) is (int if AXES[axis].integer else float)


@pytest.mark.parametrize(
    ("axis", "value"),
    [(axis, value) for axis, _, bad in RULES for value in bad],
    ids=lambda value: "huge" if value is HUGE else repr(value),
)
def test_axis_refuses(axis, value):
    assert not AXES[axis].accepts(value)
    if value is not HUGE:
        with pytest.raises(ValueError, match=rf"^{axis} = .*: expected "):
            Recipe.of({axis: value})


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (AXES["lr"], "a number > 0"),
        (AXES["clip_norm"], "a number > 0, or null"),
        (AXES["batch_size"], "an integer >= 1"),
        (AXES["optimizer"], "one of sgd, momentum, adam, adamw, rmsprop"),
        (AXES["norm"], "one of none, batch, layer, group, rms, or null"),
    ],
)
def test_rule_in_words(rule: AxisRule, text):
    assert rule.expected == text


@st.composite
def ranges(draw) -> Range:
    kind = draw(st.sampled_from(["plain", "log", "integer", "integer log", "stepped", "integer stepped"]))
    if kind in ("integer", "integer log", "integer stepped"):
        low = draw(st.integers(1 if "log" in kind else -1000, 1000))
        step = draw(st.integers(1, 50)) if "stepped" in kind else None
        high = low + draw(st.integers(step or 1, 5000))
        return Range(low, high, log="log" in kind, integer=True, step=step)
    if kind == "stepped":
        step = draw(st.sampled_from([0.1, 0.25, 0.3, 1e-3, 2.5]))
        low = draw(st.integers(-100, 100)) / 10
        rest = draw(st.sampled_from([0, step / 3]))
        return Range(low, round(low + step * draw(st.integers(1, 40)) + rest, 6), step=step)
    low = draw(st.floats(1e-30, 1e6) if kind == "log" else st.floats(-1e6, 1e6))
    high = draw(st.floats(low, 1e9, exclude_min=True))
    assume(low < high * (1 - 1e-9) if kind == "log" else high - low > 1e-6)
    return Range(low, high, log=kind == "log")


def between(axis: Range, share: float) -> float:
    """A value of the range, integers and steps included."""
    at = [axis.low, axis.high]
    if axis.log:
        value = min(max(at[0] * (at[1] / at[0]) ** share, at[0]), at[1])
    else:
        value = min(max(at[0] + share * (at[1] - at[0]), at[0]), at[1])
    if axis.step:
        return axis.low + axis.step * ((value - axis.low) // axis.step)
    return round(value) if axis.integer else value


SHARES = st.floats(0, 1)


@steady
@given(ranges(), SHARES)
def test_range_contains_its_values_and_their_position_is_a_share(axis, share):
    value = between(axis, share)
    assert axis.contains(value)
    assert -1e-9 <= axis.position(value) <= 1 + 1e-9
    assert (axis.position(axis.low), axis.position(axis.high)) == (0, 1)


@steady
@given(ranges(), SHARES, SHARES)
def test_position_keeps_the_order(axis, a, b):
    a, b = sorted([between(axis, a), between(axis, b)])
    assert axis.position(a) <= axis.position(b)


@steady
@given(ranges(), st.floats(1e-6, 1e6))
def test_range_refuses_what_lies_outside(axis, off):
    assert not axis.contains(axis.low - off)
    assert not axis.contains(axis.high + off)


@steady
@given(ranges())
def test_range_refuses_what_is_no_number(axis):
    assert not any(axis.contains(value) for value in (None, True, False, "1", math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(
    ("axis", "good", "bad"),
    [
        (Range(1, 8, integer=True), [1, 8, 4.0], [0, 9, 4.5]),
        (Range(0, 1, step=0.1), [0, 0.1, 0.3, 0.1 * 3, 0.7, 1.0], [0.05, 0.31]),
        (Range(16, 100, integer=True, step=16), [16, 32, 96], [17, 100, 112]),
        (Range(1e-5, 10, log=True), [1e-5, 1, 10], [0, 9e-6, 10.1]),
    ],
)
def test_range_contains_table(axis, good, bad):
    assert [v for v in good if not axis.contains(v)] == []
    assert [v for v in bad if axis.contains(v)] == []


@pytest.mark.parametrize(
    ("axis", "value", "position"),
    [
        (Range(1e-5, 1e1, log=True), 1e-2, 0.5),
        (Range(1e-300, 1e300, log=True), 1.0, 0.5),
        (Range(0, 8), 2, 0.25),
        (Range(3, 3), 3, 0.0),
    ],
)
def test_position_table(axis, value, position):
    assert axis.position(value) == pytest.approx(position)


@steady
@given(ranges(), st.integers(2, 30))
@example(Range(-1.0, 1e-9), 2)  # -1 + (1e-9 + 1) is more than 1e-9
@example(Range(0.0, 1.0, step=0.1), 30)  # 1 // 0.1 is 9
def test_grid_is_made_of_distinct_rising_values_of_the_range_with_both_ends(axis, points):
    grid = axis.grid(points)
    assert len(grid) <= points
    assert all(a < b for a, b in pairwise(grid))
    assert all(axis.contains(value) for value in grid)
    assert grid[0] == axis.low
    assert axis.high - grid[-1] < axis.step if axis.step else grid[-1] == axis.high


@pytest.mark.parametrize(
    ("axis", "points", "grid"),
    [
        (Range(0.0, 1.0), 5, (0, 0.25, 0.5, 0.75, 1)),
        (Range(1e-4, 1, log=True), 3, (1e-4, 1e-2, 1)),
        (Range(1, 3, integer=True), 5, (1, 2, 3)),
        (Range(16, 128, integer=True), 5, (16, 44, 72, 100, 128)),
        (Range(1, 1000, log=True, integer=True), 4, (1, 10, 100, 1000)),
        (Range(0.0, 1.0, step=0.1), 20, (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        (Range(0.0, 1.0, step=0.1), 3, (0, 0.5, 1)),
        (Range(0.0, 1.0, step=0.3), 9, (0, 0.3, 0.6, 0.9)),
        (Range(16, 100, integer=True, step=32), 9, (16, 48, 80)),
        (Range(2.0, 3.0), 1, (2.0,)),
    ],
)
def test_grid_table(axis, points, grid):
    assert axis.grid(points) == pytest.approx(grid, rel=1e-12)
    assert all(isinstance(value, int if axis.integer else float) for value in axis.grid(points))


def test_choice_with_null_and_bools():
    axis = Choice((None, True, 1.5, "a"))
    assert [v for v in (None, True, 1.5, "a") if not axis.contains(v)] == []
    assert [v for v in (False, 1, 0, "", "A", "None", math.nan) if axis.contains(v)] == []
    assert axis.grid(2) == axis.options
    assert not Choice((1, 0)).contains(True)
    assert (axis.distance(None, "a"), axis.distance(None, None)) == (1, 0)


CHOICES = st.lists(st.none() | st.booleans() | st.integers(2, 9) | st.text(max_size=3), min_size=1, unique=True)
AXIS = ranges() | CHOICES.map(lambda options: Choice(tuple(options)))


@st.composite
def spaces_with_points(draw) -> tuple[Space, list[dict]]:
    axes = draw(st.lists(AXIS, min_size=1, max_size=4))
    points = [
        {
            f"axis{i}": draw(st.sampled_from(a.options)) if isinstance(a, Choice) else between(a, draw(SHARES))
            for i, a in enumerate(axes)
        }
        for _ in range(3)
    ]
    return Space(tuple((f"axis{i}", a) for i, a in enumerate(axes))), points


@steady
@given(spaces_with_points())
def test_distance_is_a_metric(drawn):
    space, (a, b, c) = drawn
    assert space.distance(a, a) == 0
    assert (space.distance(a, b) > 0) == (a != b) or all(
        math.isclose(a[n], b[n], rel_tol=1e-12, abs_tol=1e-12) for n in space.names if a[n] != b[n]
    )
    assert space.distance(a, b) == space.distance(b, a)
    assert space.distance(a, c) <= space.distance(a, b) + space.distance(b, c) + 1e-9
    assert space.distance(a, b) <= math.sqrt(len(space.names)) + 1e-9


@steady
@given(spaces_with_points())
def test_space_contains_its_points(drawn):
    space, points = drawn
    assert all(space.contains(point) for point in points)
    name = space.names[0]
    assert not space.contains({n: v for n, v in points[0].items() if n != name})
    assert not space.contains(points[0] | {name: math.nan})
    assert space.contains(points[0] | {"something else": 1})


def test_space_distance_by_hand():
    space = Space((("lr", Range(1e-4, 1, log=True)), ("norm", Choice(("none", "batch"))), ("width", Range(0, 10))))
    a, b = {"lr": 1e-4, "norm": "none", "width": 2}, {"lr": 1e-2, "norm": "batch", "width": 7}
    assert space.distance(a, b) == pytest.approx(math.sqrt(0.25 + 1 + 0.25))
    assert space["width"] == Range(0, 10)
