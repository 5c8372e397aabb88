"""What every module of a model was given and gave in one forward pass, in the order in which they ended."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines import prepare
from recipefuzz.engines.sequential import one_thread
from recipefuzz.targets.seeding import seeded


@dataclass(frozen=True)
class Call:
    """One call of a module. An inner module's comes before that of the module around it.

    Attributes:
        name: the module's; "" is the model itself.
        kind: its class.
        given, gave: copies of the tensors in its arguments and in what it returned.
    """

    name: str
    kind: str
    given: tuple[Tensor, ...]
    gave: tuple[Tensor, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.name else f"the model itself ({self.kind})"


def fresh_model(patient: Patient) -> nn.Module:
    """The trial's model with its initial weights, in eval mode."""
    with seeded(patient.seed, patient.device):
        return prepare.build_model(patient.task, patient.recipe, patient.device).eval()


def calls_of(patient: Patient, model: nn.Module, x: Any) -> list[Call]:
    """A forward pass without gradients, under the trial's seed; the last call is that of the model itself."""
    calls: list[Call] = []
    waiting: list[tuple[Tensor, ...]] = []

    def hooked(stack: ExitStack, name: str, module: nn.Module) -> None:
        def begins(_module: nn.Module, args: Any, kwargs: Any) -> None:
            waiting.append(_copies((args, kwargs)))

        def ends(_module: nn.Module, _args: Any, output: Any) -> None:
            calls.append(Call(name, type(module).__name__, waiting.pop(), _copies(output)))

        stack.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(ends).remove)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hooked(stack, name, module)
        with torch.no_grad(), seeded(patient.seed, patient.device), one_thread():
            model(x)
    return calls


def _copies(value: Any) -> tuple[Tensor, ...]:
    """Copies, since a later module may work in place."""
    return tuple(leaf.detach().clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


ROUNDINGS = 100  # units in the last place, of the largest element, that another order of a sum can make


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which elements of a tensor are others, beyond rounding: bool, of its shape. NaN is equal to NaN."""
    if not before.is_floating_point():
        return before != after
    a, b = before.double(), after.double()
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return ~torch.isclose(a, b, rtol=0, atol=ROUNDINGS * torch.finfo(before.dtype).eps * scale, equal_nan=True)
