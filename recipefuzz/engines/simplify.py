"""Fewer and cheaper calls in a recording, with the same results up to rounding.

What vmap and autograd leave behind: aliases, reshapes to the same shape, products with one; sums of a product and a
bias that one call can make; and softmaxes over a few classes, for which the CPU's kernel is slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch.utils._pytree import tree_map

from recipefuzz.engines.capture import Call, Recording, Ref, aten, written

FEW_CLASSES = 48  # under which a row does not fill the vectors of the CPU's softmax (measured: equal at about 64)

ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default)  # noqa: SLF001
SUMS = {aten.bmm.default: aten.baddbmm.default, aten.mul.Tensor: aten.addcmul.default}  # a product, and it with a sum
LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD = aten._log_softmax.default, aten._log_softmax_backward_data.default  # noqa: SLF001


def simplified(recording: Recording, device: torch.device) -> Recording:
    """The recording after all passes."""
    recording = _without_unused(_turned_products(_without_copies(recording)))
    for product, with_sum in SUMS.items():
        recording = _without_unused(_summed(recording, product, with_sum))
    return _small_softmax(recording) if device.type == "cpu" else recording


def _without_copies(recording: Recording) -> Recording:
    """Drop calls that give back their argument."""
    touched = written(recording.calls)
    shapes: dict[int, Any] = {}
    same: dict[int, int] = {}
    calls = []
    for raw in recording.calls:
        call = _renamed(raw, same)
        out = call.outs[0] if call.whole else None
        if out is not None and _gives_back(call, shapes) and out not in touched and call.args[0].index not in touched:
            same[out] = call.args[0].index
            shapes[call.args[0].index] = call.shapes[0]
            continue
        shapes |= {n: s for n, s in zip(call.outs, call.shapes, strict=True) if n is not None}
        calls.append(call)
    outputs = tuple(same.get(n, n) for n in recording.outputs)
    return replace(recording, calls=tuple(calls), outputs=outputs)


def _gives_back(call: Call, shapes: dict[int, Any]) -> bool:
    if call.op in ALIASES:
        return True
    if call.op in RESHAPES:
        return bool(shapes.get(call.args[0].index) == call.shapes[0])
    if call.mixed:  # a product of a bool with one is an integer
        return False
    return call.op is aten.mul.Scalar and call.args[1] == 1 and shapes.get(call.args[0].index) == call.shapes[0]


def _renamed(call: Call, names: dict[int, int]) -> Call:
    args, kwargs = tree_map(
        lambda leaf: Ref(names.get(leaf.index, leaf.index)) if isinstance(leaf, Ref) else leaf, (call.args, call.kwargs)
    )
    return replace(call, args=args, kwargs=kwargs)


def _without_unused(recording: Recording) -> Recording:
    needed = {*recording.outputs, *range(recording.inputs), *recording.constants}
    calls = []
    for call in reversed(recording.calls):
        if call.writes or any(n in needed for n in call.outs if n is not None):
            needed.update(call.reads)
            calls.append(call)
    return replace(recording, calls=tuple(reversed(calls)))


def _turned_products(recording: Recording) -> Recording:
    """(a b)^T as b^T a^T: gradients of linear layers then lie in memory as their weights do."""
    uses, settled = _uses(recording), _settled(recording, aten.bmm.default)
    made = {c.outs[0]: c for c in recording.calls if c.whole}
    numbers = _Numbers(recording)
    calls: list[Call] = []
    for call in recording.calls:
        product = made.get(call.args[0].index) if call.op is aten.transpose.int and call.args[1:] == (1, 2) else None
        if product is None or uses[product.outs[0]] != 1 or product.outs[0] not in settled:
            calls.append(call)
            continue
        sides = []
        for side in reversed(product.args):
            origin = made.get(side.index)
            if origin is not None and origin.op is aten.transpose.int and origin.args[1:] == (1, 2):
                sides.append(origin.args[0])
                continue
            sides.append(Ref(numbers.next()))
            shape = origin.shapes[0] if origin is not None else call.shapes[0]
            turned = replace(call, args=(side, 1, 2), outs=(sides[-1].index,), shapes=((shape[0], *shape[:0:-1]),))
            calls.append(turned)
        calls.append(replace(product, args=tuple(sides), outs=call.outs, shapes=call.shapes))
    return replace(recording, calls=tuple(calls))


def _is_plain(call: Call) -> bool:
    """Whether it takes tensors alone, and of one dtype."""
    return not (call.kwargs or call.mixed) and all(isinstance(a, Ref) for a in call.args)


def _settled(recording: Recording, op: Any) -> set[int | None]:
    """Products in whose place another may be computed where they are used: nothing is written in between."""
    last = {n: i for i, call in enumerate(recording.calls) for n in call.reads}
    writes = [0, *accumulate(bool(call.writes) for call in recording.calls)]
    made = [(i, n) for i, call in enumerate(recording.calls) if call.op is op for n in call.outs]
    return {n for i, n in made if writes[last.get(n or 0, i)] == writes[i]}


def _uses(recording: Recording) -> Counter[int | None]:
    read = [n for call in recording.calls for n in call.reads]
    return Counter([*read, *recording.outputs])


def _summed(recording: Recording, product: Any, with_sum: Any) -> Recording:
    """The sum of a product and something else in one call, where the product is as large, and used for nothing else."""
    uses, settled = _uses(recording), _settled(recording, product)
    products = {c.outs[0]: c for c in recording.calls if c.outs[:1] and c.outs[0] in settled and uses[c.outs[0]] == 1}
    calls = []
    for call in recording.calls:
        if call.op is aten.add.Tensor and _is_plain(call):
            term, rest = call.args
            if term.index not in products:
                term, rest = rest, term
            found = products.get(term.index)
            if found is not None and _is_plain(found) and found.shapes == call.shapes and rest.index != term.index:
                call = replace(call, op=with_sum, args=(rest, *found.args))
        calls.append(call)
    return replace(recording, calls=tuple(calls))


class _Numbers:
    """Fresh numbers for new tensors."""

    def __init__(self, recording: Recording) -> None:
        known = [n for c in recording.calls for n in (*c.outs, *c.reads) if n is not None]
        self._last = max(known, default=0) + recording.inputs

    def next(self) -> int:
        self._last += 1
        return self._last


def _small_softmax(recording: Recording) -> Recording:
    """Softmaxes over a short last dimension, written out."""
    numbers = _Numbers(recording)
    rules: dict[Any, Callable[[Call, _Numbers], list[Call]]] = {
        LOG_SOFTMAX: _log_softmax,
        LOG_SOFTMAX_BACKWARD: _log_softmax_backward,
    }
    calls: list[Call] = []
    for call in recording.calls:
        short = call.op in rules and call.shapes[0] and _is_short(call.shapes[0], call.args)
        calls += rules[call.op](call, numbers) if short else [call]
    return replace(recording, calls=tuple(calls))


def _is_short(shape: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    dim = next(a for a in args if isinstance(a, int) and not isinstance(a, bool))
    return dim % len(shape) == len(shape) - 1 and isinstance(shape[-1], int) and shape[-1] <= FEW_CLASSES


def _call(op: Any, args: tuple[Any, ...], out: int, like: Call) -> Call:
    return Call(op, args, {}, (out,), like.shapes[:1], True, like.sizes[:1])


def _log_softmax(call: Call, numbers: _Numbers) -> list[Call]:
    """As x - max - log(sum(exp(x - max)))."""
    x, out = call.args[0], call.outs[0] or 0
    top, rest, exps, total, log = (numbers.next() for _ in range(5))
    return [
        _call(aten.amax.default, (x, [-1], True), top, call),
        _call(aten.sub.Tensor, (x, Ref(top)), rest, call),
        _call(aten.exp.default, (Ref(rest),), exps, call),
        _call(aten.sum.dim_IntList, (Ref(exps), [-1], True), total, call),
        _call(aten.log.default, (Ref(total),), log, call),
        _call(aten.sub.Tensor, (Ref(rest), Ref(log)), out, call),
    ]


def _log_softmax_backward(call: Call, numbers: _Numbers) -> list[Call]:
    """As gradient - exp(log softmax) * sum(gradient)."""
    gradient, output, out = call.args[0], call.args[1], call.outs[0] or 0
    total, exps, product = (numbers.next() for _ in range(3))
    return [
        _call(aten.sum.dim_IntList, (gradient, [-1], True), total, call),
        _call(aten.exp.default, (output,), exps, call),
        _call(aten.mul.Tensor, (Ref(exps), Ref(total)), product, call),
        _call(aten.sub.Tensor, (gradient, Ref(product)), out, call),
    ]
