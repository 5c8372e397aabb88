"""Lane-wise forms of operations that vmap would run lane by lane (an LSTM, attention) or slowly (a cross-entropy).

They take the place of torch's own inside `lanewise_forms()`, wherever the user's model calls them (`nn.LSTM`,
`nn.MultiheadAttention`, ...). Lanes are a leading dimension of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recipefuzz.targets.losses import IGNORED

Attention = torch.nn.functional.scaled_dot_product_attention
CrossEntropy = torch.nn.functional.cross_entropy
PLAIN = {"weight": None, "size_average": None, "ignore_index": IGNORED, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}


class NotFusableError(Exception):
    """Why a model can't be trained in lanes, in words for the user."""


class LanewiseForms(TorchFunctionMode):
    """Calls of the operations above go to their lane-wise forms."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = FORMS.get(func, func)
        return form(*args, **(kwargs or {}))


def _lanes_first(values: Sequence[Tensor], dims: Sequence[int | None], lanes: int) -> list[Tensor]:
    """Tensors with their lanes in front; those that are the same for all lanes, expanded."""
    return [v.expand(lanes, *v.shape) if d is None else v.movedim(d, 0) for v, d in zip(values, dims, strict=True)]


class _Attention(torch.autograd.Function):
    """Lanes are rows of the batch: attention has no parameters of its own."""

    generate_vmap_rule = False

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: Any) -> Tensor:
        return Attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotFusableError("attention over tensors that are no lanes'")

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> tuple[Tensor, int]:
        *tensors, mask, causal, scale = args
        query, key, value = _lanes_first(tensors, dims[:3], info.batch_size)
        if mask is not None:
            (mask,) = _lanes_first([mask], dims[3:4], info.batch_size)
            mask = mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, 1)
        folded = (t.flatten(0, 1) for t in (query, key, value))
        attended = Attention(*folded, attn_mask=mask, is_causal=causal, scale=scale)
        return attended.unflatten(0, query.shape[:2]), 0


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
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)  # type: ignore[no-any-return, no-untyped-call]


class _LstmLanes(torch.autograd.Function):
    """One layer in one direction. x (lanes, B, T, F), h0 and c0 (lanes, B, H), weights as nn.LSTM's with lanes in front.

    Gates as in nn.LSTM: i, f, g, o; c = f c + i g; h = o tanh(c). The backward pass is written out: autograd would make
    twice as many calls, for sums over the steps that one product makes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        lanes, batch, steps, features = x.shape
        size = h0.shape[-1]
        by_step = x.transpose(1, 2).reshape(lanes, steps * batch, features)
        gates = torch.baddbmm(bias.unsqueeze(1), by_step, w_ih.transpose(1, 2)).view(lanes, steps, batch, 4 * size)
        hidden = x.new_empty(steps + 1, lanes, batch, size)
        cells = x.new_empty(steps + 1, lanes, batch, size)
        active = x.new_empty(steps, lanes, batch, 4 * size)
        hidden[0], cells[0] = h0, c0
        into = w_hh.transpose(1, 2)
        for t in range(steps):
            now = torch.baddbmm(gates[:, t], hidden[t], into)
            torch.sigmoid(now, out=active[t])
            i, f, g, o = active[t].split(size, dim=2)
            torch.tanh(now.narrow(2, 2 * size, size), out=g)
            torch.addcmul(i * g, f, cells[t], out=cells[t + 1])
            torch.mul(o, torch.tanh(cells[t + 1]), out=hidden[t + 1])
        ctx.save_for_backward(by_step, w_ih, w_hh, hidden, cells, active)
        return hidden[1:].permute(1, 2, 0, 3), cells[steps].clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        by_step, w_ih, w_hh, hidden, cells, active = ctx.saved_tensors
        steps, lanes, batch, size = active.shape[0], *hidden.shape[1:]
        i, f, g, o = active.split(size, dim=3)
        slopes = active * (1 - active)  # of the sigmoids
        slopes[..., 2 * size : 3 * size] = 1 - g * g  # of the tanh
        tanh = torch.tanh(cells[1:])
        through = o * (1 - tanh * tanh)  # d h / d c
        d_gates = torch.empty_like(active)
        d_out = d_out.permute(2, 0, 1, 3)
        d_hidden, d_cell = d_out[steps - 1], d_last
        for t in range(steps - 1, -1, -1):
            d_cell = torch.addcmul(d_cell, d_hidden, through[t])
            d_i, d_f, d_g, d_o = d_gates[t].split(size, dim=2)
            torch.mul(d_cell, g[t], out=d_i)
            torch.mul(d_cell, cells[t], out=d_f)
            torch.mul(d_cell, i[t], out=d_g)
            torch.mul(d_hidden, tanh[t], out=d_o)
            d_gates[t].mul_(slopes[t])
            d_cell = d_cell * f[t]
            before = d_out[t - 1] if t else torch.zeros_like(d_hidden)
            d_hidden = torch.baddbmm(before, d_gates[t], w_hh)
        flat = d_gates.transpose(0, 1).reshape(lanes, steps * batch, 4 * size)
        before = hidden[:-1].transpose(0, 1).reshape(lanes, steps * batch, size)
        d_x = (flat @ w_ih).view(lanes, steps, batch, -1).transpose(1, 2)
        turned = flat.transpose(1, 2)
        return d_x, d_hidden, d_cell, turned @ by_step, turned @ before, flat.sum(1)


