"""YAML read as plain data, remembering the line of every key, so that an error can point at it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipefuzz.errors import InputError, Place

EXPONENT = re.compile(r"^[-+]?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+$")  # YAML 1.2 needs no dot, PyYAML does
HALF = re.compile("[\ud800-\udfff]")  # as YAML's "\ud83d" makes them; UTF-8 has none
KeyPath = tuple[str | int, ...]
MAX_BYTES = 2**18  # PyYAML reads 400 kB a second
MAX_DIGITS = 10_000  # of a number: those to the base of 60 (1:1:1:...) take time by the square of their length
MAX_NODES = 100_000  # a config has tens; aliases of aliases ("billion laughs") have more than fit in memory
MAX_DEPTH = 100  # and an alias to what contains it has no end


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
UNFIT = (
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
)  # PyYAML on `!!bool maybe`, `!!int ""`, `!!timestamp soon`


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with `1e-5` read as a number as in YAML 1.2, and no dates."""


class _Dumper(yaml.SafeDumper):
    """Its inverse: the word "1e5" is quoted, so that it stays a word."""


for _resolver in (_Loader, _Dumper):
    _resolver.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def numbers_as_meant(value: Any) -> Any:
    """Plain data with words such as "1e-5" as numbers, which `yaml.safe_load` leaves as words."""
    if isinstance(value, dict):
        return {key: numbers_as_meant(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers_as_meant(inner) for inner in value]
    return float(value.replace("_", "")) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "norm=null"]` as values, read as YAML reads them.

    Raises:
        InputError: no "=", or no single value after it.
    """
    found = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            found[name.strip()] = _single_value(text)
            known = bool(equals and name.strip())
        except (yaml.YAMLError, RecursionError, *UNFIT):
            known = False
        if not known:
            raise InputError(
                "not a setting", place=Place(key="--set"), found=setting, expected="axis=value, as in lr=0.3"
            )
    return found


def _single_value(text: str) -> Any:
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    if not isinstance(node, yaml.ScalarNode) or _fault(node):
        raise ValueError("not a single value")
    return loader.construct_document(node)


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads back as it was."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)


@dataclass(frozen=True)
class Source:
    """Where a config came from: the file, its folder, the line of each key path (counted from 1)."""

    file: str = ""
    folder: Path = field(default_factory=Path.cwd)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def place(self, *path: str | int) -> Place:
        """The place of a key; of the nearest parent where the key itself is not in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return Place(self.file, self.lines[path[:end]], dotted(path))
        return Place(self.file, None, dotted(path))


def dotted(path: KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def read_yaml(path: Path) -> tuple[dict[str, Any], Source]:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, not UTF-8, not YAML, a key twice, not a mapping.
    """
    text = _read_text(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines = _lines(root, str(path)) if root is not None else {}
        data = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Place(str(path), mark.line + 1 if mark else None)
        shown = mark.get_snippet(indent=0) if mark else None
        problem = f"not YAML: {error.problem or error.context}"
        fix = "close brackets and quotes; indent with spaces; put a space after each colon"
        if isinstance(error, yaml.constructor.ConstructorError):
            problem, fix = f"not plain data: {error.problem}", "leave the !tag out; a key is a word"
        raise InputError(problem, place=where, fix=fix, detail=shown or "") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"not YAML: {str(error).splitlines()[0]}", place=Place(str(path))) from error
    except UNFIT as error:
        raise InputError("not plain data: a value does not fit its !!tag", place=Place(str(path))) from error
    if not isinstance(data, dict):
        raise InputError(
            "not a config",
            place=Place(str(path), 1),
            found=data,
            expected="keys such as study, target and space",
        )
    return data, Source(str(path), path.resolve().parent, lines)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # of a device there would be no end
        if len(content) > MAX_BYTES:
            raise InputError(f"more than {MAX_BYTES // 1024} kB", place=Place(str(path)), expected="a config")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        fix = f"configs there: {', '.join(near[:8])}" if near else "recipefuzz init writes a config to start from"
        raise InputError("no such file", place=Place(str(path)), fix=fix) from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", place=Place(str(path))) from error
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", place=Place(str(path))) from error
    except ValueError as error:  # a path with a NUL in it
        raise InputError("no such file", place=Place(str(path))) from error


def _lines(root: yaml.Node, file: str) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {(): 1}
    waiting: list[tuple[KeyPath, yaml.Node]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise InputError(f"nested more than {MAX_DEPTH} deep", place=Place(file, node.start_mark.line + 1))
        _refuse_faulty(node, file)
        for key, child, line in _children(node, path, file):
            lines[(*path, key)] = line
            waiting.append(((*path, key), child))
        if len(lines) > MAX_NODES:
            raise InputError(f"more than {MAX_NODES} values", place=Place(file))
    return lines


def _children(node: yaml.Node, path: KeyPath, file: str) -> list[tuple[str | int, yaml.Node, int]]:
    if isinstance(node, yaml.SequenceNode):
        return [(i, child, child.start_mark.line + 1) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return []
    found: dict[str, tuple[str | int, yaml.Node, int]] = {}
    for key, child in node.value:
        _refuse_faulty(key, file)
        line = key.start_mark.line + 1
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
        if name in found:  # "<<" too: each would double what the one before it brought in
            first = found[name][2]
            raise InputError(
                f"the key {name!r} stands here and in line {first}",
                place=Place(file, line, dotted((*path, name))),
                fix="keep one of them",
            )
        found[name] = (name, child, line)
    return list(found.values())


def _refuse_faulty(node: yaml.Node, file: str) -> None:
    if problem := _fault(node):
        raise InputError(problem, place=Place(file, node.start_mark.line + 1), found=node.value)


def _fault(node: yaml.Node) -> str:
    """What PyYAML takes, and we don't."""
    if not isinstance(node, yaml.ScalarNode):
        return ""
    if node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
        return f"a number of more than {MAX_DIGITS} digits"
    return "half of a character" if HALF.search(node.value) else ""
