"""The same seed twice gives the same numbers, bit for bit; else what differs first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.replay import state_of
from recipefuzz.engines.prepare import BatchOrder
from recipefuzz.finding import Finding, Level

NAME = "determinism"
STEPS = 10

Mark = tuple[str, str]  # what was looked at, and a digest of its bits

ADVICE = {
    "initial": "draw initial weights from the generators of torch, numpy or random, which recipefuzz seeds",
    "batch": "let the Dataset draw from the generators of torch, numpy or random, not from one of its own, and keep no "
    "state from row to row",
    "output": "draw random numbers in forward() from torch's own generator, and keep no state outside the model",
    "loss": "draw random numbers in the loss from torch's own generator, and keep no state outside it",
    "gradient": "look for an operation whose backward pass is random or adds in no fixed order: "
    "torch.use_deterministic_algorithms(True) names it",
    "state": "look for an operation that adds in no fixed order: torch.use_deterministic_algorithms(True) names it",
}


def check(patient: Patient) -> list[Finding]:
    """Train for ten steps, twice."""
    first, second = list(_stretch(patient)), list(_stretch(patient))
    for one, other in zip_longest(first, second, fillvalue=("", "")):
        if one != other:
            kind, _, what = (one[0] or other[0]).partition(": ")
            seen = f"two runs with the seed {patient.seed} differ, first in {what}"
            return [Finding(NAME, Level.FAIL, seen, ADVICE[kind], evidence={"first": what, "kind": kind})]
    seen = f"{STEPS} steps, twice with the seed {patient.seed}: equal bit for bit"
    return [Finding(NAME, Level.PASS, seen, evidence={"steps": STEPS})]


def _stretch(patient: Patient) -> Iterator[Mark]:
    """Digests of all that a few steps make, in the order in which it is made."""
    rows, recipe = patient.rows, patient.recipe
    with patient.replaying() as replay:
        for name, tensor in state_of(replay.model):
            yield f"initial: the initial weights ({name})", _digest(tensor)
        order = BatchOrder(len(rows), recipe.batch_size, patient.seed)
        for step, batch in enumerate(order.draw(STEPS, rows.index_device), start=1):
            x, y = rows.take(batch)
            yield f"batch: the inputs of step {step}", _digest(x)
            yield f"batch: the targets of step {step}", _digest(y)
            outputs: list[Mark] = []
            with _watched(replay.model, step, outputs):
                loss = replay.stepper.step(x, y)
            yield from outputs
            yield f"loss: the loss of step {step}", _digest(loss)
            for name, parameter in replay.model.named_parameters():
                yield f"gradient: the gradient of {name} in step {step}", _digest(parameter.grad)
            for name, tensor in state_of(replay.model):
                yield f"state: {name} after step {step}", _digest(tensor)


def _watched(model: nn.Module, step: int, into: list[Mark]) -> ExitStack:
    """Note what each module gives in a forward pass: the innermost comes first."""
    stack = ExitStack()
    for name, module in model.named_modules():
        what = f"output: the output of {name or 'the model'} in step {step}"

        def came(_module: nn.Module, _args: Any, output: Any, what: str = what) -> None:
            into.append((what, _digest(output)))

        stack.callback(module.register_forward_hook(came).remove)
    return stack


def _digest(value: Any) -> str:
    """Of the bits of all tensors in a value."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            found.update(str((leaf.dtype, leaf.shape)).encode())
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
