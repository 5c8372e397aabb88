"""What a model's activation functions do on a batch: units that are dead, outputs that are saturated.

The functions are seen as the kernels that are launched, so `torch.relu` counts as `nn.ReLU` does. What a kernel keeps
inside (the gates of a fused LSTM, fused attention) is not seen, and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recipefuzz.diagnose.tensors import storage, tensors
from recipefuzz.diagnose.watching import OVER_AND_OVER, base_name

SLOPE = 0.01  # of a function's greatest slope, under which an output is saturated: a hundredth gets through it
CONVOLUTIONS = ("convolution", "mkldnn_convolution")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", *CONVOLUTIONS)
RECTIFIERS = ("relu", "threshold", "clamp_min")
BOUNDED = ("hardtanh", "clamp", "clamp_max", "hardsigmoid")
SMOOTH = ("tanh", "sigmoid", "softmax")


@dataclass(frozen=True)
class Activation:
    """One activation function in the forward pass.

    Attributes:
        layer: the weight that feeds it, else the module that it runs in.
        op: its name in ATen.
        units: features or channels.
        dead: share of the units of a rectifier that give 0 for every row, and so pass no gradient; NaN for others.
        saturated: share of the outputs of a bounded function where its slope is under a hundredth of its greatest
            (softmax: of the rows); NaN for others.
    """

    layer: str
    op: str
    units: int
    dead: float
    saturated: float


@dataclass
class _Seen:
    """All calls of one function behind one weight: a recurrent net makes one a time step."""

    off: Tensor  # (units,), units that were flat for every row so far
    flat: float
    outputs: int


class ActivationWatch(TorchDispatchMode):
    """Watches a forward pass.

    Attributes:
        repeated: whether one weight is applied many times over, as in a recurrence.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._weights = {storage(p): name for name, p in model.named_parameters() if p.dim() >= 2}
        self._uses = dict.fromkeys(self._weights, 0)
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._modules: list[str] = []
        self._layer, self._channels = "", False

    @contextmanager
    def active(self) -> Iterator[ActivationWatch]:
        """Watch, and follow which module is being called."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                enter = module.register_forward_pre_hook(lambda _m, _a, name=name: self._modules.append(name))
                leave = module.register_forward_hook(lambda _m, _a, _o: self._left(), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            stack.enter_context(self)
            yield self

    def _left(self) -> None:
        self._modules.pop()

    @property
    def repeated(self) -> bool:
        fused = any(isinstance(m, nn.RNNBase) for m in self._model.modules())
        return fused or any(uses >= OVER_AND_OVER for uses in self._uses.values())

    @property
    def activations(self) -> tuple[Activation, ...]:
        """In the order of their first calls."""
        return tuple(self._activation(layer, op, seen) for (layer, op), seen in self._seen.items())

    @staticmethod
    def _activation(layer: str, op: str, seen: _Seen) -> Activation:
        rectifier = op in RECTIFIERS
        dead = float(seen.off.float().mean()) if rectifier else math.nan
        saturated = math.nan if rectifier else seen.flat / max(seen.outputs, 1)
        return Activation(layer, op, len(seen.off), dead, saturated)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = base_name(func)
        given = args[0].clone() if op in BOUNDED else None
        result = func(*args, **kwargs)
        if op in PRODUCTS:
            self._weighed(op, args)
        elif isinstance(result, Tensor) and result.dim() >= 2 and result.is_floating_point() and result.numel():
            flat = _flat(op, given, result)
            if flat is not None:
                rectifies = op == "clamp" and len(args) < 3 and not kwargs.get("max") and not result.lt(0).any()
                self._add("relu" if rectifies else op, flat)
        return result

    def _weighed(self, op: str, args: tuple[Any, ...]) -> None:
        """A product: what follows belongs to its weight."""
        self._channels = op in CONVOLUTIONS
        for key in {storage(t) for t in tensors(args)} & self._weights.keys():
            self._layer = self._weights[key].removesuffix(".weight")
            self._uses[key] += 1

    def _add(self, op: str, flat: Tensor) -> None:
        key = (self._layer or (self._modules[-1] if self._modules else ""), op)
        unit = 1 if self._channels else flat.dim() - 1
        off = flat.transpose(0, unit).flatten(1).all(dim=1)
        seen = self._seen.get(key)
        if seen is None or seen.off.shape != off.shape:
            self._seen[key] = _Seen(off, float(flat.sum()), flat.numel())
            return
        seen.off &= off
        seen.flat += float(flat.sum())
        seen.outputs += flat.numel()


def _flat(op: str, given: Tensor | None, result: Tensor) -> Tensor | None:
    """Where a function's slope is as good as zero, shaped as its result (softmax: a single last column); else None."""
    if op in RECTIFIERS:
        return result <= 0
    if given is not None:
        return (result != given) if op != "hardsigmoid" else (result <= 0) | (result >= 1)
    if op not in SMOOTH:
        return None
    if op == "tanh":
        return 1 - result**2 < SLOPE
    slope = result * (1 - result) * 4  # at most 1 for a sigmoid, and for one of a softmax's outputs
    return slope < SLOPE if op == "sigmoid" else result.amax(dim=-1, keepdim=True) > 1 - SLOPE / 4
