"""One line of the user's code, mended in memory: its singular operation gets an input that it can take.

An intervention, to tell a bug in the code from a bad recipe: where the same recipe trains once a single operation is
kept away from its singular point, it was the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from recipefuzz.diagnose.frames import user_line

EPSILON = 1e-7  # as the field's own losses keep probabilities off 0 and 1 (Keras' epsilon)
LARGE_NEGATIVE = -1e9  # in place of -inf in a mask: its softmax is as much 0, and never 0 / 0
EXP_LIMIT = {torch.float16: 10.0, torch.bfloat16: 80.0, torch.float32: 80.0, torch.float64: 700.0}


def _above_zero(x: Tensor) -> Tensor:
    return x.clamp(min=EPSILON)


def _off_edges(x: Tensor) -> Tensor:
    return x.clamp(-1 + EPSILON * 10, 1 - EPSILON * 10)


def _divisor(x: Tensor) -> Tensor:
    return torch.where(x.abs() < EPSILON, torch.full_like(x, EPSILON), x)


def _exponent(x: Tensor) -> Tensor:
    limit = EXP_LIMIT.get(x.dtype, 80.0)
    return x.clamp(-limit, limit)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=-LARGE_NEGATIVE, neginf=LARGE_NEGATIVE)


def _unmasked(x: Tensor) -> Tensor:
    return x.masked_fill(x == -math.inf, LARGE_NEGATIVE)


# by a function's name in torch, without underscores and signs of being in place: how each of its operands is kept safe
LOGS = dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), _above_zero)
LOGS["log1p"] = lambda x: x.clamp(min=-1 + EPSILON)
EDGES = dict.fromkeys(("acos", "asin", "arccos", "arcsin", "atanh", "arctanh", "erfinv"), _off_edges)
EXPONENTIALS = dict.fromkeys(("exp", "exp2", "expm1", "cosh", "sinh", "logaddexp"), _exponent)
FIRST = LOGS | EDGES | EXPONENTIALS | {"reciprocal": _divisor, "pow": _above_zero, "norm": lambda x: x + EPSILON}
FIRST |= dict.fromkeys(("std", "var", "mean"), lambda x: x if x.numel() else x.new_zeros(1))
SECOND = dict.fromkeys(("div", "divide", "truediv", "true_divide", "idiv", "itruediv"), _divisor)
BOTH = dict.fromkeys(("mul", "multiply", "imul", "matmul", "bmm", "mm", "einsum", "sub", "subtract"), _finite)
SOFTMAXES = dict.fromkeys(("softmax", "log_softmax"), _unmasked)


class Mended(TorchFunctionMode):
    """While active, the singular operations of one line get inputs that they can take.

    Attributes:
        used: whether such an operation was met.
    """

    def __init__(self, file: str, line: int) -> None:
        super().__init__()
        self._place = (file, line)
        self.used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if not _known(name) or user_line() != self._place:
            return func(*args, **kwargs)
        self.used = True
        return _steady(func(*_safe(name, args), **kwargs), name)


def _known(name: str) -> bool:
    return any(name in table for table in (FIRST, SECOND, BOTH, SOFTMAXES)) or name in ("rtruediv", "rdiv", "rpow")


def _safe(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if name in BOTH:
        return tuple(tree_map(_floating(BOTH[name]), arg) for arg in args)
    if name in SECOND:
        return (args[0], *(_floating(SECOND[name])(a) for a in args[1:]))
    if name in ("rtruediv", "rdiv"):
        return (_floating(_divisor)(args[0]), *args[1:])
    if name == "rpow":
        return (_floating(_exponent)(args[0]), *args[1:])
    keep = (FIRST | SOFTMAXES)[name]
    return (_floating(keep)(args[0]), *args[1:])


def _floating(keep: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda value: keep(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _steady(result: Any, name: str) -> Any:
    """A spread of one element has no value whatever goes in: it counts as none."""
    spread = name in ("std", "var") and isinstance(result, Tensor)
    return torch.nan_to_num(result, nan=0.0) if spread else result
