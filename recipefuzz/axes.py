"""The `space:` and `recipe:` sections of a config: what the user wrote -> axes and values, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recipefuzz.errors import InputError, did_you_mean, nearest, shorten
from recipefuzz.recipe import AXES, Scalar, is_finite
from recipefuzz.source import Source
from recipefuzz.space import Axis, Choice, Range, Space

MOST_INTEGER = 2**53  # above it not every whole number is a float, and samplers compute in floats
MOST_STEPS = 1e9
RANGE_KEYS = ("low", "high", "log", "step", "integer")
# fmt: off
TAKEN = frozenset((  # columns of the run's tables that are no axes: an axis of such a name would hide the column
    "trial", "phase", "seed", "verdict", "cause", "skill", "score", "heldout_skill", "loss", "baseline", "steps",
    "first_bad", "seconds", "reason", "rank", "safe", "passed", "runs", "pass_low", "pass_high",
))
# fmt: on


def parse_space(section: Mapping[str, Any], source: Source) -> Space:
    """Axes in the order of the file.

    Raises:
        InputError: an axis that is not a range or a list, or whose values its rule does not accept.
    """
    return Space(tuple((name, _axis(name, spec, source)) for name, spec in section.items()))


def parse_values(section: Mapping[str, Any], source: Source) -> dict[str, Scalar]:
    """The fixed values of `recipe:`.

    Raises:
        InputError: a value that the axis' rule does not accept.
    """
    for name, value in section.items():
        _check_name(name, source, "recipe")
        if isinstance(value, (dict, list)):
            raise InputError(
                "one value belongs here",
                place=source.place("recipe", name),
                found=value,
                fix=f"put ranges and lists under space: {{{name}: ...}}",
            )
        check_value(name, value, source, "recipe", name)
    return dict(section)


def check_value(name: str, value: Any, source: Source, *path: str | int) -> None:
    """Raise an InputError unless `value` is a scalar that the axis accepts."""
    place = source.place(*path)
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise InputError("not a single value", place=place, found=value, expected="a number, a word or null")
    if isinstance(value, (int, float)) and not is_finite(value):
        raise InputError("not a finite number", place=place, found=value)
    rule = AXES.get(name)
    if rule is not None and not rule.accepts(value):
        near = nearest(value, rule.words) if isinstance(value, str) and rule.words else ""
        quoted = isinstance(value, str) and not rule.words
        fix = f"did you mean {near!r}?" if near else "a number has no quotes" if quoted else ""
        raise InputError(
            f"not a value of {name} ({rule.meaning})",
            place=place,
            found=repr(value) if quoted else _shown(value),
            expected=rule.expected,
            fix=fix,
        )


def _axis(name: str, spec: Any, source: Source) -> Axis:
    _check_name(name, source, "space")
    place = source.place("space", name)
    if isinstance(spec, list):
        return _choice(name, spec, source)
    if isinstance(spec, dict):
        return _range(name, spec, source)
    raise InputError(
        "not an axis",
        place=place,
        found=_shown(spec),
        expected="a range {low: ..., high: ..., log: true} or a list of choices",
        fix=f"one fixed value belongs under recipe: {{{name}: {shorten(_shown(spec))}}}",
    )


def _check_name(name: str, source: Source, section: str) -> None:
    if name in TAKEN:
        raise InputError(
            f"an axis can't be called {name!r}",
            place=source.place(section, name),
            expected=f"a name that is no column of the run's tables ({', '.join(sorted(TAKEN))})",
            fix="rename the factory's argument, or set a fixed value under target: {model_args: ...}",
        )


def _choice(name: str, options: list[Any], source: Source) -> Choice:
    if not options:
        raise InputError("an empty list of choices", place=source.place("space", name), expected="at least one value")
    for i, option in enumerate(options):
        check_value(name, option, source, "space", name, i)
        if option in options[:i]:
            twin = next(o for o in options if o == option)
            fix = "" if type(option) is type(twin) else f"it equals {_shown(twin)}: keep one of them"
            place = source.place("space", name, i)
            raise InputError("this choice stands twice", place=place, found=_shown(option), fix=fix)
    return Choice(tuple(options))


def _range(name: str, spec: dict[str, Any], source: Source) -> Range:
    for key in spec:
        if key not in RANGE_KEYS:
            raise InputError(
                f"unknown key {key!r} of a range",
                place=source.place("space", name, key),
                expected=", ".join(RANGE_KEYS),
                fix=did_you_mean(str(key), RANGE_KEYS),
            )
    for key in ("low", "high"):
        if key not in spec:
            raise InputError(f"a range without {key!r}", place=source.place("space", name), found=spec)
        _number(spec[key], source, "space", name, key)
    for key in ("log", "integer"):
        if not isinstance(spec.get(key, False), bool):
            place = source.place("space", name, key)
            raise InputError("not true or false", place=place, found=_shown(spec[key]), expected="true or false")
    if spec.get("step") is not None:
        _number(spec["step"], source, "space", name, "step")
    found = Range(spec["low"], spec["high"], spec.get("log", False), _is_integer(name, spec), spec.get("step"))
    _check_range(name, found, source)
    for key in ("low", "high"):
        check_value(name, spec[key], source, "space", name, key)
    return found


def _is_integer(name: str, spec: dict[str, Any]) -> bool:
    """Said, or known of the axis; an axis of the user's own is integer where all its numbers are."""
    if name in AXES:
        return AXES[name].integer or bool(spec.get("integer", False))
    whole = all(isinstance(spec[k], int) for k in ("low", "high", "step") if spec.get(k) is not None)
    return bool(spec.get("integer", whole))


