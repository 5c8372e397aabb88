"""Recurrent layers in lanes: `nn.RNN`, `nn.GRU` and `nn.LSTM`, for which vmap has no rule on a CPU.

The inputs' part of all steps is one product; the recurrence is a loop whose backward pass is written out, since
autograd would make twice as many calls and a product for each step's gradient of the weights, where one does for all.
Formulas and weights as in torch (gates r, z, n of the GRU, and i, f, g, o of the LSTM).

Shapes: lanes L, steps T, rows B, features F, hidden size H, G gates. Steps come first: each is contiguous then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recipefuzz.engines.in_lanes import in_lanes
from recipefuzz.engines.not_fusable import NotFusableError

sigmoid_backward = torch.ops.aten.sigmoid_backward
tanh_backward = torch.ops.aten.tanh_backward


def _empty_steps(steps: int, like: Tensor, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Room for (T, L, B, size), whole and step by step."""
    room = like.new_empty(steps, *like.shape[:2], size)
    return room, room.unbind(0)


def _weights_gradient(d_gates: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of w_hh, (L, G H, H), and its bias, (L, G H), from (T, L, B, G H) and the states before each step."""
    flat = d_gates.transpose(0, 1).flatten(1, 2)
    before = hidden.transpose(0, 1).flatten(1, 2)
    return flat.transpose(1, 2) @ before, flat.sum(1)


class _Rnn(torch.autograd.Function):
    """h = activation(gates + h w_hh^T + bias). gates (T, L, B, H), h0 (L, B, H); gives (T, L, B, H)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, _c0: Tensor, w_hh: Tensor, bias: Tensor, relu: bool) -> Any:
        room, out = _empty_steps(len(gates) + 1, h0, h0.shape[2])
        out[0].copy_(h0)
        into, shift = w_hh.transpose(1, 2), bias.unsqueeze(1)
        for t, given in enumerate((gates + shift).unbind(0)):
            now = torch.baddbmm(given, out[t], into)
            torch.clamp(now, min=0, out=out[t + 1]) if relu else torch.tanh(now, out=out[t + 1])
        ctx.save_for_backward(w_hh, room)
        ctx.relu = relu
        return room[1:], h0.new_zeros(len(h0))  # no cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w_hh, room = ctx.saved_tensors
        hidden, d_out = room.unbind(0), grads[0].unbind(0)
        d_room, d_gates = _empty_steps(len(d_out), hidden[0], room.shape[3])
        d_hidden = d_out[-1]
        for t in range(len(d_out) - 1, -1, -1):
            if ctx.relu:
                torch.mul(d_hidden, hidden[t + 1] > 0, out=d_gates[t])
            else:
                tanh_backward.grad_input(d_hidden, hidden[t + 1], grad_input=d_gates[t])
            d_hidden = torch.baddbmm(d_out[t - 1], d_gates[t], w_hh) if t else d_gates[0] @ w_hh
        return d_room, d_hidden, None, *_weights_gradient(d_room, room[:-1]), None


