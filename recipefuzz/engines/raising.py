"""What the user's code raises in a step: a failure of its own, or what a value that is not finite led to?"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipefuzz.errors import RAISED

LAST = 8  # results before the exception: a distribution of three parameters makes so many between taking and checking


def raises_on_bad_values(step: Callable[[], object]) -> bool:
    """Whether a step that raised raises again, on what is not finite.

    Distributions check their parameters, and decompositions do not converge on NaN. What a step made long before, and
    meant or dropped, does not matter; nor do infinities, such as those of a mask, unless they are the very last.
    """
    made = _Made()
    with contextlib.suppress(*RAISED), made:
        step()
        return False
    with contextlib.suppress(*RAISED):  # numbers that can't be read
        last = made.results[-1:]
        return any(bool(t.isnan().any()) for t in made.results) or any(not bool(t.isfinite().all()) for t in last)
    return False


class _Made(TorchDispatchMode):
    """Keeps the floating-point tensors that were made last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: deque[Tensor] = deque(maxlen=LAST)

    @property
    def results(self) -> list[Tensor]:
        return list(self._results)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._results += [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
        return result
