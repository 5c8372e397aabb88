"""Calls of modules and of custom autograd.Functions in one forward pass, kept so that each can be made again alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Kind = type[torch.autograd.Function]
LOSS = "(loss)"  # stands for a module's name


@dataclass(frozen=True)
class Call:
    """Arguments, detached; a tensor that the backward pass goes through requires a gradient."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def kept(value: Any) -> Any:
    """A copy of arguments that outlives the call."""
    return tree_map(lambda v: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v, value)


@dataclass
class Calls:
    """First calls, by module, and by custom Function and the module that it was called in."""

    modules: dict[str, Call] = field(default_factory=dict)
    functions: dict[tuple[str, Kind], Call] = field(default_factory=dict)
    _inside: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, model: nn.Module, kinds: list[Kind]) -> Iterator[None]:
        """Record while the body runs."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                enter = module.register_forward_pre_hook(self._entering(name), with_kwargs=True)
                leave = module.register_forward_hook(lambda _m, _a, _o: self._left(), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            for kind in kinds:
                stack.callback(self._watch(kind))
            yield

    def _entering(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def entered(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside.append(name)
            if name not in self.modules:
                self.modules[name] = Call(*kept((args, kwargs)))

        return entered

    def _left(self) -> None:
        self._inside.pop()

    def _watch(self, kind: Kind) -> Callable[[], None]:
        """Wrap a Function's forward, which `apply` looks up at each call; gives what unwraps it."""
        own, original = "forward" in vars(kind), kind.__dict__.get("forward")
        run = kind.forward
        skipped = int(kind.setup_context is torch.autograd.Function.setup_context)  # ctx

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (self._inside[-1] if self._inside else LOSS, kind)
            if key not in self.functions:
                self.functions[key] = Call(kept(args[skipped:]), {})
            return run(*args, **kwargs)

        setattr(kind, "forward", staticmethod(forward))  # noqa: B010 - a type has no such attribute to mypy
        return lambda: setattr(kind, "forward", original) if own else delattr(kind, "forward")


def custom_functions(value: Tensor) -> list[Kind]:
    """Classes of the users' own Functions in the graph behind a value."""
    found: dict[Kind, None] = {}
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = getattr(node, "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("torch."):
            found[kind] = None
        waiting += [following for following, _ in node.next_functions]
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))
