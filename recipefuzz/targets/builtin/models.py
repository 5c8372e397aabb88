"""Built-in models. A factory takes some rows of the input, for their shape, and the number of outputs.

Inputs or arguments that a model can't take are a ValueError. Keyword arguments that all factories have:
    vocab: number of token ids, where the input is tokens (int64).
    per_position: whether each position of a sequence has its own output, (N, T, outputs), else (N, outputs).
    norm: a kind of `recipefuzz.targets.norms`; changes no initial weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipefuzz.targets.norms import make_norm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
POSITION_SCALE = 0.02  # standard deviation of the initial positions, as in GPT-2
SEQUENCE_MODELS = "rnn, gru, lstm and transformer"


def mlp(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 64,
    depth: int = 3,
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """Linear, norm, activation, ... Linear: `depth` linear layers. Inputs (N, ...), flattened."""
    _check_whole("mlp", width=width, depth=depth)
    _check_known("mlp", "activation", activation, ACTIVATIONS)
    _reject_sequence("mlp", vocab, sample_x, per_position)
    if sample_x.dim() < 2:
        raise ValueError(
            f"model mlp: got inputs {_shape(sample_x)}, expected (N, features): "
            "a number a row is one feature, x[:, None]"
        )
    layers: list[nn.Module] = [nn.Flatten()] if sample_x.dim() > 2 else []
    features = sample_x[0].numel()
    for _ in range(depth - 1):
        layers += [nn.Linear(features, width), make_norm(norm, width, channels_first=False)]
        layers += [ACTIVATIONS[activation](), *_dropout(dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def cnn(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 16,
    depth: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """`depth` blocks of 3x3 convolution, norm and ReLU, each but the first halving the image; mean; linear.

    Inputs (N, C, H, W), or (N, F) with F = s * s, taken as grey images.
    """
    _check_whole("cnn", width=width, depth=depth)
    _reject_sequence("cnn", vocab, sample_x, per_position)
    layers, channels = _image_input(sample_x)
    for block in range(depth):
        stride = 1 if block == 0 else 2
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1)]
        layers += [make_norm(norm, width, channels_first=True), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def rnn(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 64,
    depth: int = 1,
    activation: str = "tanh",
    dropout: float = 0.0,
) -> nn.Module:
    """`nn.RNN` with "tanh" or "relu", see `Recurrent`."""
    _check_whole("rnn", width=width, depth=depth)
    _check_known("rnn", "activation", activation, ("tanh", "relu"))
    entry, features = _sequence_input("rnn", sample_x, vocab, width)
    between = dropout if depth > 1 else 0.0  # torch warns where there is no "between"
    core = nn.RNN(features, width, depth, nonlinearity=activation, batch_first=True, dropout=between)
    return Recurrent(entry, core, outputs, per_position=per_position, norm=norm, dropout=dropout)


def gru(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 64,
    depth: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """`nn.GRU`, see `Recurrent`."""
    _check_whole("gru", width=width, depth=depth)
    entry, features = _sequence_input("gru", sample_x, vocab, width)
    core = nn.GRU(features, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
    return Recurrent(entry, core, outputs, per_position=per_position, norm=norm, dropout=dropout)


def lstm(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 64,
    depth: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """`nn.LSTM`, see `Recurrent`."""
    _check_whole("lstm", width=width, depth=depth)
    entry, features = _sequence_input("lstm", sample_x, vocab, width)
    core = nn.LSTM(features, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
    return Recurrent(entry, core, outputs, per_position=per_position, norm=norm, dropout=dropout)


def transformer(
    sample_x: Tensor,
    outputs: int,
    *,
    vocab: int | None = None,
    per_position: bool = False,
    norm: str = "none",
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """Causal pre-norm transformer, see `Transformer`; for sequences no longer than the sample's."""
    _check_whole("transformer", width=width, depth=depth, heads=heads)
    if width % heads:
        raise ValueError(
            f"model transformer: got width = {width} and heads = {heads}, expected a width that is "
            f"a multiple of heads, such as {math.ceil(width / heads) * heads}"
        )
    entry, features = _sequence_input("transformer", sample_x, vocab, width)
    if vocab is None:
        entry = nn.Sequential(entry, nn.Linear(features, width))
    blocks = [Block(width, heads, norm, dropout) for _ in range(depth)]
    final = make_norm(norm, width, channels_first=False)
    return Transformer(entry, sample_x.shape[1], nn.Sequential(*blocks), final, nn.Linear(width, outputs), per_position)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "rnn": rnn,
    "gru": gru,
    "lstm": lstm,
    "transformer": transformer,
}


