"""Reference: every module's output on one input, held against what it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipefuzz.checks.reference_file import INPUT, MODEL, TOLERANCE, WEIGHT, Array, Reference, read_reference
from recipefuzz.diagnose.calls import Call, calls_of, fresh_model
from recipefuzz.diagnose.patient import Patient
from recipefuzz.errors import RAISED, InputError, Place, describe_exception, did_you_mean
from recipefuzz.finding import Finding, Level
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import some_rows

NAME = "reference"
ROWS = 4  # that are recorded
# Units in the last place, of an output's largest element. A sum of n products, added in another order, differs by up to
# n of them (Higham 2002, section 3.1), and layers have hundreds to a thousand inputs; a wrong formula differs by more.
ROUNDINGS = 1000


@dataclass(frozen=True)
class _Compared:
    """One output against its reference.

    Attributes:
        difference: the largest one; NaN where one of the two is NaN, inf where shapes differ.
        at: its place and the two values there, in words; the two shapes where these differ.
    """

    key: str
    call: Call
    difference: float
    at: str
    same: bool


def check(patient: Patient) -> list[Finding]:
    """Nothing where the config has no reference. Costs one forward pass."""
    reference = read(patient)
    if reference is None:
        return []
    try:
        results = list(_compared(reference, dict(_calls(patient, reference))))
    except RAISED as error:
        seen = f"the model raised on the reference's input: {describe_exception(error)}"
        return [Finding(NAME, Level.FAIL, seen, "give an input that the model takes, rows first")]
    evidence = {"differences": {r.key: r.difference for r in results}}
    for count, result in enumerate(results):
        if not result.same:
            before = f"{count} before it agree" if count else "it is the first that is compared"
            seen = f"{result.key} ({result.call.kind}) is the first that differs, {result.at}; {before}"
            todo = f"look at {result.key}, and at what it is given: all that is known from before it is right"
            return [Finding(NAME, Level.FAIL, seen, todo, evidence=evidence | {"module": result.key})]
    largest = max(r.difference for r in results)
    seen = f"{len(results)} outputs agree with {patient.config.reference}, largest difference {largest:.2g}"
    return [Finding(NAME, Level.PASS, seen, evidence=evidence)]


def read(patient: Patient) -> Reference | None:
    """The config's reference; None where it has none.

    Raises:
        InputError: a file that can't be read, names that the model does not have, weights of another shape.
    """
    path, place = patient.config.reference_path, patient.config.source.place("reference")
    if path is None:
        return None
    reference, model = read_reference(path, place), fresh_model(patient)
    modules = {name or MODEL for name, _ in model.named_modules()}
    for key in reference.outputs:
        if _module(key) not in modules:
            raise _unknown(f"{path.name}: the model has no module {_module(key)!r}", place, _module(key), modules)
    _set(model, reference, path.name, place)
    try:
        known = dict(_calls(patient, reference))
    except RAISED:  # the model's fault or the input's: a finding
        return reference
    for key in reference.outputs:
        if key not in known:
            fix = did_you_mean(key, known)
            problem = f"{path.name}: the model's forward pass gives no output {key!r} on this input"
            raise InputError(problem, place=place, expected="an output of a module that runs", fix=fix)
    return reference


def recorded(patient: Patient) -> Reference:
    """The model as it is: outputs on a few training rows, and its weights."""
    rows, model = patient.rows, fresh_model(patient)
    with seeded(patient.seed, patient.device):
        x = rows.take(some_rows(rows, ROWS).to(rows.index_device))[0]
    named = dict(x) if isinstance(x, dict) else {"": x} if isinstance(x, Tensor) else _numbered(x)
    if not all(isinstance(value, Tensor) for value in named.values()):
        raise InputError(
            "only inputs that are tensors can be recorded",
            place=patient.config.source.place("target", "data"),
            found=type(x),
            expected="a tensor, or a dict, list or tuple of tensors",
        )
    weights = {name: _array(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    outputs = {key: _array(value) for key, (_, value) in _outputs(calls_of(patient, model, x)) if not _reserved(key)}
    return Reference({name: _array(value) for name, value in named.items()}, outputs, weights)


def _numbered(x: Any) -> dict[str, Any]:
    return {str(i): part for i, part in enumerate(x)} if isinstance(x, (list, tuple)) else {"": x}


def _reserved(key: str) -> bool:
    return key.partition(":")[0] == INPUT or key == TOLERANCE or key.startswith(WEIGHT)


def _array(tensor: Tensor) -> Array:
    values = tensor.detach().cpu()
    return values.float().numpy() if values.dtype is torch.bfloat16 else values.numpy().copy()


def _calls(patient: Patient, reference: Reference) -> Iterator[tuple[str, tuple[Call, Tensor]]]:
    """What the model gives on the reference's input, by key, in the order of execution."""
    model = fresh_model(patient)
    path = patient.config.reference_path
    _set(model, reference, path.name if path else "", patient.config.source.place("reference"))
    with seeded(patient.seed, patient.device):
        like = patient.rows.take(torch.arange(1, device=patient.rows.index_device))[0]
    yield from _outputs(calls_of(patient, model, _input(reference, like, patient.device)))


