"""Who is told of backward passes and of optimizers' steps, wherever in the program they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_graph_task_id as _graph_task
from torch.autograd.graph import GradientEdge
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import register_optimizer_step_pre_hook

BACKWARD_FRAMES = 2  # from a listener to who calls the function of torch's that it stands behind
STEP_FRAMES = 3  # from a listener to who calls the optimizer
TOLD = "_recipefuzz_tells"  # of what stands in the place of `torch.autograd.backward`: whom it tells
NO_TASK = -1

BackwardListener = Callable[[Tensor | None], None]
StepListener = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def after_backward(then: BackwardListener) -> Iterator[None]:
    """Call it with the loss after each backward pass, `Tensor.backward()` and `torch.autograd.backward` alike.

    Listeners share one function in the place of torch's, so that they may leave in any order: those of two threads do.
    """
    told: dict[int, BackwardListener] = getattr(torch.autograd.backward, TOLD, None) or _listened()
    told[id(then)] = then
    try:
        yield
    finally:
        del told[id(then)]
        if not told and getattr(torch.autograd.backward, TOLD, None) is told:
            torch.autograd.backward = getattr(torch.autograd.backward, "__wrapped__")  # noqa: B009 - unknown to mypy


def _listened() -> dict[int, BackwardListener]:
    """Put a function in the place of torch's; who is told of its calls."""
    original, told = torch.autograd.backward, dict[int, BackwardListener]()

    @wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        original(tensors, grad_tensors, *args, **kwargs)
        if is_dynamo_compiling() or _graph_task() != NO_TASK:  # in another's backward pass: a reentrant checkpoint's
            return
        loss = tensors if grad_tensors is None and isinstance(tensors, Tensor) else _loss(tensors)
        for then in tuple(told.values()):
            then(loss)

    setattr(backward, TOLD, told)
    torch.autograd.backward = backward
    return told


def _loss(tensors: Any) -> Tensor | None:
    """What a backward pass began with; None if it isn't one real number."""
    first = tensors if isinstance(tensors, (Tensor, GradientEdge)) else tensors[0]
    return first if isinstance(first, Tensor) and first.numel() == 1 and not first.is_complex() else None


@contextmanager
def before_steps(then: StepListener) -> Iterator[None]:
    """Call it before each step of any optimizer, with the optimizer and its step's arguments, the optimizer first."""
    told = _stepped()
    told[id(then)] = then
    try:
        yield
    finally:
        del told[id(then)]


@cache
def _stepped() -> dict[int, StepListener]:
    """Who is told. The hook stays: torch's dictionary of them must not change while another thread goes through it."""
    told = dict[int, StepListener]()

    def begins(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_dynamo_compiling():
            for then in tuple(told.values()):
                then(optimizer, args, kwargs)

    register_optimizer_step_pre_hook(begins)
    return told