def _shown(value: Any) -> Any:
    """A value as it is written in YAML."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value


def _number(value: Any, source: Source, *path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError("not a number", place=source.place(*path), found=_shown(value), expected="a number")
    if not is_finite(value):
        raise InputError("not a finite number", place=source.place(*path), found=value)


def _check_range(name: str, axis: Range, source: Source) -> None:
    place, low, high = source.place("space", name), axis.low, axis.high
    shown = f"low: {low}, high: {high}"
    if low > high:
        fix = f"swap them: low: {high}, high: {low}"
        raise InputError("a reversed range", place=place, found=shown, expected="low < high", fix=fix)
    if low == high:
        fix = f"one fixed value belongs under recipe: {{{name}: {low}}}"
        raise InputError("an empty range", place=place, found=shown, expected="low < high", fix=fix)
    if axis.log and low <= 0:
        fix = f"start above zero, such as low: {high / 1e4:g}, or drop log" if high > 0 else "drop log"
        raise InputError("a log range can't reach 0", place=place, found=shown, expected="low > 0", fix=fix)
    if axis.integer and (low != int(low) or high != int(high)):
        raise InputError("an integer range with a fraction", place=place, found=shown, expected="whole low and high")
    if not math.isfinite(float(high) - float(low)) or (axis.integer and max(-low, high) > MOST_INTEGER):
        raise InputError("a range too wide to be computed with", place=place, found=shown)
    if axis.step is not None:
        _check_step(name, axis, axis.step, source)


def _check_step(name: str, axis: Range, step: float, source: Source) -> None:
    place, where, width = source.place("space", name), source.place("space", name, "step"), axis.high - axis.low
    if axis.log:
        raise InputError("log and step together", place=place, fix="keep one of them")
    if not 0 < step <= width:
        bounds = f"more than 0, at most {width:g}"
        raise InputError("not a step of this range", place=where, found=step, expected=bounds)
    if width / step > MOST_STEPS:
        fix = "a larger step, or none: then any value is taken"
        raise InputError(f"more than {MOST_STEPS:g} steps in this range", place=where, found=step, fix=fix)
    if axis.integer and step != int(step):
        raise InputError("a step with a fraction in an integer range", place=where, found=step)