def _outputs(calls: list[Call]) -> Iterator[tuple[str, tuple[Call, Tensor]]]:
    times: Counter[str] = Counter()
    for call in calls:
        times[call.name] += 1
        name = (call.name or MODEL) + (f"#{times[call.name]}" if times[call.name] > 1 else "")
        for index, tensor in enumerate(call.gave):
            yield name + (f":{index}" if index else ""), (call, tensor)


def _module(key: str) -> str:
    return key.partition(":")[0].partition("#")[0]


def _input(reference: Reference, like: Any, device: torch.device) -> Any:
    """The input, numbers in the type that the training rows have."""
    if isinstance(like, dict):
        return {name: _tensor(array, like.get(name), device) for name, array in reference.inputs.items()}
    if "" in reference.inputs:
        return _tensor(reference.inputs[""], like, device)
    parts = sorted(reference.inputs.items(), key=lambda item: (len(item[0]), item[0]))
    kinds = [*like] if isinstance(like, (list, tuple)) else []
    made = [_tensor(array, kinds[i] if i < len(kinds) else None, device) for i, (_, array) in enumerate(parts)]
    return tuple(made) if isinstance(like, tuple) else made


def _tensor(array: Array, like: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    kind = like.dtype if isinstance(like, Tensor) else torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, kind)


@torch.no_grad()
def _set(model: nn.Module, reference: Reference, file: str, place: Place) -> None:
    state = model.state_dict()
    for name, array in reference.weights.items():
        if name not in state:
            raise _unknown(f"{file}: the model has no weight {name!r}", place, name, state)
        if tuple(state[name].shape) != array.shape:
            problem, expected = f"{file}: weight:{name} has another shape", f"{tuple(state[name].shape)}"
            raise InputError(problem, place=place, found=f"{array.shape}", expected=expected)
        state[name].copy_(torch.from_numpy(np.array(array)))


def _unknown(problem: str, place: Place, name: str, known: Any) -> InputError:
    return InputError(
        problem, place=place, expected=f"a name of the {len(known)} there are", fix=did_you_mean(name, known)
    )


def _compared(reference: Reference, outputs: dict[str, tuple[Call, Tensor]]) -> Iterator[_Compared]:
    for key, (call, tensor) in outputs.items():
        if key in reference.outputs:
            yield _against(key, call, tensor, reference.outputs[key], reference.tolerance)


def _against(key: str, call: Call, tensor: Tensor, array: Array, tolerance: float | None) -> _Compared:
    got, right = tensor.double().cpu(), torch.from_numpy(np.array(array, dtype=np.float64))
    if got.shape != right.shape:
        at = f"its shape is {tuple(got.shape)}, the reference's {tuple(right.shape)}"
        return _Compared(key, call, float("inf"), at, same=False)
    if not got.numel():
        return _Compared(key, call, 0.0, "", same=True)
    difference = torch.where((got == right) | (got.isnan() & right.isnan()), 0.0, (got - right).abs())
    place = np.unravel_index(int(difference.nan_to_num(nan=float("inf")).argmax()), tuple(got.shape))
    index = tuple(map(int, place))
    largest = float(difference[index])
    at = f"by up to {largest:.3g} at {list(index)}: {float(got[index]):.6g}, the reference {float(right[index]):.6g}"
    return _Compared(key, call, largest, at, same=largest <= _allowed(tensor, right, tolerance))


def _allowed(tensor: Tensor, right: Tensor, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    if not tensor.is_floating_point():
        return 0.0
    finite = right[torch.isfinite(right)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return ROUNDINGS * max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps) * scale
