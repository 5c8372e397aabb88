"""How signals pass through a model, forwards and backwards, on one large batch of training rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.activations import Activation, ActivationWatch
from recipefuzz.diagnose.tensors import tensors
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Loss

NUDGE = 1e-3  # relative change of loss and weights that the descent check aims at: small, but far from rounding
LEAST_NUDGE = 1e-5  # relative change of the loss that float32 still shows


@dataclass(frozen=True)
class Weight:
    """A weight's gradient.

    Attributes:
        gradient: its L2 norm relative to the weight's; NaN where the graph does not lead from the loss to the weight.
    """

    name: str
    gradient: float


@dataclass(frozen=True)
class Signals:
    """A model at one time.

    Attributes:
        loss: on the batch.
        activations: of the functions that could be seen, in the order of the forward pass.
        weights: gradients of the parameters with two or more dimensions, in the order of the model.
        backward: by module with weights of its own that the backward pass reaches, L2 norm of the loss's gradient with
            respect to its output, relative to the module that gets the most.
        through_time: for a recurrent model on sequences, the gradient with respect to the inputs at the far end,
            relative to the near end; NaN for others.
        spread: standard deviation of the output over the rows, in units of the targets' where these are numbers of
            the same shape, else as it is (logits).
        descent: change of the loss along a small step downhill, relative to what the gradient promises: 1 where the
            backward pass is right; NaN where it is too small to be seen.
    """

    loss: float
    activations: tuple[Activation, ...]
    weights: tuple[Weight, ...]
    backward: tuple[tuple[str, float], ...]
    through_time: float
    spread: float
    descent: float

    @property
    def dead(self) -> Activation | None:
        """The activation with the most dead units."""
        return max((a for a in self.activations if not math.isnan(a.dead)), key=lambda a: a.dead, default=None)

    @property
    def saturated(self) -> Activation | None:
        """The activation with the most saturated outputs."""
        found = (a for a in self.activations if not math.isnan(a.saturated))
        return max(found, key=lambda a: a.saturated, default=None)

    @property
    def weakest(self) -> tuple[str, float]:
        """The module whose output gets the least of the gradient; ("", 1) where there is none."""
        return min(self.backward, key=lambda pair: pair[1], default=("", 1.0))

    @property
    def unreached(self) -> tuple[str, ...]:
        """Weights that the backward pass does not reach."""
        return tuple(w.name for w in self.weights if math.isnan(w.gradient))


def signals(model: nn.Module, loss: Loss, x: Any, y: Any, device: torch.device) -> Signals:
    """Measure a model in training mode, without a training step. Costs three forward passes and a backward one.

    Parameters and buffers are left as they were.
    """
    model.zero_grad()
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = _Gradients(model)
    watch = ActivationWatch(model)
    x, reached = _followed(x)
    with seeded(0, device):
        with gradients.active(), watch.active():
            output = model(x)
        value = loss(output, y)
        value.backward()
    _put_back(buffers)
    positions = reached() if reached else gradients.embedded
    found = Signals(
        float(value.detach()),
        watch.activations,
        tuple(Weight(n, _relative(p)) for n, p in model.named_parameters() if p.dim() >= 2 and p.requires_grad),
        gradients.relative,
        _through_time(positions) if watch.repeated and positions is not None else math.nan,
        _spread(output, y),
        _descent(model, lambda: loss(model(x), y), value.detach(), device),
    )
    _put_back(buffers)
    model.zero_grad()
    return found


@torch.no_grad()
def _put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, old in kept:
        tensor.copy_(old)


def _followed(x: Any) -> tuple[Any, Callable[[], Tensor | None] | None]:
    """The inputs, and what gives their gradient after the backward pass, where they are sequences of numbers."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3):
        return x, None
    leaf = x.detach().requires_grad_()
    return leaf.clone(), lambda: leaf.grad


class _Gradients:
    """Gradients with respect to what modules give."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {
            name: m for name, m in model.named_modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))
        }
        self._squares: dict[str, float] = {}
        self.embedded: Tensor | None = None

    def active(self) -> ExitStack:
        stack = ExitStack()
        for name, module in self._own.items():
            stack.callback(module.register_forward_hook(self._hook(name)).remove)
        return stack

    @property
    def relative(self) -> tuple[tuple[str, float], ...]:
        squares = ((name, self._squares[name]) for name in self._own if name in self._squares)
        most = max(self._squares.values(), default=0.0)
        return tuple((name, math.sqrt(square / most) if most else 1.0) for name, square in squares)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def arrived(grad: Tensor) -> None:
            self._squares[name] = self._squares.get(name, 0.0) + float(grad.double().square().sum())

        def came(module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in tensors([output]):
                if tensor.requires_grad:
                    tensor.register_hook(arrived)
                    if isinstance(module, nn.Embedding):
                        tensor.register_hook(self._keep)

        return came

    def _keep(self, grad: Tensor) -> None:
        self.embedded = grad


def _relative(parameter: Tensor) -> float:
    if parameter.grad is None:
        return math.nan
    return float(parameter.grad.double().norm() / parameter.detach().double().norm().clamp_min(1e-30))


def _through_time(gradient: Tensor) -> float:
    """Of a gradient (N, T, ...): a quarter of the positions at either end, the weaker relative to the stronger."""
    if gradient.dim() < 3 or gradient.shape[1] < 8:
        return math.nan
    norms = gradient.double().transpose(0, 1).flatten(1).norm(dim=1)
    quarter = len(norms) // 4
    weaker, stronger = sorted((float(norms[:quarter].max()), float(norms[-quarter:].max())))
    return weaker / stronger if stronger else math.nan


def _spread(output: Any, y: Any) -> float:
    first = next(iter(tensors([output])), None)
    if first is None or first.dim() == 0 or len(first) < 2 or not first.is_floating_point():
        return math.nan
    over_rows = float(first.detach().double().std(dim=0).square().mean().sqrt())
    if isinstance(y, Tensor) and y.is_floating_point() and y.shape == first.shape:
        return over_rows / max(float(y.double().std(dim=0).square().mean().sqrt()), 1e-30)
    return over_rows


@torch.no_grad()
def _descent(model: nn.Module, loss: Callable[[], Tensor], before: Tensor, device: torch.device) -> float:
    """As in `Signals`; needs the gradients, and puts the parameters back."""
    moved: list[tuple[Tensor, Tensor]] = [(p, p.clone()) for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    square = sum((float(g.double().square().sum()) for g in gradients), 0.0)
    size = math.sqrt(sum(float(old.double().square().sum()) for _, old in moved))
    if not (0 < square < math.inf) or not math.isfinite(float(before)):
        return math.nan
    step = min(NUDGE * abs(float(before)) / square, NUDGE * size / math.sqrt(square))
    if step * square < LEAST_NUDGE * abs(float(before)):
        return math.nan
    for (parameter, _), gradient in zip(moved, gradients, strict=True):
        parameter.sub_(gradient, alpha=step)
    with seeded(0, device):
        after = loss()
    _put_back(moved)
    return (float(before) - float(after)) / (step * square)
