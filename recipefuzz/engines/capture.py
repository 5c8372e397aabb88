"""A computation of L lanes, recorded once and replayed as a straight line of ATen calls.

`torch.func.vmap` and autograd decide anew at every call which batched operations to launch; for a small model that
takes as long as the operations. Here they decide twice, with 2 and with 3 lanes, under a dispatch mode that writes down
what is launched. Sizes that differ between the two are linear in the lanes, so that the recording holds for any number
of them. What is replayed is a Python function of plain tensors: no autograd graph, no transforms, no modules.

`torch.fx.experimental.proxy_tensor.make_fx` records likewise, but for one number of lanes at a time, and imports
torch._dynamo, which takes as long as a small search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)  # noqa: SLF001 - a name of aten's
Op = torch._ops.OpOverload  # noqa: SLF001 - it has no public name


class CannotCaptureError(Exception):
    """What the computation does that can't be recorded, in words for the user."""


@dataclass(frozen=True)
class Ref:
    """A tensor in the recording, by its number."""

    index: int


@dataclass(frozen=True)
class Linear:
    """An integer argument that is `base + slope * lanes`."""

    base: int
    slope: int


@dataclass(frozen=True)
class Call:
    """One operation: its arguments, with tensors as `Ref`; the numbers and shapes of the tensors it returns.

    Attributes:
        whole: whether it returns one tensor, not a tuple or list of them.
        sizes: bytes of each returned tensor's own memory, 0 for a view.
        mixed: whether what it takes and returns is of several dtypes, as a bias and a product are under autocast.
    """

    op: Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]
    shapes: tuple[tuple[Any, ...], ...]
    whole: bool
    sizes: tuple[Any, ...]
    mixed: bool = False

    @property
    def reads(self) -> list[int]:
        return [leaf.index for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Ref)]

    @property
    def writes(self) -> list[int]:
        """Arguments that it changes in place."""
        found = []
        for position, argument in enumerate(self.op._schema.arguments):  # noqa: SLF001 - there is no public one
            value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += [leaf.index for leaf in tree_flatten(value)[0] if isinstance(leaf, Ref)]
        return found


@dataclass(frozen=True)
class Recording:
    """Calls in their order.

    Attributes:
        inputs: numbers 0 .. inputs - 1 are the arguments.
        constants: tensors that were neither an argument nor made by a call, by number.
        outputs: numbers of what is returned.
    """

    calls: tuple[Call, ...]
    inputs: int
    constants: dict[int, Tensor]
    outputs: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dynamo never traces this; being skipped by it would import it, which takes a second."""
        return False

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.constants: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # an id is a tensor's only while it lives
        self._numbers: dict[int, int] = {}
        self._storages: set[int] = set()
        for tensor in inputs:
            self._new(tensor)
            self._own_bytes(tensor)

    def _own_bytes(self, tensor: Any) -> int:
        """Bytes of a tensor's memory when it is first seen."""
        storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
        if storage is None or storage._cdata in self._storages:  # noqa: SLF001 - fake tensors have no data_ptr
            return 0
        self._storages.add(storage._cdata)  # noqa: SLF001
        return int(storage.nbytes())

    def _new(self, tensor: Tensor) -> int:
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return number

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self.constants[self._new(tensor)] = tensor
        return self._numbers[id(tensor)]

    def __torch_dispatch__(self, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise CannotCaptureError("it reads a tensor's value in Python (.item(), bool(), float(), torch.equal)")
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
            raise CannotCaptureError(f"it draws random numbers ({func})")
        before = tree_map(lambda leaf: Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        whole = isinstance(result, Tensor)
        outs = (result,) if whole else tuple(result) if isinstance(result, (tuple, list)) else ()
        numbers = tuple(self._new(out) if isinstance(out, Tensor) else None for out in outs)
        shapes = tuple(tuple(out.shape) if isinstance(out, Tensor) else () for out in outs)
        sizes = tuple(self._own_bytes(out) for out in outs)
        mixed = len({leaf.dtype for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, Tensor)}) > 1
        self.calls.append(Call(func, before[0], before[1], numbers, shapes, whole, sizes, mixed))
        return result


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Recording:
    """Run a function of tensors and write down what it launches.

    Raises:
        CannotCaptureError: it reads values on the host or draws random numbers.
    """
    recorder = _Recorder(inputs)
    # autograd's own threads would not see the mode
    with torch.autograd.set_multithreading_enabled(False), recorder:
        outputs = function(*inputs)
        numbers = tuple(recorder.number(out) for out in outputs)
    return Recording(tuple(recorder.calls), len(inputs), recorder.constants, numbers)


def linear_in_lanes(first: Recording, second: Recording, lanes: tuple[int, int]) -> Recording:
    """One recording for any number of lanes from those of two numbers.

    Raises:
        CannotCaptureError: they differ in more than sizes.
    """
    if len(first.calls) != len(second.calls) or first.outputs != second.outputs:
        raise CannotCaptureError("what it launches depends on the number of lanes")
    calls = tuple(_merged(a, b, lanes) for a, b in zip(first.calls, second.calls, strict=True))
    for number, constant in first.constants.items():
        if not _same(constant, second.constants.get(number)):
            raise CannotCaptureError("it holds tensors that change from call to call")
    return replace(first, calls=calls)


def _merged(a: Call, b: Call, lanes: tuple[int, int]) -> Call:
    left, spec = tree_flatten((a.args, a.kwargs, a.shapes, a.sizes))
    right, other = tree_flatten((b.args, b.kwargs, b.shapes, b.sizes))
    if a.op is not b.op or spec != other or a.outs != b.outs:
        raise CannotCaptureError("what it launches depends on the number of lanes")
    merged = [_linear(x, y, lanes) for x, y in zip(left, right, strict=True)]
    args, kwargs, shapes, sizes = tree_unflatten(merged, spec)
    return Call(a.op, args, kwargs, a.outs, shapes, a.whole, sizes, a.mixed)


def _linear(x: Any, y: Any, lanes: tuple[int, int]) -> Any:
    if type(x) is int and type(y) is int and x != y:
        slope, rest = divmod(y - x, lanes[1] - lanes[0])
        if rest == 0:
            return Linear(x - slope * lanes[0], slope)
    if x is y or x == y:
        return x
    raise CannotCaptureError(f"it computes with the number of lanes ({x} and {y})")


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a)).all())


