"""One structure's training computation for many lanes: losses and gradients from stacked parameters.

A structure is all that decides which operations are launched: the model factory's arguments, the norm, the precision,
the batch size. Lanes of one structure differ in numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recipefuzz.engines import prepare
from recipefuzz.engines.aot import FEWEST, Step
from recipefuzz.engines.capture import Recording, bytes_per_lane, linear_in_lanes, record, replaying
from recipefuzz.engines.lanewise import LanewiseForms
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.simplify import simplified
from recipefuzz.recipe import Recipe
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Task

CAPTURED_AT = (2, 3)  # lanes; their sizes tell what is linear in the lanes


def unscaled_model(task: Task, recipe: Recipe, seed: int, device: torch.device) -> nn.Module:
    """The structure's model before init_scale."""
    with seeded(seed, device):
        return prepare.build_model(task, recipe.but(init_scale=1.0), device)


class Layout:
    """Where each parameter lies in a lane's flat vector: the weights (two or more dimensions) first, as in `Recorder`.

    Attributes:
        size: parameters of a lane; `weights`: how many of them, from the front, are weights.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        ordered = sorted(trained, key=lambda item: item[1].dim() < 2)
        self.names = [n for n, _ in ordered]
        self.shapes = [tuple(p.shape) for _, p in ordered]
        self.sizes = [p.numel() for _, p in ordered]
        self.size = sum(self.sizes)
        self.scaled = sum(p.numel() for _, p in ordered if p.dim() >= 2)
        self.weights = self.scaled or self.size
        self.dtypes = {p.dtype for _, p in ordered}

    def views(self, flat: Tensor) -> list[Tensor]:
        """Parameters as views of (lanes, size), each (lanes, *shape)."""
        parts = flat.split(self.sizes, dim=1)
        return [part.view(len(flat), *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and parameters that are not trained: each lane has its own, too."""
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    return fixed | dict(model.named_buffers())


