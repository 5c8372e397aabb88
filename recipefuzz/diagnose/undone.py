"""What operations write into memory that was there before is put back afterwards: a replay leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipefuzz.diagnose.tensors import statistics, storage, stored, tensors, written


@contextmanager
def undone() -> Iterator[None]:
    """Tensors that the body does not make hold afterwards what they held before."""
    mode = _Undone()
    try:
        with mode:
            yield
    finally:
        for memory, old in mode.kept.values():
            if memory.nbytes() == old.nbytes():
                memory.copy_(old)


class _Undone(TorchDispatchMode):
    """Keeps what is there before an operation writes.

    Attributes:
        kept: memory that was written, and a copy of it from before, by its number.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}  # alive, so that no other memory gets their numbers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in [*written(func, args, kwargs), *statistics(func, args)]:
            key = storage(tensor)
            if key not in self._made and key not in self.kept:
                memory = stored(tensor).untyped_storage()
                self.kept[key] = memory, memory.clone()
        given = {storage(t) for t in tensors([*args, *kwargs.values()])}
        result = func(*args, **kwargs)
        for tensor in tensors([result]):
            if (key := storage(tensor)) not in given:
                self._made[key] = stored(tensor).untyped_storage()
        return result
