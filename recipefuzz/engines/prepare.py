"""The only meaning of a recipe: what each of its values does to the model, the optimizer and the rows.

Every engine goes through here, so no engine can mean something else by `init_scale` or `momentum`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from recipefuzz.engines.dropout import seed_dropout
from recipefuzz.recipe import Recipe
from recipefuzz.targets.norms import replace_norms
from recipefuzz.targets.scaling import scaled
from recipefuzz.targets.task import Rows, Task

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(task: Task, recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's model with its initial weights, in training mode.

    The caller has seeded the generators: the weights are drawn here, on the CPU whatever the device, so that
    a trial starts from the same numbers everywhere.

    Raises:
        ValueError: the factory makes no module; `norm` asks for layers and the model neither takes `norm` nor has
            any to replace.
    """
    model = _call_factory(task, recipe)
    _make_dense(model)
    seed_dropout(model, torch.initial_seed())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(recipe.init_scale)
    return model.to(device).train()


def _call_factory(task: Task, recipe: Recipe) -> nn.Module:
    extra: dict[str, Any] = dict(recipe.extra)
    if recipe.norm is not None and task.takes_norm:
        extra["norm"] = recipe.norm
    model = task.build(**extra)
    if not isinstance(model, nn.Module):
        what = "None (is a `return` missing?)" if model is None else f"a {type(model).__name__}"
        raise ValueError(f"the model factory returned {what}, not a torch.nn.Module")
    if any(is_lazy(p) for p in model.parameters()):  # lazy layers get their shapes from a first batch
        with torch.no_grad():
            model(task.train.take(torch.arange(min(2, len(task.train))))[0])
    if recipe.norm is None or task.takes_norm:
        return model
    if replace_norms(model, recipe.norm) == 0 and recipe.norm != "none":
        raise ValueError(
            f"norm = {recipe.norm!r}: the model factory takes no `norm` argument, and the model has no "
            "normalization layers to replace; add a `norm` argument to the factory, or leave the axis out"
        )
    return model


def _make_dense(model: nn.Module) -> None:
    """Embeddings get dense gradients: sparse ones say the same, but have no norm, and most optimizers refuse them."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "rmsprop": (RMSprop, {}),
}


def build_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> Optimizer:
    """The optimizer of torch.optim, with its defaults but for what the recipe says."""
    kind, settings = OPTIMIZERS[recipe.optimizer]
    if recipe.weight_decay is not None:
        settings = settings | {"weight_decay": recipe.weight_decay}
    # the step counter on the device, see loss_scaling; torch knows it on all but these
    capturable = parameters[0].device.type not in ("cpu", "mps")
    if recipe.precision == "fp16" and capturable and kind is not SGD:
        settings = settings | {"capturable": True}
    return kind(parameters, lr=recipe.lr, **settings)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step counted from 0: linear warm-up, then constant."""
    if step >= recipe.warmup_steps:
        return recipe.lr
    return recipe.lr * (step + 1) / recipe.warmup_steps


def clip_gradients(parameters: list[nn.Parameter], recipe: Recipe) -> Tensor:
    """Clip in place, by norm and then by value; return the L2 norm from before, a scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip_norm, norm)
    if recipe.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, recipe.clip_value)
    return norm


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision for forward and loss; a no-op for fp32."""
    if recipe.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[recipe.precision])


def rows_for(task: Task, recipe: Recipe) -> tuple[Rows, Rows]:
    """Training and held-out rows as the recipe scales them.

    Raises:
        ValueError: the inputs or targets can't be scaled.
    """
    return scaled(task.train, task.test, recipe.input_norm, recipe.target_norm)


class BatchOrder:
    """Rows of each step, drawn with replacement from a generator of the trial's own."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size = rows, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, steps: int, device: torch.device) -> Tensor:
        """Indices of the next steps' rows, shape (steps, batch_size), moved to the device in one copy."""
        drawn = [torch.randint(0, self._rows, (self._batch_size,), generator=self._generator) for _ in range(steps)]
        return torch.stack(drawn).to(device, non_blocking=True)
