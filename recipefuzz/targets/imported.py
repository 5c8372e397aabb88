"""The user's own code, by import path: `pkg.module:name`, from beside the config file or installed."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from recipefuzz.errors import (
    PACKAGE,
    RAISED,
    InputError,
    Place,
    RecipefuzzError,
    did_you_mean,
    is_users,
    nearest,
    user_traceback,
)

_under_way: list[str] = []  # the user's module that is being imported


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
    found: Any = _import(module_name, name, folder, place)
    seen = module_name
    for part in name.split("."):
        between = "." if ":" in seen else ":"
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            near = nearest(part, public)
            raise InputError(
                f"{seen} has no {part!r}",
                place=place,
                found=path,
                expected=f"a name defined in {getattr(found, '__file__', seen)}",
                fix=f"did you mean {seen}{between}{near}?" if near else f"it defines: {', '.join(public[:12])}",
            )
        found, seen = getattr(found, part), f"{seen}{between}{part}"
    return found


def load_callable(path: str, folder: Path, place: Place) -> Callable[..., Any]:
    found = load_object(path, folder, place)
    if not callable(found):
        raise InputError("not a function", place=place, found=found, expected=f"{path} to be callable")
    return found  # type: ignore[no-any-return]


def _import(name: str, inside: str, folder: Path, place: Place) -> ModuleType:
    """The module of that name; `inside` is what is wanted of it."""
    if _under_way:
        raise InputError(
            f"importing {_under_way[0]} calls recipefuzz, which imports it",
            place=place,
            found=name,
            fix='put the call under: if __name__ == "__main__":',
        )
    _refuse_namesake(name.split(".")[0], folder, place)
    _forget_namesakes(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p != str(folder))]
    importlib.invalidate_caches()
    _under_way.append(name)
    try:
        return importlib.import_module(name)
    except RecipefuzzError:  # from a script that calls recipefuzz, as above
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _raised(name, place, error) from error
        raise _absent(error.name, name, inside, folder, place) from error
    except RAISED as error:
        raise _raised(name, place, error) from error
    finally:
        _under_way.remove(name)


def _absent(missing: str, name: str, inside: str, folder: Path, place: Place) -> InputError:
    nearby = _modules_beside(missing, folder)
    file = missing.removesuffix(".py").replace(".", "/")
    fix = did_you_mean(missing, nearby) if nearby else "put the file beside the config"
    if name.endswith(".py") or "/" in name:  # a file's name, where a module's is wanted
        module = name.removesuffix(".py").replace("/", ".")
        fix = f"did you mean {f'{nearest(module, nearby) or module}:{inside}'!r}?"
    return InputError(
        f"no module named {missing!r}",
        place=place,
        found=f"{name}:{inside}",
        expected=f"{file}.py or a package beside the config ({folder}), or an installed package",
        fix=fix,
    )


def _modules_beside(name: str, folder: Path) -> list[str]:
    """The modules that lie where `name` was looked for: in the config's folder, or in a package there."""
    *parents, _ = name.split(".")
    if not (home := folder.joinpath(*parents)).is_dir():
        parents, home = [], folder
    stems = [p.stem for p in home.glob("*.py")] + [p.parent.name for p in home.glob("*/__init__.py")]
    return [".".join([*parents, stem]) for stem in stems if stem != "__init__"]


def _raised(name: str, place: Place, error: BaseException) -> InputError:
    return InputError(f"importing {name} raised {type(error).__name__}", place=place, detail=user_traceback(error))


def _refuse_namesake(top: str, folder: Path, place: Place) -> None:
    """Refuse a file that would take the place of a module that others use."""
    if PathFinder.find_spec(top, [str(folder)]) is None:
        return
    old = sys.modules.get(top)
    taken = old is not None and not is_users(_home(old)) and not Path(_home(old)).is_relative_to(folder)
    if top in sys.stdlib_module_names or taken:
        kind = "a module of Python itself" if top in sys.stdlib_module_names else "an installed package"
        raise InputError(f"{top}.py has the name of {kind}", place=place, found=top, fix="rename the file")


def _forget_namesakes(folder: Path) -> None:
    """Drop modules from other folders that have the name of one in this folder: every user has a `model.py`."""
    here = {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()} - {"__main__"}
    namesakes = [
        name
        for name, module in sys.modules.items()
        if name.split(".")[0] in here and is_users(home := _home(module)) and not Path(home).is_relative_to(folder)
    ]
    for name in namesakes:
        del sys.modules[name]


def _home(module: ModuleType) -> str:
    """The module's file; a folder of a package without a file; else a name that is no user's, such as <sys>."""
    file = getattr(module, "__file__", None)
    return file or next(iter(getattr(module, "__path__", [])), f"<{module.__name__}>")


def keyword_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that `function` takes as keywords; None where it takes any (`**kwargs`) or can't be asked."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def missing_arguments(error: BaseException, section: str) -> str:
    """The fix for a call of ours that lacked arguments: `section: {name: ...}`; else an empty string."""
    called_by_us = [f for f, _ in traceback.walk_tb(error.__traceback__)][-1].f_code.co_filename.startswith(PACKAGE)
    if not (called_by_us and isinstance(error, TypeError) and "missing" in str(error)):
        return ""
    names = re.findall(r"'(\w+)'", str(error).partition("missing")[2])
    return f"{section}: {{{', '.join(f'{name}: ...' for name in names)}}} under target" if names else ""


def files_under(folder: Path) -> list[Path]:
    """The files of the user's modules that were imported from a folder: the named ones, and what those import."""
    files = [Path(_home(m)) for name, m in sys.modules.copy().items() if name not in ("__main__", "__mp_main__")]
    return [f for f in files if f.is_relative_to(folder) and is_users(str(f)) and f.is_file()]