@dataclass(frozen=True)
class Start:
    """A structure's tensors before the first step, from one seed, with init_scale 1.

    Attributes:
        flat: parameters that are trained, (size,).
        frozen: the other tensors, each with whether init_scale is for it.
    """

    flat: Tensor
    frozen: tuple[tuple[Tensor, bool], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Start:
        layout, parameters = Layout(model), dict(model.named_parameters())
        flat = torch.cat([parameters[n].detach().reshape(-1) for n in layout.names])
        scaled = {n for n, p in parameters.items() if p.dim() >= 2}
        return cls(flat, tuple((t.clone(), n in scaled) for n, t in frozen_tensors(model).items()))


def flat_inputs(
    trained: Sequence[Tensor], frozen: Sequence[Tensor], x: Tensor, y: Tensor, scale: Tensor | None
) -> list[Tensor]:
    """The arguments of a recording; a compiled one relies on the strides that it was built for."""
    return [*trained, *frozen, x.contiguous(), y.contiguous(), *([] if scale is None else [scale])]


class Program:
    """Losses and gradients of many lanes at once.

    Args:
        recipe: any of the structure.
        model: one of the structure, on the device; it lends its modules, and its tensors are not used.

    Raises:
        NotFusableError: parameters that don't fit one flat vector.
    """

    def __init__(self, task: Task, recipe: Recipe, model: nn.Module, device: torch.device) -> None:
        self._task, self.recipe, self.device = task, recipe, device
        self._model = model
        self.layout = Layout(model)
        self._frozen_names = list(frozen_tensors(model))
        if len(self.layout.dtypes) != 1:
            raise NotFusableError(f"its parameters have several dtypes: {', '.join(map(str, self.layout.dtypes))}")
        self.unused: list[int] = []  # parameters that the loss does not depend on
        self.bytes_per_lane = 0  # known once it is captured
        self.recording: Recording | None = None
        self.compiled: Step | None = None  # in the recording's place, for two lanes or more
        self._make: Callable[[int], Callable[..., tuple[Tensor, ...]]] | None = None
        self._replays: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def _lane_loss(self, trained: Sequence[Tensor], frozen: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        tensors = dict(zip(self.layout.names, trained, strict=True))
        tensors |= dict(zip(self._frozen_names, frozen, strict=True))
        with prepare.autocast(self.recipe, self.device):
            output = functional_call(self._model, tensors, (x,))
            return self._task.loss(output, y).reshape(())

    def losses_and_gradients(
        self, trained: Sequence[Tensor], frozen: Sequence[Tensor], x: Tensor, y: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Losses, (lanes,), and the gradient of each parameter, (lanes, *shape), through vmap and autograd.

        Args:
            trained: as in `Layout.views`. `frozen`: (lanes, *shape) each; changed in place where the model does.
            x, y: batches, (lanes, batch, ...).
            scale: loss scale of each lane, (lanes,), for fp16.
        """
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in trained]
            with LanewiseForms():
                losses = vmap(self._lane_loss)(leaves, list(frozen), x, y)
            total = (losses.float() * scale).sum() if scale is not None else losses.sum()
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        self.unused = [i for i, g in enumerate(gradients) if g is None]
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
        return (losses.detach(), *found)

    def capture(self, trained: Tensor, frozen: Sequence[Tensor], x: Tensor, y: Tensor, scale: Tensor | None) -> None:
        """Record the computation, from three lanes' tensors or more; what it changes in place are copies.

        Raises:
            CannotCaptureError: it can't be recorded. It can still be run.
        """
        recordings = []
        for lanes in CAPTURED_AT:
            tensors = [trained[:lanes].clone(), *(f[:lanes].clone() for f in frozen), x[:lanes], y[:lanes]]
            inputs = [*self.layout.views(tensors[0]), *tensors[1:], *([] if scale is None else [scale[:lanes]])]
            recordings.append(record(self._flat_call, inputs))
        self.recording = simplified(linear_in_lanes(recordings[0], recordings[1], CAPTURED_AT), self.device)
        self.bytes_per_lane = bytes_per_lane(self.recording)
        self._make = replaying(self.recording)
        self._replays.clear()

    def _flat_call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        cut = len(self.layout.names)
        trained, rest = tensors[:cut], tensors[cut:]
        frozen, (x, y, *scale) = rest[: len(self._frozen_names)], rest[len(self._frozen_names) :]
        return self.losses_and_gradients(trained, frozen, x, y, scale[0] if scale else None)

    @property
    def recorded(self) -> bool:
        return self.recording is not None

    def used(self) -> Tensor | None:
        """1 for parameters that the loss depends on, 0 for others, (size,); None where it depends on all."""
        if not self.unused:
            return None
        flags = [float(i not in self.unused) for i in range(len(self.layout.names))]
        parts = [torch.full((n,), flag) for n, flag in zip(self.layout.sizes, flags, strict=True)]
        return torch.cat(parts).to(self.device)

    def step(
        self, trained: Sequence[Tensor], frozen: Sequence[Tensor], x: Tensor, y: Tensor, scale: Tensor | None
    ) -> Sequence[Tensor]:
        """As `losses_and_gradients`, by the compiled recording or the recording if there is one."""
        if self.recording is None:
            return self.losses_and_gradients(trained, frozen, x, y, scale)
        inputs = flat_inputs(trained, frozen, x, y, scale)
        return self.recorded_step(inputs) if self.compiled is None or len(x) < FEWEST else self.compiled(inputs)

    def recorded_step(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `step`, by the recording, from `flat_inputs`."""
        assert self._make is not None
        lanes = len(inputs[0])
        if lanes not in self._replays:
            self._replays[lanes] = self._make(lanes)
        return self._replays[lanes](*inputs)

    def heldout_losses(self, trained: Sequence[Tensor], frozen: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Loss of each lane in eval mode and fp32 on the same rows, (lanes,)."""

        def lane_loss(trained: Sequence[Tensor], frozen: Sequence[Tensor]) -> Tensor:
            tensors = dict(zip(self.layout.names, trained, strict=True))
            tensors |= dict(zip(self._frozen_names, frozen, strict=True))
            return self._task.loss(functional_call(self._model, tensors, (x,)), y).reshape(()).float()

        self._model.eval()
        try:
            with torch.no_grad(), LanewiseForms():
                return vmap(lane_loss)(list(trained), list(frozen))
        finally:
            self._model.train()
