"""Lane-wise forms of operations that vmap would run lane by lane (recurrent layers, attention) or slowly.

They take the place of torch's own inside `with LanewiseForms()`, wherever the user's model calls them (`nn.LSTM`,
`nn.MultiheadAttention`, ...). Lanes are a leading dimension of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from recipefuzz.engines import lanewise_rnn
from recipefuzz.engines.in_lanes import in_lanes
from recipefuzz.engines.lanewise_norm import BatchNorm, batch_norm
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.targets.losses import IGNORED

Attention = torch.nn.functional.scaled_dot_product_attention
CrossEntropy = torch.nn.functional.cross_entropy
PLAIN = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}


class LanewiseForms(TorchFunctionMode):
    """Calls of the operations above go to their lane-wise forms."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = FORMS.get(func, func)
        return form(*args, **(kwargs or {}))


@in_lanes
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: Any) -> Tensor:
    """Lanes are rows of the batch: attention has no parameters of its own."""
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, 1)
    flat = [t.flatten(0, 1) for t in (query, key, value)]
    attended = Attention(flat[0], flat[1], flat[2], attn_mask=mask, is_causal=causal, scale=scale)
    unfolded: Tensor = attended.unflatten(0, query.shape[:2])
    return unfolded


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or enable_gqa or query.dim() < 3:
        raise NotFusableError(
            "scaled_dot_product_attention with dropout, grouped queries or no batch has no lane-wise form"
        )
    attended: Tensor = _attend(query, key, value, attn_mask, is_causal, scale)
    return attended


def _cross_entropy(output: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Mean cross-entropy of logits (B, C) and labels (B,) in few calls; with other options torch's own.

    torch's is taken apart for lanes by Python code that imports sympy, which takes half a second.
    """
    plain = all(options.get(name, usual) is usual or options[name] == usual for name, usual in PLAIN.items())
    if not plain or output.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return CrossEntropy(output, target, **options)
    labelled = target != IGNORED
    rows = output.log_softmax(1).gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return -torch.where(labelled, rows, 0.0).sum() / labelled.sum()


def _autocast(function: Any) -> Callable[..., Any]:
    """Under autocast cast as a whole, as alone: vmap takes a layer apart first, and its bias stays fp32."""

    def form(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        half = torch.get_autocast_dtype(x.device.type)
        args, kwargs = tree_map(
            lambda a: a.to(half) if isinstance(a, Tensor) and a.dtype == torch.float32 else a, ((x, *args), kwargs)
        )
        return function(*args, **kwargs)

    return form


CASTED: list[Callable[..., Any]] = [torch.nn.functional.linear, torch.addmm, torch.baddbmm]
CASTED += [torch.conv1d, torch.conv2d, torch.conv3d]
CASTED += [torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d]
MultiHead = torch.nn.functional.multi_head_attention_forward
# torch's own code, which calls the attention by its global name: what a form calls does not come here again
_multi_head = FunctionType(MultiHead.__code__, {**MultiHead.__globals__, "scaled_dot_product_attention": _attention})
_multi_head.__defaults__ = MultiHead.__defaults__

FORMS: dict[Any, Callable[..., Any]] = {
    **lanewise_rnn.FORMS,
    **{function: _autocast(function) for function in CASTED},
    MultiHead: _multi_head,
    Attention: _attention,
    BatchNorm: batch_norm,
    CrossEntropy: _cross_entropy,
}
