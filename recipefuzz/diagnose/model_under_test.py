"""A model and its loss on a few rows as one function of the parameters, the same number at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.recorded_calls import LOSS, Call, Calls, Kind, custom_functions
from recipefuzz.diagnose.slopes import DOUBLE, SINGLE, Precision
from recipefuzz.diagnose.tensors import tensors
from recipefuzz.engines import prepare
from recipefuzz.engines.sequential import one_thread, with_own_loss
from recipefuzz.errors import RAISED
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Loss, some_rows

ROWS = 8  # of the batch: enough for batch norm's statistics
JITTER = 0.01  # relative to a parameter's own size: off the special points at which initial weights may lie
TYPES = {DOUBLE: torch.float64, SINGLE: torch.float32}


@dataclass(frozen=True)
class Subject:
    """See the module.

    Attributes:
        precision: what its arithmetic allows differences to show.
        rounded: whether it computes in float64 but for a part that is cast to fewer bits on the way.
    """

    model: nn.Module
    loss: Loss
    x: Any
    y: Any
    precision: Precision
    rounded: bool
    seed: int
    device: torch.device

    def value(self) -> Tensor:
        return self.again(lambda: self.loss(self.model(self.x), self.y).reshape(()))

    def again(self, function: Callable[[], Tensor]) -> Tensor:
        """A call with the same random numbers each time, after which buffers are as they were before."""
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        if isinstance(self.loss, nn.Module):
            buffers += [(b, b.clone()) for b in self.loss.buffers()]
        with seeded(self.seed, self.device), torch.enable_grad():
            value = function()
        with torch.no_grad():
            for buffer, old in buffers:
                # as data: the backward pass that follows may need the buffer, and would miss what autograd saw written
                buffer.data.copy_(old)
        return value

    def written(self) -> set[str]:
        """Buffers of numbers that a forward pass in training mode writes."""
        before = {name: b.clone() for name, b in self.model.named_buffers() if b.is_floating_point()}
        changed: set[str] = set()

        def run() -> Tensor:
            value = self.loss(self.model(self.x), self.y)
            changed.update(n for n, b in self.model.named_buffers() if n in before and not torch.equal(b, before[n]))
            return value

        self.again(run)
        return changed

    def groups(self) -> dict[str, list[Tensor]]:
        """Trainable parameters by the module that owns them, and those of the loss."""
        found = owned(self.model)
        if isinstance(self.loss, nn.Module) and (own := prepare.trainable(self.loss)):
            found[LOSS] = list(own)
        return found

    def calls(self) -> Calls:
        """One forward pass and the loss, recorded."""
        calls, kinds = Calls(), custom_functions(self.value())
        with calls.of(self.model, kinds):
            self.again(lambda: self._loss_recorded(calls))
        return calls

    def _loss_recorded(self, calls: Calls) -> Tensor:
        output = self.model(self.x)
        calls.modules[LOSS] = Call((self._cut(output), self.y), {})
        return self.loss(output, self.y).reshape(())

    @staticmethod
    def _cut(output: Any) -> Any:
        return tree_map(lambda v: v.detach().clone().requires_grad_(v.requires_grad) if _floats(v) else v, output)

    def of_module(self, name: str, call: Call) -> tuple[Callable[[], Tensor], dict[str, list[Tensor]]]:
        """A module alone, or the loss, as a function of its inputs and parameters."""
        run: Any = self.loss if name == LOSS else self.model.get_submodule(name)
        groups = owned(run, name) if isinstance(run, nn.Module) and name != LOSS else {}
        return self._alone(run, call, groups)

    def of_function(self, kind: Kind, call: Call) -> tuple[Callable[[], Tensor], dict[str, list[Tensor]]]:
        """A custom Function alone, as a function of its inputs."""
        return self._alone(kind.apply, call, {})

    def _alone(
        self, run: Callable[..., Any], call: Call, groups: dict[str, list[Tensor]]
    ) -> tuple[Callable[[], Tensor], dict[str, list[Tensor]]]:
        given = [t for t in tensors([*call.args, *call.kwargs.values()]) if t.requires_grad and _floats(t)]
        inputs = {f"its input {i}" if len(given) > 1 else "its input": [t] for i, t in enumerate(given, start=1)}

        def value() -> Tensor:
            # copies, as a module may write into what it is given
            copies = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (call.args, call.kwargs))
            return _weighted(run(*copies[0], **copies[1]))

        return (lambda: self.again(value)), inputs | groups


def owned(model: nn.Module, prefix: str = "") -> dict[str, list[Tensor]]:
    """Trainable parameters by the module that owns them."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            inside = ".".join(filter(None, (prefix, name.rpartition(".")[0])))
            groups.setdefault(inside, []).append(parameter)
    return groups


def _weighted(output: Any) -> Tensor:
    """A number from all that a call gives, in which every element counts, by another weight."""
    parts = [t for t in tensors([output]) if _floats(t)]
    chance = torch.Generator().manual_seed(0)
    return sum(((t * torch.randn(t.shape, generator=chance, dtype=torch.float64).to(t)).sum() for t in parts), ZERO)


ZERO = torch.zeros(())


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def under_test(patient: Patient) -> Iterator[Subject]:
    """The patient's model near its initial weights, in float64 if it can be computed so, else in float32.

    While this is open, tensors that the model makes have the model's type.
    """
    with one_thread():
        subject = _in_double(patient)
        if subject is None:
            yield _made(patient, SINGLE)
        else:
            with _default_of_double():
                yield subject


@contextmanager
def _default_of_double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _in_double(patient: Patient) -> Subject | None:
    """None if the user's code, or the device, does not compute in float64."""
    try:
        subject = _made(patient, DOUBLE)
        with _default_of_double(), _Casts() as casts:
            torch.autograd.grad(subject.value(), prepare.trainable(subject.model), allow_unused=True)
    except RAISED:
        return None
    if not casts.narrow:
        return subject
    return replace(subject, precision=SINGLE, rounded=True)


def _made(patient: Patient, precision: Precision) -> Subject:
    recipe = patient.recipe.but(init_scale=1.0, precision="fp32")
    kind, device = TYPES[precision], patient.device
    task = with_own_loss(patient.task, device)
    with seeded(patient.seed, device):
        model = prepare.build_model(task, recipe, device).to(kind)
    _jitter(dict(model.named_parameters()))
    loss = task.loss.to(kind) if isinstance(task.loss, nn.Module) else task.loss
    rows = patient.rows
    x, y = rows.take(some_rows(rows, ROWS).to(rows.index_device))
    x, y = tree_map(lambda v: v.to(kind) if _floats(v) else v, (x, y))
    return Subject(model, loss, x, y, precision, False, patient.seed, device)


@torch.no_grad()
def _jitter(parameters: Mapping[str, Tensor]) -> None:
    """Move parameters a little: a ReLU fed with exact zeros is at its kink, and a gain of zero hides what is behind."""
    chance = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.double().square().mean().sqrt()) or 1.0
            noise = torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
            parameter.add_((JITTER * size * noise).to(parameter))


class _Casts(TorchDispatchMode):
    """Sees whether numbers of 64 bits are cast to fewer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrow = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(_floats(t) and t.dtype.itemsize < 8 for t in tensors([result])):
            self.narrow |= any(_floats(t) and t.dtype.itemsize == 8 for t in tensors(args))
        return result
