"""The built-in losses, forgiving about the one shape mismatch that never means anything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from recipefuzz.targets.task import Loss


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats; logits (B, C), (B, C, ...) as in PyTorch, or (B, T, C) per position."""
    torchs = output.shape[:1] + output.shape[2:] == target.shape
    if not torchs and output.shape[:-1] == target.shape:
        return cross_entropy_last(output, target)
    return functional.cross_entropy(output, target)


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


def _like(output: Any, target: Tensor) -> Tensor:
    if output.shape == target.shape:
        return output  # type: ignore[no-any-return]
    if output.numel() == target.numel() and len(output) == len(target):
        return output.reshape(target.shape)  # type: ignore[no-any-return]
    raise ValueError(f"the model's output has shape {tuple(output.shape)}, the target {tuple(target.shape)}")
