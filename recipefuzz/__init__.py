"""recipefuzz: an automated fuzzer for neural-network training recipes.

`recipefuzz.search(config)` does what `recipefuzz search CONFIG` does; its result has `.trials` and `.ranking` as
DataFrames. Names are imported when they are used, so that `import recipefuzz` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipefuzz.config import load_config
    from recipefuzz.diagnose.own_loop import watch
    from recipefuzz.errors import InputError, NonFiniteError, RecipefuzzError, RunFailedError
    from recipefuzz.judging import judge_recipes
    from recipefuzz.searching import search

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "NonFiniteError",
    "RecipefuzzError",
    "RunFailedError",
    "judge_recipes",
    "load_config",
    "search",
    "watch",
]

_HOMES = {
    "InputError": "errors",
    "NonFiniteError": "errors",
    "RecipefuzzError": "errors",
    "RunFailedError": "errors",
    "judge_recipes": "judging",
    "load_config": "config",
    "search": "searching",
    "watch": "diagnose.own_loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recipefuzz' has no attribute {name!r}")
    return getattr(import_module(f"recipefuzz.{_HOMES[name]}"), name)