def compiled_source(recording: Recording) -> tuple[str, dict[str, Any]]:
    """Python source of `make(lanes)`, which returns the replaying function, and the names that it uses.

    Sizes are computed once in `make`; the function itself holds calls only, and drops each tensor after its last use.
    """
    names: dict[str, Any] = {f"c{n}": tensor for n, tensor in recording.constants.items()}
    sizes: dict[str, str] = {}
    last = {n: i for i, call in enumerate(recording.calls) for n in call.reads}
    kept = {*recording.outputs, *recording.constants, *range(recording.inputs)}
    ops: dict[Op, str] = {}
    body: list[str] = []

    def spelled(value: Any) -> str:
        if isinstance(value, Ref):
            return f"c{value.index}" if value.index in recording.constants else f"t{value.index}"
        if isinstance(value, Linear):
            return sizes.setdefault(f"{value.base} + {value.slope} * lanes", f"n{len(sizes)}")
        if isinstance(value, list) and any(isinstance(v, Linear) for v in value):
            inner = ", ".join(f"{v.base} + {v.slope} * lanes" if isinstance(v, Linear) else repr(v) for v in value)
            return sizes.setdefault(f"[{inner}]", f"n{len(sizes)}")
        if isinstance(value, (list, tuple)):
            inner = ", ".join(spelled(v) for v in value)
            return f"[{inner}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and abs(value) < 1e300):
            return repr(value)
        names[name := f"v{len(names)}"] = value
        return name

    for i, call in enumerate(recording.calls):
        op = ops.setdefault(call.op, f"op{len(ops)}")
        names[op] = call.op
        arguments = [spelled(a) for a in call.args] + [f"{k}={spelled(v)}" for k, v in call.kwargs.items()]
        outs = ["_" if n is None else f"t{n}" for n in call.outs]
        made = {n for n in call.outs if n is not None and n not in last and n not in kept}
        target = (outs[0] if call.whole else ", ".join(outs) + ",") + " = " if outs else ""
        body.append(f"{target}{op}({', '.join(arguments)})")
        dead = sorted({n for n in call.reads if last[n] == i and n not in kept} | made)
        if dead:
            body.append("del " + ", ".join(f"t{n}" for n in dead))
    inputs = ", ".join(f"t{n}" for n in range(recording.inputs))
    returned = ", ".join(spelled(Ref(n)) for n in recording.outputs)
    lines = [*(f"    {name} = {text}" for text, name in sizes.items()), f"    def replay({inputs}):"]
    lines += [f"        {line}" for line in (*body, f"return ({returned},)")]
    return "\n".join(["def make(lanes):", *lines, "    return replay"]), names


def replaying(recording: Recording) -> Callable[[int], Callable[..., tuple[Tensor, ...]]]:
    """`make(lanes)` of `compiled_source`, ready to be called."""
    source, names = compiled_source(recording)
    # the __call__ of an operation does nothing else than to call this, in Python
    names = {name: value._op if isinstance(value, Op) else value for name, value in names.items()}  # noqa: SLF001
    exec(compile(source, "<lanes>", "exec"), names)  # noqa: S102 - our own text, of op names and numbers
    make: Callable[[int], Callable[..., tuple[Tensor, ...]]] = names["make"]
    return make


def bytes_per_lane(recording: Recording) -> int:
    """Most memory that the replay's own tensors take at one time, for each lane."""
    last = {n: i for i, call in enumerate(recording.calls) for n in call.reads}
    most = now = 0
    freed: dict[int, int] = {}  # by the call after which they go
    for i, call in enumerate(recording.calls):
        for number, size in zip(call.outs, call.sizes, strict=True):
            own = size.slope if isinstance(size, Linear) else 0
            now += own
            end = last.get(number or -1, len(recording.calls) if number in recording.outputs else i)
            freed[end] = freed.get(end, 0) + own
        most = max(most, now)
        now -= freed.pop(i, 0)
    return most


def written(calls: Iterable[Call]) -> set[int]:
    """Tensors that some call changes in place."""
    return {n for call in calls for n in call.writes}
