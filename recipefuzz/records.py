"""Frozen records read back from files that others may have written: every field is of its type, or it is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from recipefuzz.errors import printable, shorten
from recipefuzz.recipe import is_finite

MAX_DEPTH = 20  # of plain values in a field that may hold anything: ours are flat, and deep ones end in the stack
MOST = 2**63  # whole numbers that tables take


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Record = TypeVar("Record", bound=_Dataclass)


def read_record(kind: type[Record], record: object) -> Record:
    """A record of a dataclass from plain data, as JSON gives it.

    Text loses its control characters, for it is printed; an axis' values stay as they are, for they are compared.
    Keys that are no fields are passed over: written for other programs, or by a newer version. JSON has no NaN and no
    infinity, so neither has a record.

    Raises:
        ValueError: a field that is missing, or of another type than its annotation says.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{shorten(record)} is no {kind.__name__}")
    hints = _hints(kind)
    own = {name: value for name, value in record.items() if name in hints}
    for field in kind.__dataclass_fields__.values():
        if field.name not in own and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"a {kind.__name__} without {field.name}")
    return kind(**{name: _read(value, hints[name], name) for name, value in own.items()})


def read_plain(value: object, depth: int = 0) -> Any:
    """Plain data of any kind, but not nested without end.

    Raises:
        ValueError: it is.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): read_plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [read_plain(inner, depth + 1) for inner in value]
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(value: Any, hint: Any, name: str) -> Any:
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return read_plain(value)
    if NoneType in inner and len(inner) == 2:
        return None if value is None else _read(value, inner[0], name)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(item, inner[0], name) for item in value)
    if kind is Mapping and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _read(item, inner[1], name) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return read_record(hint, value)
    return _scalar(value, inner if kind is UnionType else (hint,), name)


def _scalar(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """One value of one of these types; with several of them, as an axis has, it stays as it is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not is_finite(value):
        raise ValueError(f"{name} is not finite")
    if len(kinds) > 1 and isinstance(value, kinds):
        return value
    if kinds == (float,) and number:
        return float(value)
    if kinds == (int,) and number and isinstance(value, int) and -MOST <= value < MOST:
        return value
    if kinds == (str,) and isinstance(value, str):
        return printable(value)
    if isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        return kinds[0](value)
    raise ValueError(f"{name} can't be {shorten(value) or 'null'}")
