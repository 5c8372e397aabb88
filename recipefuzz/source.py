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
KeyPath = tuple[str | int, ...]
MAX_NODES = 100_000  # a config has tens; aliases of aliases ("billion laughs") have more than fit in memory
MAX_DEPTH = 100  # and an alias to what contains it has no end


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
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "norm=null"]` as values, read as YAML reads them.

    Raises:
        InputError: no "=", or no single value after it.
    """
    found = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            value = yaml.load(text, Loader=_Loader) if equals else setting  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            value = [text]
        if not equals or not name.strip() or isinstance(value, (dict, list)):
            raise InputError(
                "not a setting", place=Place(key="--set"), found=setting, expected="axis=value, as in lr=0.3"
            )
        found[name.strip()] = value
    return found


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
        root = yaml.compose(text, Loader=_Loader)
        lines = _lines(root, str(path)) if root is not None else {}
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
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
    except (ValueError, LookupError, AttributeError) as error:  # PyYAML on `!!bool maybe`, `!!timestamp soon`
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
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        fix = f"configs there: {', '.join(near[:8])}" if near else "recipefuzz init writes a config to start from"
        raise InputError("no such file", place=Place(str(path)), fix=fix) from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", place=Place(str(path))) from error
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", place=Place(str(path))) from error


def _lines(root: yaml.Node, file: str) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {(): 1}
    waiting: list[tuple[KeyPath, yaml.Node]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise InputError(f"nested more than {MAX_DEPTH} deep", place=Place(file, node.start_mark.line + 1))
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
        line = key.start_mark.line + 1
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
        if name in found and name != "<<":
            first = found[name][2]
            raise InputError(
                f"the key {name!r} stands here and in line {first}",
                place=Place(file, line, dotted((*path, name))),
                fix="keep one of them",
            )
        found[name] = (name, child, line)
    return list(found.values())
