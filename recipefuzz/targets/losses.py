"""The built-in losses, forgiving about the one shape mismatch that never means anything else."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from recipefuzz.targets.task import Loss

IGNORED = -100  # torch's ignore_index: a position that has no label


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats; logits (B, C), (B, C, ...) as in PyTorch, or (B, T, C) per position."""
    if class_dim(output, target) == 1:
        return functional.cross_entropy(output, target)
    return cross_entropy_last(output, target)


def class_dim(output: Tensor, target: Tensor) -> int:
    """The dimension of the logits that holds the classes: 1 as in PyTorch, or the last if only that fits the labels."""
    last = output.dim() - 1
    return last if _fits(output, target, last) and not _fits(output, target, 1) else 1


def is_ambiguous(output: Tensor, target: Tensor) -> bool:
    """Whether dimension 1 and the last both fit: as many positions as classes."""
    last = output.dim() - 1
    return last > 1 and _fits(output, target, 1) and _fits(output, target, last)


def _fits(output: Tensor, target: Tensor, classes: int) -> bool:
    return output.shape[:classes] + output.shape[classes + 1 :] == target.shape


def cross_entropy_last(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits with the classes in the last dimension: (..., C) and (...)."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error. (B, 1) and (B,) are the same thing here, and are not broadcast to (B, B)."""
    return functional.mse_loss(_like(output, target), target)


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats of logits (no sigmoid in the model); targets 0 or 1."""
    return functional.binary_cross_entropy_with_logits(_like(output, target), target.to(output.dtype))


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "bce": bce}


def is_like(output: Tensor, target: Tensor) -> bool:
    """Whether mse and bce take them as they are, or after a reshape that can mean nothing else."""
    same_rows = output.dim() > 0 and target.dim() > 0 and len(output) == len(target)
    return output.shape == target.shape or (same_rows and output.numel() == target.numel())


def mismatch(output: Tensor, target: Tensor) -> str:
    return f"the model's output has shape {tuple(output.shape)}, the target {tuple(target.shape)}"


def _like(output: Tensor, target: Tensor) -> Tensor:
    if not is_like(output, target):
        raise ValueError(mismatch(output, target))
    return output.reshape(target.shape)
