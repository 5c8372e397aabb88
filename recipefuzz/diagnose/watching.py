"""One training step with every operation watched: each that makes or passes on a value that is not finite is kept.

Operations are seen below autograd, as the kernels that are launched, in forward, loss, backward and optimizer alike
(`TorchDispatchMode`). A backward operation is traced to its forward operation by autograd's sequence numbers, so the
user's line is known without anomaly mode, which keeps a traceback for every node.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from recipefuzz.diagnose.frames import user_line
from recipefuzz.diagnose.tensors import Stats, is_finite, leaves, storage, stored, tensors, written

UNSET = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")  # memory not yet written

OVERWRITES = ("copy", "fill", "zero", "normal", "uniform", "random", "bernoulli", "exponential", "set")  # don't read it

# times that a weight is applied in one step, from which it is a recurrence: shared encoders have two or three
OVER_AND_OVER = 5


@dataclass(frozen=True)
class Spot:
    """Where an operation was launched.

    Attributes:
        phase: data, forward, loss, backward or optimizer.
        op: its base name in ATen, without underscores around it.
        module: qualified name of the innermost module that was being called; "" outside of the model.
        file, line: the user's code, innermost; "" and 0 where none was being run.
    """

    phase: str
    op: str
    module: str = ""
    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Operand:
    """An input of a kept operation.

    Attributes:
        writers: kept operations that put something not finite into its memory before; empty for what came from
            outside the step: rows, parameters, buffers.
        meant: what is not finite in it are infinities that the user's code put there.
        outside: what it is where it came from outside: "x", "y", "parameter NAME", "buffer NAME", or "".
        is_mask: whether a log was taken of zeros and ones alone that were not computed from the parameters.
    """

    stats: Stats
    writers: tuple[int, ...]
    meant: bool
    outside: str
    is_mask: bool


@dataclass(frozen=True)
class Event:
    """An operation whose result is not finite.

    Attributes:
        forward: of a backward operation, the forward operation that it belongs to.
        scalars: its arguments that are numbers.
        meant: its result holds only infinities that were meant.
        finite_in_double: whether float64 arithmetic on the same inputs is finite; None if it was not asked.
        witness: for an elementwise operation, the operands at the first element that is not finite.
        forward_finite: of a backward operation, whether the forward operation's own result was finite.
    """

    index: int
    spot: Spot
    forward: Spot | None
    operands: tuple[Operand, ...]
    scalars: tuple[float, ...]
    results: tuple[Stats, ...]
    meant: bool
    finite_in_double: bool | None
    witness: tuple[float, ...]
    forward_finite: bool

    @property
    def makes_nan(self) -> bool:
        return any(r.nans for r in self.results)

    @property
    def writes_nan(self) -> bool:
        """Whether it puts a NaN there that the code names, as `torch.logdet` does for a negative determinant."""
        return self.makes_nan and (not self.operands or any(map(math.isnan, self.scalars)))

    @property
    def produces(self) -> bool:
        """Whether nothing but meant infinities went in."""
        return not self.meant and all(o.stats.finite or o.meant for o in self.operands)


class Watch(TorchDispatchMode):
    """Keeps what goes wrong while it is active.

    Args:
        model: whose modules are named in the events.

    Attributes:
        phase: of the step; the backward pass is known from autograd instead.
        gradients: operations that wrote gradients that arrived at their parameters not finite, by the parameter's id.
        recurrent: whether one weight was applied many times over.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.phase = "data"
        self.gradients: dict[int, tuple[int, ...]] = {}
        self.recurrent = False
        self._uses = dict.fromkeys((storage(p) for p in model.parameters()), 0)
        self._model = model
        self._outside: dict[int, str] = {}
        self._modules: list[str] = []
        self._writers: dict[int, list[int]] = {}
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets their memory
        self._sound: dict[int, weakref.ref[Tensor]] = {}  # memory that is finite as long as that tensor lives
        self._meant: set[int] = set()  # memory whose infinities were meant
        self._depends = {storage(p) for p in model.parameters()}
        self._forward: dict[int, tuple[Spot, bool]] = {}  # by autograd's number: the operation, whether it was finite
        self._names = {id(module): name for name, module in model.named_modules()}

    def name(self, tensor: Tensor, called: str) -> None:
        """Say what a tensor is that exists before the step."""
        self._outside[storage(tensor)] = called

    def writers_of(self, tensor: Tensor) -> tuple[int, ...]:
        """The kept operations that wrote into the tensor's memory."""
        return tuple(self._writers.get(storage(tensor), ()))

    @contextmanager
    def active(self) -> Iterator[Watch]:
        """Watch, and follow which module is being called."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                before = module.register_forward_pre_hook(self._enter)
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._reached)
                    stack.callback(hook.remove)
            stack.enter_context(self)
            yield self

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if module is self._model:
            self.phase = "forward"
        self._modules.append(self._names[id(module)])

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if self._modules:
            self._modules.pop()
        if module is self._model:
            self.phase = "loss"

    def _reached(self, parameter: Tensor) -> None:
        """A gradient has arrived: what runs after the backward pass is the optimizer's."""
        self.phase = "optimizer"
        if parameter.grad is not None and not is_finite(parameter.grad):
            self.gradients[id(parameter)] = self.writers_of(parameter.grad)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        overwritten = written(func, args, kwargs)
        before = {id(t): t.clone() for t in overwritten}
        unread = before if base_name(func) in OVERWRITES else {id(kwargs.get("out")): None}
        inputs = tensors([*args, *kwargs.values()])
        shared = {storage(t) for t in inputs}
        read = [self._read(t, before.get(id(t), t)) for t in inputs if id(t) not in unread]
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in UNSET:
            return result
        spot, forward, forward_finite = self._spot(func)
        outputs = tensors([result])
        outputs += [t for t in overwritten if all(t is not o for o in outputs)]
        self._follow(outputs, shared, any(key in self._depends for key in shared))
        made = [t for t in outputs if storage(t) not in shared or id(t) in before]
        bad = {id(t) for t in made if not is_finite(t)}
        if bad:
            call = _Call(func, args, kwargs, before)
            self.events.append(self._event(call, spot, forward, forward_finite, read, made, bad))
        for tensor in made:
            self._mark(tensor, id(tensor) in bad)
        if forward is None and spot.phase in ("forward", "loss"):
            self._count(spot.op, shared if made else set())
            self._forward.setdefault(_get_sequence_nr() - 1, (spot, not bad))
        return result

    def _read(self, tensor: Tensor, old: Tensor) -> _Read:
        key = storage(tensor)
        writers, outside = tuple(self._writers.get(key, ())), self._outside.get(key, "")
        finite = is_finite(old) if writers else self._is_sound(tensor, key)
        return _Read(old, finite, writers, key in self._meant, key in self._depends, outside)

    def _is_sound(self, tensor: Tensor, key: int) -> bool:
        """Of memory that no operation was seen to write something not finite to: looked at once, while it lives."""
        seen = self._sound.get(key)
        if seen is not None and seen() is not None:
            return True
        if finite := is_finite(tensor):
            self._sound[key] = weakref.ref(tensor)
        return finite

    def _mark(self, tensor: Tensor, bad: bool) -> None:
        """Follow what wrote the memory of a tensor that the last kept operation made, or another one that is finite."""
        key = storage(tensor)
        if _is_whole(tensor):
            self._writers.pop(key, None)
            self._meant.discard(key)
        if bad:
            event = self.events[-1]
            self._writers.setdefault(key, []).append(event.index)
            self._kept.append(tensor)
            (self._meant.add if event.meant else self._meant.discard)(key)
        elif key not in self._writers:
            self._sound[key] = weakref.ref(tensor)

    def _follow(self, outputs: list[Tensor], shared: set[int], depends: bool) -> None:
        """Whether what an operation wrote depends on the parameters; of new memory, nothing that lay there counts."""
        for tensor in outputs:
            key = storage(tensor)
            if key not in shared:
                self._writers.pop(key, None)
                self._outside.pop(key, None)
                self._meant.discard(key)
                self._depends.discard(key)
            if depends:
                self._depends.add(key)

    def _count(self, op: str, read: set[int]) -> None:
        """Follow how often each parameter is applied in the forward pass."""
        for key in read & self._uses.keys():
            self._uses[key] += 1
            self.recurrent |= self._uses[key] >= OVER_AND_OVER
        self.recurrent |= any(kernel in op for kernel in ("rnn", "lstm", "gru"))

    def _spot(self, func: Any) -> tuple[Spot, Spot | None, bool]:
        op = base_name(func)
        node = torch._C._current_autograd_node()
        if node is None:
            file, line = user_line()
            module = self._modules[-1] if self._modules else ""
            return Spot(self.phase, op, module, file, line), None, True
        forward, finite = self._forward.get(node._sequence_nr(), (None, True))
        file, line = user_line(backward=True)
        here = Spot("backward", op, forward.module if forward else "", file, line)
        if file:  # the backward pass of a custom Function: the user's own operation
            return here, None, True
        if forward is None:
            return here, Spot("forward", node.name().split("::")[-1]), True
        return replace(here, file=forward.file, line=forward.line), forward, finite

    def _event(
        self,
        call: _Call,
        spot: Spot,
        forward: Spot | None,
        forward_finite: bool,
        read: list[_Read],
        made: list[Tensor],
        bad: set[int],
    ) -> Event:
        """What is kept of a call: in full where it may be the one that began it, else what a way back needs."""
        clean = all(r.is_clean for r in read)
        operands = tuple(r.operand(Stats.of(r.old) if clean else Stats.brief(r.old, r.finite), spot.op) for r in read)
        scalars = tuple(float(s) for s in leaves([*call.args, *call.kwargs.values()]) if isinstance(s, (int, float)))
        results = tuple(Stats.of(t) if clean else Stats.brief(t, id(t) not in bad) for t in made)
        meant = clean and _is_meant(spot.op, operands, scalars, results)
        produces = clean and not meant
        first_bad = next(t for t in made if id(t) in bad)
        return Event(
            len(self.events),
            spot,
            forward,
            operands,
            scalars,
            results,
            meant,
            _finite_in_double(call) if produces else None,
            _witness([r.old for r in read], first_bad) if produces else (),
            forward_finite,
        )


