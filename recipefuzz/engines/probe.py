"""Whether a model can be trained in lanes: tried, and compared with what it computes alone."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from recipefuzz.engines import prepare
from recipefuzz.engines.capture import CannotCaptureError
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.program import CAPTURED_AT, Program, Start, frozen_tensors, unscaled_model
from recipefuzz.engines.sequential import is_lack_of_memory
from recipefuzz.errors import RAISED
from recipefuzz.recipe import Recipe
from recipefuzz.targets.task import Rows, Task, TensorRows

TOLERANCE = 1e-3  # of a loss or a gradient, relative to the largest: what rounding makes of two steps
HALF_TOLERANCE = 0.05  # bf16 keeps 8 bits, and sums in another order differ in some of them
STEPS = 2  # a model that counts its calls in Python shows it at the second
RATE = 1e-3
LANE = 1  # that is compared: neither the first nor the last


def tensors_of(rows: Rows) -> TensorRows:
    """The rows of a target that can be fused.

    Raises:
        NotFusableError: others.
    """
    if not isinstance(rows, TensorRows):
        raise NotFusableError("its rows come one by one from a Dataset: return tensors where they fit in memory")
    return rows


def probed(task: Task, recipe: Recipe, rows: TensorRows, device: torch.device) -> Program:
    """The program of a recipe's structure, recorded where it can be.

    Raises:
        NotFusableError: lanes can't be run, or compute something else than the model alone.
    """
    lent, alone = (unscaled_model(task, recipe, 0, device) for _ in range(2))
    lanes = max(CAPTURED_AT)
    shares = torch.linspace(1.0, 0.5, lanes, device=device)
    with torch.no_grad():
        for parameter in prepare.trainable(alone):
            parameter.mul_(shares[LANE])
    program, start = Program(task, recipe, lent, device), Start.of(lent)
    ordered = [alone.get_parameter(name) for name in program.layout.names]
    trained = shares[:, None] * start.flat
    frozen = [t.repeat(lanes, *[1] * t.dim()) for t, _ in start.frozen]
    scale = torch.ones(lanes, device=device) if recipe.precision == "fp16" else None
    index = torch.arange(lanes * recipe.batch_size, device=rows.index_device).view(lanes, -1) % len(rows)
    x, y = rows.take(index)
    for step in range(STEPS):
        try:
            losses, *gradients = program.step(program.layout.views(trained), frozen, x, y, scale)
        except RAISED as error:
            if is_lack_of_memory(error):
                raise
            raise NotFusableError(_said(error)) from error
        mine = [losses[LANE], *(g[LANE] for g in gradients)]
        _compare(mine, plain_step(task, recipe, alone, ordered, x[LANE], y[LANE]), recipe)
        trained = trained - RATE * torch.cat([g.reshape(lanes, -1) for g in gradients], dim=1)
        if step == 0:  # the recording is what makes, and is compared at, the second
            with contextlib.suppress(CannotCaptureError):
                program.capture(trained, frozen, x, y, scale)
    _compare([f[LANE] for f in frozen], list(frozen_tensors(alone).values()), recipe)
    return program


def plain_step(
    task: Task, recipe: Recipe, model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor
) -> list[Tensor]:
    """Loss and gradients of one step of gradient descent, which is then made.

    An optimizer of torch.optim would import torch._dynamo, which takes as long as a small search.
    """
    with prepare.autocast(recipe, x.device):
        loss = task.loss(model(x), y)
    found = torch.autograd.grad(loss.float(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(RATE * gradient)
    return [loss.detach().reshape(()), *gradients]


def tolerance(recipe: Recipe) -> float:
    """What two ways to compute the same may differ by, relative to the largest number."""
    return TOLERANCE if recipe.precision == "fp32" else HALF_TOLERANCE


def _compare(lane: list[Tensor], alone: list[Tensor], recipe: Recipe) -> None:
    allowed = tolerance(recipe)
    largest = max((float(a.abs().max()) for a in alone if a.numel()), default=0.0)
    for mine, own in zip(lane, alone, strict=True):
        if not torch.allclose(mine.float(), own.float(), allowed, allowed * largest, equal_nan=True):
            raise NotFusableError("in lanes it computes something else than alone: does it keep a state in Python?")


def _said(error: BaseException) -> str:
    """The messages of vmap name what it can't do, after which they advise those who call vmap."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {first}" if not isinstance(error, NotFusableError) else str(error)
