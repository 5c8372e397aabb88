"""The user's own code, by import path: `pkg.module:name`, from beside the config file or installed."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from recipefuzz.errors import InputError, Place, did_you_mean, nearest, user_traceback


def load_object(path: str, folder: Path, place: Place) -> Any:
    """Import what `path` names.

    Args:
        path: "module:name" or "pkg.module:name".
        folder: the config file's folder, searched before the installed packages.
        place: of the key that holds the path, for the errors.

    Raises:
        InputError: no such module or name, or the import raised.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise InputError(
            "not an import path",
            place=place,
            found=path,
            expected='"module:name", such as "train:build_model"',
        )
    module = _import(module_name, folder, place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(module) if not n.startswith("_")]
            near = nearest(part, public)
            raise InputError(
                f"{module_name} has no {part!r}",
                place=place,
                found=path,
                expected=f"a name defined in {getattr(module, '__file__', module_name)}",
                fix=f"did you mean {module_name}:{near}?" if near else f"it defines: {', '.join(public[:12])}",
            )
        found = getattr(found, part)
    return found


def load_callable(path: str, folder: Path, place: Place) -> Callable[..., Any]:
    found = load_object(path, folder, place)
    if not callable(found):
        raise InputError("not a function", place=place, found=found, expected=f"{path} to be callable")
    return found  # type: ignore[no-any-return]


def _import(name: str, folder: Path, place: Place) -> ModuleType:
    top = name.split(".")[0]
    if top in sys.stdlib_module_names and PathFinder.find_spec(top, [str(folder)]):
        raise InputError(
            f"{top}.py has the name of a module of Python itself",
            place=place,
            found=name,
            fix="rename the file",
        )
    _forget_namesake(top, folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _raised(name, place, error) from error
        nearby = [p.stem for p in folder.glob("*.py")] + [p.parent.name for p in folder.glob("*/__init__.py")]
        raise InputError(
            f"no module named {error.name!r}",
            place=place,
            found=name,
            expected=f"{error.name}.py or a package beside the config ({folder}), or an installed package",
            fix=did_you_mean(error.name, nearby) if nearby else "put the file beside the config",
        ) from error
    except Exception as error:
        raise _raised(name, place, error) from error


def _raised(name: str, place: Place, error: Exception) -> InputError:
    return InputError(f"importing {name} raised {type(error).__name__}", place=place, detail=user_traceback(error))


def _forget_namesake(top: str, folder: Path) -> None:
    """Drop a module of the same name that came from another folder: every user has a `model.py`."""
    spec = PathFinder.find_spec(top, [str(folder)])
    old = sys.modules.get(top)
    if spec is None or spec.origin is None or old is None or getattr(old, "__file__", None) == spec.origin:
        return
    for name in [m for m in sys.modules if m == top or m.startswith(top + ".")]:
        del sys.modules[name]


def keyword_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that `function` takes as keywords; None where it takes any (`**kwargs`) or can't be asked."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
