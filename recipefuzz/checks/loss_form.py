"""Does the loss take the output for what it is? Asked of both at the untrained model, by moving the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recipefuzz.checks.untrained import Untrained, as_tensor
from recipefuzz.errors import RAISED
from recipefuzz.targets.constraint import equality
from recipefuzz.targets.losses import IGNORED, class_dim

OTHER_WEIGHTS = -100.0  # times the initial ones: an output between 0 and 1 under both is made to be
NUDGES = (0.01, 0.1)  # of the way to the targets; probabilities stay such
SAME = 1e-4  # relative difference of two losses that rounding in float32 explains
LOGITS = {"cross_entropy": "cross_entropy", "bce": "binary_cross_entropy_with_logits"}

Problem = tuple[str, str]  # what was seen, what to do


def wrong_forms(seen: Untrained, x: Any, y: Any, output: Any) -> Iterator[Problem]:
    """What is wrong between output and loss, as far as it shows at once."""
    numbers = as_tensor(output)
    if numbers is None or not isinstance(y, Tensor):
        return
    numbers = numbers.float()
    squashed = _squashed(seen, x, y, numbers)
    if squashed:
        yield squashed
    elif seen.task.loss_kind == "custom":
        yield from filter(None, (_broadcast(seen, y, numbers), _wrong_sign(seen, y, numbers)))


# a softmax or sigmoid too many


def _squashed(seen: Untrained, x: Any, y: Tensor, output: Tensor) -> Problem | None:
    classes = _classes(y, output)
    inside = bool(((output >= 0) & (output <= 1)).all())
    if not inside or output.numel() < 2:
        return None
    if classes is not None and _is_simplex(output) and _applies_softmax(seen, y, output, classes):
        name = LOGITS.get(seen.task.loss_kind, "the loss")
        return (
            f"double softmax: the model's outputs are probabilities that sum to 1, and {name} takes the softmax itself",
            "return logits: remove the softmax at the end of the model",
        )
    if seen.task.loss_kind == "cross_entropy" and _stays_inside(seen, x):
        return (
            "the model's outputs lie between 0 and 1, as of a sigmoid, and cross_entropy takes the softmax of them",
            "return logits: remove the sigmoid at the end of the model",
        )
    if seen.task.loss_kind == "bce" and _stays_inside(seen, x):
        return (
            "double sigmoid: the model's outputs lie between 0 and 1, and bce takes the sigmoid of logits itself",
            "return logits: remove the sigmoid (or softmax) at the end of the model",
        )
    return None


def _is_simplex(output: Tensor) -> bool:
    found = equality(output)
    return found is not None and found.kind == "simplex"


def _applies_softmax(seen: Untrained, y: Tensor, output: Tensor, classes: int) -> bool:
    """Whether the loss stays the same when one number is added to all classes, which only a softmax forgets."""
    if seen.task.loss_kind != "custom":
        return seen.task.loss_kind == "cross_entropy"
    plain, shifted = _losses(seen, y, output, output + 1.0)
    lifted = output.clone()
    lifted.select(classes, 0).add_(1.0)
    return _close(plain, shifted) and not _close(plain, _losses(seen, y, lifted)[0])


def _stays_inside(seen: Untrained, x: Any) -> bool:
    """Whether outputs lie between 0 and 1 under quite other weights, too. The weights are put back."""
    with torch.no_grad():
        kept = [(p, p.clone()) for p in seen.model.parameters()]
        for parameter, _ in kept:
            parameter.mul_(OTHER_WEIGHTS)
        try:
            other = as_tensor(seen.output(x))
        except RAISED:  # these may be no weights that the model can have
            return False
        finally:
            for parameter, old in kept:
                parameter.copy_(old)
    return other is not None and bool(((other >= 0) & (other <= 1)).all()) and bool((other > 0).any())


# a user's own loss


def _broadcast(seen: Untrained, y: Tensor, output: Tensor) -> Problem | None:
    """(N, 1) against (N,) gives (N, N): every row is compared with every other."""
    if output.shape == y.shape or output.numel() != y.numel() or len(y) < 2 or len(output) != len(y):
        return None
    plain, like = _losses(seen, y, output)[0], _losses(seen, y, output.reshape(y.shape))[0]
    if plain is None or like is None or _close(plain, like):
        return None
    shapes = f"{tuple(output.shape)} and {tuple(y.shape)}"
    numbers = f"({plain:.4g}; {like:.4g} with equal shapes)"
    return (
        f"the loss broadcasts output and target of shapes {shapes}: it compares each row with all {numbers}",
        "give both one shape: output.squeeze(-1), or target[:, None]",
    )


def _wrong_sign(seen: Untrained, y: Tensor, output: Tensor) -> Problem | None:
    toward = _direction(y, output)
    if toward is None:
        return None
    here = _losses(seen, y, output)[0]
    steps = [_losses(seen, y, output + n * toward, output - n * toward) for n in NUDGES]
    if here is None or any(better is None or worse is None for better, worse in steps):
        return None
    if all(worse < here < better for better, worse in steps if better is not None and worse is not None):
        better, worse = steps[-1]
        near, far = f"{better:.4g} with outputs nearer to the targets", f"{worse:.4g} with outputs farther off"
        return (
            f"wrong sign: the loss is {here:.4g}, and {near}, {far}",
            "turn the loss's sign: training makes it small (nll_loss wants log-probabilities: add log_softmax)",
        )
    return None


def _direction(y: Tensor, output: Tensor) -> Tensor | None:
    """From the outputs to better ones; None where it is not known what these are."""
    if y.is_floating_point() and y.numel() == output.numel():
        return y.reshape(output.shape).float() - output
    classes = _classes(y, output)
    if classes is None:
        return None
    right = functional.one_hot(y.clamp_min(0).long(), output.shape[classes]).movedim(-1, classes).float()
    return right - (output if _is_simplex(output) else 1 / output.shape[classes])


def _classes(y: Tensor, output: Tensor) -> int | None:
    """The dimension of the outputs that holds the classes of integer labels."""
    if output.dim() < 2:
        return None
    if y.is_floating_point() or y.dtype == torch.bool:
        return 1 if y.shape == output.shape and output.dim() == 2 else None
    dim = class_dim(output, y)
    fits = output.shape[:dim] + output.shape[dim + 1 :] == y.shape
    labelled = y[y != IGNORED]
    return (
        dim
        if fits and labelled.numel() and 0 <= int(labelled.min()) <= int(labelled.max()) < output.shape[dim]
        else None
    )


def _losses(seen: Untrained, y: Tensor, *outputs: Tensor) -> list[float | None]:
    """None where the loss refuses an output."""

    def loss(output: Tensor) -> float | None:
        try:
            return seen.loss(output, y)
        except RAISED:
            return None

    with torch.random.fork_rng(devices=[]):
        return [loss(output) for output in outputs]


def _close(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) <= SAME * max(abs(one), abs(other), 1e-12)