@dataclass(frozen=True)
class _Call:
    """An operation, and its arguments that it wrote into as they were before, by their ids."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    before: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Read:
    """A tensor that went in, as it was then; the rest as in `Operand`."""

    old: Tensor
    finite: bool
    writers: tuple[int, ...]
    meant: bool
    depends: bool
    outside: str

    @property
    def is_meant(self) -> bool:
        """Infinities of a literal, or in a constant or a buffer of the model; not those in rows and parameters."""
        given = self.meant if self.writers else not self.outside.startswith(("x", "y", "parameter"))
        return given and not bool(torch.isnan(self.old).any())

    @property
    def is_clean(self) -> bool:
        return self.finite or self.is_meant

    def operand(self, stats: Stats, op: str) -> Operand:
        mask = op == "log" and not self.depends and bool(((self.old == 0) | (self.old == 1)).all())
        return Operand(stats, self.writers, not self.finite and self.is_meant, self.outside, mask)


def _is_meant(op: str, operands: tuple[Operand, ...], scalars: tuple[float, ...], results: tuple[Stats, ...]) -> bool:
    """Infinities that the code fills in, and what is still infinite of them after further operations.

    Args:
        operands: finite, or infinite as they were meant to be.
    """
    if any(r.nans for r in results):
        return False
    filled = any(math.isinf(s) for s in scalars) or not operands
    return filled or any(not o.stats.finite for o in operands) or (op == "log" and operands[0].is_mask)


@lru_cache(maxsize=4096)
def base_name(func: Any) -> str:
    """`add` of aten.add_.Tensor, `softmax` of aten._softmax.default, `addcdiv` of aten._foreach_addcdiv_."""
    return str(func.overloadpacket.__name__).removeprefix("_foreach_").strip("_")


def _is_whole(tensor: Tensor) -> bool:
    """Whether it covers all of its memory, so that writing it leaves nothing of before."""
    values = stored(tensor)
    return values.numel() * values.element_size() == values.untyped_storage().nbytes()


def _finite_in_double(call: _Call) -> bool | None:
    """Whether the same operation on the same numbers is finite in float64; None if it has no such form."""

    def widened(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(widened(v) for v in value)
        if not isinstance(value, Tensor):
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
        old = call.before.get(id(value), value)
        return old.double() if old.is_floating_point() else old.clone() if id(value) in call.before else old

    try:
        result = call.func(*[widened(a) for a in call.args], **{k: widened(v) for k, v in call.kwargs.items()})
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return all(is_finite(t) for t in tensors([result]))


def _witness(operands: list[Tensor], result: Tensor) -> tuple[float, ...]:
    """The operands at the first element of the result that is not finite, where they broadcast to it."""
    if stored(result) is not result:  # sparse or nested: its elements have no such places
        return ()
    try:
        spread = [t.expand(result.shape) for t in operands]
    except RuntimeError:
        return ()
    at = tuple((~torch.isfinite(result)).nonzero()[0].tolist()) if result.dim() else ()
    return tuple(float(t[at].detach()) for t in spread if not t.is_complex())