class _Gru(torch.autograd.Function):
    """r, z = sigmoid(.), n = tanh(gates_n + r (h w_hn^T + b_hn)), h = n + z (h - n). gates (T, L, B, 3 H)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, _c0: Tensor, w_hh: Tensor, bias: Tensor, _relu: bool) -> Any:
        size = h0.shape[2]
        room, out = _empty_steps(len(gates) + 1, h0, size)
        out[0].copy_(h0)
        resets, reset = _empty_steps(len(gates), h0, 2 * size)
        news, new = _empty_steps(len(gates), h0, size)
        parts, part = _empty_steps(len(gates), h0, size)
        into, shift = w_hh.transpose(1, 2), bias.unsqueeze(1)
        for t, given in enumerate(gates.unbind(0)):
            recurrent = torch.baddbmm(shift, out[t], into)
            torch.add(given[..., : 2 * size], recurrent[..., : 2 * size], out=reset[t])
            reset[t].sigmoid_()
            part[t].copy_(recurrent[..., 2 * size :])
            r, z = reset[t].split(size, dim=2)
            torch.addcmul(given[..., 2 * size :], r, part[t], out=new[t])
            new[t].tanh_()
            torch.lerp(new[t], out[t], z, out=out[t + 1])
        ctx.save_for_backward(w_hh, room, resets, news, parts)
        return room[1:], h0.new_zeros(len(h0))  # no cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w_hh, room, resets, news, parts = ctx.saved_tensors
        size, hidden, d_out = room.shape[3], room.unbind(0), grads[0].unbind(0)
        d_room, d_recurrent = _empty_steps(len(d_out), hidden[0], 3 * size)
        d_news, d_new = _empty_steps(len(d_out), hidden[0], size)
        reset, new, part = resets.unbind(0), news.unbind(0), parts.unbind(0)
        d_hidden = d_out[-1]
        for t in range(len(d_out) - 1, -1, -1):
            r, z = reset[t].split(size, dim=2)
            through = d_hidden * z
            tanh_backward.grad_input(d_hidden - through, new[t], grad_input=d_new[t])
            d_rz, d_part = d_recurrent[t].split([2 * size, size], dim=2)
            raw = torch.cat([d_new[t] * part[t], d_hidden * (hidden[t] - new[t])], dim=2)
            sigmoid_backward.grad_input(raw, reset[t], grad_input=d_rz)
            torch.mul(d_new[t], r, out=d_part)
            d_hidden = torch.baddbmm(through, d_recurrent[t], w_hh)
            d_hidden = d_hidden + d_out[t - 1] if t else d_hidden
        d_gates = torch.cat([d_room[..., : 2 * size], d_news], dim=3)
        return d_gates, d_hidden, None, *_weights_gradient(d_room, room[:-1]), None


class _Lstm(torch.autograd.Function):
    """i, f, o = sigmoid(.), g = tanh(.), c = f c + i g, h = o tanh(c). gates (T, L, B, 4 H); gives the last c, too."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor, bias: Tensor, _relu: bool) -> Any:
        size = h0.shape[2]
        room, out = _empty_steps(len(gates) + 1, h0, size)
        cells, cell = _empty_steps(len(gates) + 1, h0, size)
        tanhs, tanh = _empty_steps(len(gates), h0, size)
        actives, active = _empty_steps(len(gates), h0, 4 * size)
        out[0].copy_(h0)
        cell[0].copy_(c0)
        into, shift = w_hh.transpose(1, 2), bias.unsqueeze(1)
        for t, given in enumerate((gates + shift).unbind(0)):
            now = torch.baddbmm(given, out[t], into)
            torch.sigmoid(now, out=active[t])
            i, f, g, o = active[t].split(size, dim=2)
            torch.tanh(now.narrow(2, 2 * size, size), out=g)
            torch.addcmul(i * g, f, cell[t], out=cell[t + 1])
            torch.tanh(cell[t + 1], out=tanh[t])
            torch.mul(o, tanh[t], out=out[t + 1])
        ctx.save_for_backward(w_hh, room, cells, tanhs, actives)
        return room[1:], cell[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w_hh, room, cells, tanhs, actives = ctx.saved_tensors
        size, d_out = room.shape[3], grads[0].unbind(0)
        cell, tanh, active = cells.unbind(0), tanhs.unbind(0), actives.unbind(0)
        d_room, d_gates = _empty_steps(len(d_out), cell[0], 4 * size)
        d_hidden, d_cell = d_out[-1], grads[1]
        for t in range(len(d_out) - 1, -1, -1):
            i, f, g, o = active[t].split(size, dim=2)
            d_cell = d_cell + tanh_backward(d_hidden * o, tanh[t])
            raw = torch.cat([d_cell * g, d_cell * cell[t], d_cell, d_hidden * tanh[t]], dim=2)
            sigmoid_backward.grad_input(raw, active[t], grad_input=d_gates[t])
            tanh_backward.grad_input(d_cell * i, g, grad_input=d_gates[t].narrow(2, 2 * size, size))
            d_cell = d_cell * f
            d_hidden = torch.baddbmm(d_out[t - 1], d_gates[t], w_hh) if t else d_gates[0] @ w_hh
        return d_room, d_hidden, d_cell, *_weights_gradient(d_room, room[:-1]), None


def _layer(kind: type[torch.autograd.Function], relu: bool) -> Callable[..., Any]:
    """A layer of one direction under vmap: x (B, T, F), h0 and c0 (B, H), weights and biases as torch's."""

    @in_lanes
    def layer(
        x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> tuple[Tensor, Tensor]:
        lanes, rows, steps, features = x.shape
        by_row = x.transpose(1, 2).reshape(lanes, steps * rows, features)
        given = torch.baddbmm(b_ih.unsqueeze(1), by_row, w_ih.transpose(1, 2))
        gates = given.view(lanes, steps, rows, -1).transpose(0, 1)
        out, last = kind.apply(gates, h0, c0, w_hh, b_hh, relu)
        return out.permute(1, 2, 0, 3), last

    return layer


def recurrent(kind: type[torch.autograd.Function], *, relu: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The lane-wise form of `torch.lstm` and its like: outputs, last hidden states and, of an LSTM, last cells."""
    layer_form, has_cells = _layer(kind, relu), kind is _Lstm

    def form(*args: Any) -> tuple[Tensor, ...]:
        if isinstance(args[3], (list, tuple)):
            raise NotFusableError("recurrent layers over packed sequences have no lane-wise form")
        x, state, weights, biases, layers, dropout, training, both, batch_first = args
        _check(weights, biases, layers * (1 + both), dropout if training and layers > 1 else 0.0)
        hidden, cells = (state, state) if isinstance(state, Tensor) else state
        layer, each = x if batch_first else x.transpose(0, 1), 4 if biases else 2
        last: list[Tensor] = []
        last_cells: list[Tensor] = []
        for first in range(0, layers * (1 + both), 1 + both):
            ways = []
            for index in range(first, first + 1 + both):
                w_ih, w_hh, *bias = weights[index * each : (index + 1) * each]
                bias = bias or [w_ih.new_zeros(len(w_ih))] * 2
                turned = layer.flip(1) if index > first else layer
                out, cell = layer_form(turned, hidden[index], cells[index], w_ih, w_hh, *bias)
                last.append(out[:, -1])
                last_cells.append(cell)
                ways.append(out.flip(1) if index > first else out)
            layer = torch.cat(ways, dim=2) if both else ways[0]
        outputs = layer if batch_first else layer.transpose(0, 1)
        ends = torch.stack(last)
        return (outputs, ends, torch.stack(last_cells)) if has_cells else (outputs, ends)

    return form


def _check(weights: Sequence[Tensor], biases: bool, ways: int, dropout: float) -> None:
    if dropout:
        raise NotFusableError("dropout between the layers of one recurrent module: use single layers and nn.Dropout")
    if len(weights) != ways * (4 if biases else 2):
        raise NotFusableError("an LSTM with projections (proj_size) has no lane-wise form")


FORMS: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh: recurrent(_Rnn),
    torch.rnn_relu: recurrent(_Rnn, relu=True),
    torch.gru: recurrent(_Gru),
    torch.lstm: recurrent(_Lstm),
}