class Recurrent(nn.Module):
    """Tokens (N, T), vectors (N, T, F) or numbers (N, T) -> recurrent layers -> norm -> linear head.

    The head sees every position or the last one; the norm is before it, and none between stacked layers.
    """

    def __init__(
        self,
        entry: nn.Module,
        core: nn.RNNBase,
        outputs: int,
        *,
        per_position: bool,
        norm: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.entry, self.core = entry, core
        self.norm = make_norm(norm, core.hidden_size, channels_first=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(core.hidden_size, outputs)
        self.per_position = per_position

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.core(self.entry(x))[0]
        seen = hidden if self.per_position else hidden[:, -1]
        output: Tensor = self.head(self.dropout(self.norm(seen)))
        return output


class Transformer(nn.Module):
    """Tokens (N, T), vectors (N, T, F) or numbers (N, T) -> causal blocks -> norm -> linear head."""

    def __init__(
        self,
        entry: nn.Module,
        positions: int,
        blocks: nn.Module,
        norm: nn.Module,
        head: nn.Linear,
        per_position: bool,
    ) -> None:
        super().__init__()
        self.entry, self.blocks, self.norm, self.head = entry, blocks, norm, head
        self.positions = nn.Parameter(torch.randn(positions, head.in_features) * POSITION_SCALE)
        self.per_position = per_position

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.blocks(self.entry(x) + self.positions[: x.shape[1]])
        seen = hidden if self.per_position else hidden[:, -1]
        output: Tensor = self.head(self.norm(seen))
        return output


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width, channels_first=False)
        self.attention = CausalAttention(width, heads)
        self.norm2 = make_norm(norm, width, channels_first=False)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        output: Tensor = x + self.dropout(self.feedforward(self.norm2(x)))
        return output


class CausalAttention(nn.Module):
    """Scaled dot-product self-attention over (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # no biases: that of the keys cancels in the softmax, and would be a parameter that never learns
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, width / heads)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return output


def _image_input(sample_x: Tensor) -> tuple[list[nn.Module], int]:
    """Layers that make images of the inputs, and the images' channels."""
    if sample_x.dim() == 4:
        return [], sample_x.shape[1]
    side = math.isqrt(sample_x.shape[1]) if sample_x.dim() == 2 else 0
    if sample_x.dim() == 2 and side * side == sample_x.shape[1]:
        return [nn.Unflatten(1, (1, side, side))], 1
    raise ValueError(
        f"model cnn: got inputs {_shape(sample_x)}, expected images (N, C, H, W), or (N, F) with F a square "
        f"number such as 64; for features use mlp, for sequences {SEQUENCE_MODELS}"
    )


def _sequence_input(model: str, sample_x: Tensor, vocab: int | None, width: int) -> tuple[nn.Module, int]:
    """Make a module that turns the inputs into (N, T, features); with it, the number of features."""
    tokens = not sample_x.is_floating_point()
    if tokens and sample_x.dim() == 2:
        if vocab is None:
            raise ValueError(f"model {model}: got tokens, but no vocab; expected the number of token ids")
        return nn.Embedding(vocab, width), width
    if not tokens and sample_x.dim() == 3:
        return nn.Identity(), sample_x.shape[2]
    if not tokens and sample_x.dim() == 2:
        return nn.Unflatten(1, (-1, 1)), 1
    raise ValueError(
        f"model {model}: got {sample_x.dtype} inputs {_shape(sample_x)}, expected int64 tokens (N, T), or "
        "numbers (N, T, F) or (N, T); for images use cnn, for anything else mlp"
    )


def _reject_sequence(model: str, vocab: int | None, sample_x: Tensor, per_position: bool) -> None:
    if vocab is not None or not sample_x.is_floating_point():
        raise ValueError(
            f"model {model}: got {sample_x.dtype} inputs {_shape(sample_x)}, expected floating-point "
            f"numbers; for tokens use {SEQUENCE_MODELS}"
        )
    if per_position:
        raise ValueError(
            f"model {model}: got a target for each position of the inputs {_shape(sample_x)}, expected one "
            f"for each row; for targets by position use {SEQUENCE_MODELS}"
        )


def _check_whole(model: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model {model}: got {name} = {value!r}, expected a whole number of 1 or more")


def _check_known(model: str, argument: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := tuple(known)):
        raise ValueError(f"model {model}: got {argument} = {value!r}, expected one of {', '.join(names)}")


def _dropout(probability: float) -> list[nn.Module]:
    return [nn.Dropout(probability)] if probability else []


def _shape(x: Tensor) -> str:
    return f"({', '.join(['N', *map(str, x.shape[1:])])})"
