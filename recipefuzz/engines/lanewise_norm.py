"""Batch normalization of features in lanes: vmap's own moves the lanes among the channels and back, twice a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipefuzz.engines.in_lanes import in_lanes

BatchNorm = torch.nn.functional.batch_norm


class _Lanes(torch.autograd.Function):
    """x (L, B, F), weight and bias (L, F) -> the normalized rows, their means and biased variances (L, F).

    The gradient is that of Ioffe and Szegedy (2015, arXiv:1502.03167), section 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        variance = (centred * centred).mean(1, keepdim=True)
        scale = (variance + eps).rsqrt()
        normal = centred * scale
        ctx.save_for_backward(normal, scale, weight)
        outputs = torch.addcmul(bias.unsqueeze(1), normal, weight.unsqueeze(1)), mean.squeeze(1), variance.squeeze(1)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        normal, scale, weight = ctx.saved_tensors
        d_bias = grads[0].sum(1, keepdim=True)
        d_weight = (grads[0] * normal).sum(1, keepdim=True)
        rows = normal.shape[1]
        d_x = torch.addcmul(grads[0] - d_bias / rows, normal, d_weight / -rows) * (scale * weight.unsqueeze(1))
        return d_x, d_weight.squeeze(1), d_bias.squeeze(1), None


@in_lanes
def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    return _Lanes.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The lane-wise form of `functional.batch_norm` for (B, F) in training; other cases are torch's own."""
    if not training or x.dim() != 2 or len(x) < 2 or weight is None or bias is None:
        return BatchNorm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    out, mean, variance = _normalized(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        running_mean.mul_(1 - momentum).add_(mean * momentum)
        running_var.mul_(1 - momentum).add_(variance * (momentum * len(x) / (len(x) - 1)))
    return out  # type: ignore[no-any-return]