class _LstmLayer(torch.autograd.Function):
    """The same for one lane under vmap."""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        raise NotFusableError("an LSTM over tensors that are no lanes'")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _LstmLanes.apply(*_lanes_first(args, dims, info.batch_size)), (0, 0)  # type: ignore[no-untyped-call]


def _lstm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm(x, (h0, c0), weights, biases, layers, dropout, training, both ways, batch first)`."""
    if isinstance(args[1], Tensor):
        raise NotFusableError("an LSTM over packed sequences has no lane-wise form")
    x, state, weights, biases, layers, dropout, training, both, batch_first = args
    if dropout and training and layers > 1:
        raise NotFusableError("dropout between the layers of an nn.LSTM draws its own random numbers: use nn.Dropout")
    directions, each = 1 + both, 4 if biases else 2
    if len(weights) != layers * directions * each:
        raise NotFusableError("an LSTM with projections (proj_size) has no lane-wise form")
    layer = x if batch_first else x.transpose(0, 1)
    hidden, cells = [], []
    for start in range(0, layers * directions, directions):
        ways = []
        for way in range(directions):
            index = start + way
            outputs, cell = _one_way(layer, state, weights[index * each : (index + 1) * each], index, way == 1)
            ways.append(outputs)
            hidden.append(outputs[:, 0] if way else outputs[:, -1])
            cells.append(cell)
        layer = torch.cat(ways, dim=2) if both else ways[0]
    return layer if batch_first else layer.transpose(0, 1), torch.stack(hidden), torch.stack(cells)


def _one_way(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], index: int, backwards: bool
) -> tuple[Tensor, Tensor]:
    w_ih, w_hh = weights[:2]
    bias = weights[2] + weights[3] if len(weights) == 4 else w_ih.new_zeros(len(w_ih))
    turned = x.flip(1) if backwards else x
    outputs, cell = _LstmLayer.apply(turned, state[0][index], state[1][index], w_ih, w_hh, bias)  # type: ignore[no-untyped-call]
    return outputs.flip(1) if backwards else outputs, cell


def _cross_entropy(output: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Mean cross-entropy of logits (B, C) and labels (B,) in few calls; with other options torch's own.

    torch's is taken apart for lanes by Python code that imports sympy, which takes half a second.
    """
    plain = all(options.get(name, usual) == usual for name, usual in PLAIN.items())
    if not plain or output.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return CrossEntropy(output, target, **options)
    labelled = target != IGNORED
    rows = output.log_softmax(1).gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return -torch.where(labelled, rows, 0.0).sum() / labelled.sum()


FORMS: dict[Any, Callable[..., Any]] = {Attention: _attention, torch.lstm: _lstm, CrossEntropy: _cross_entropy}
