"""How a computation of whole lanes takes the place of one lane's under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def in_lanes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that, called under vmap with one lane's tensors, calls `function` with all lanes'.

    Args:
        function: takes tensors with their lanes in front (those that are the same for all lanes, expanded), and other
            arguments as they are; gives tensors with their lanes in front. Autograd sees what it does.
    """

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any: ...

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def vmap(info: Any, dims: Any, *args: Any) -> Any:
            found = function(*(_lanes_first(a, d, info.batch_size) for a, d in zip(args, dims, strict=True)))
            return found, tree_map(lambda _: 0, found)

    form: Callable[..., Any] = Form.apply
    return form


def _lanes_first(value: Any, dim: int | None, lanes: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.expand(lanes, *value.shape) if dim is None else value.movedim(dim, 0)
