"""The `norm` axis: one constructor for its kinds, and their exchange in a model that was built without it.

Every kind starts as a plain normalization (gains 1, biases 0) and has the same epsilon, so kinds differ in
what they normalize over and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from recipefuzz.recipe import NORMS

EPS = 1e-5  # PyTorch's own for batch, layer and group
MAX_GROUPS = 8


def make_norm(kind: str, features: int, *, channels_first: bool) -> nn.Module:
    """Make a normalization of inputs (N, C) or (N, C, *spatial) if channels come first, else of (..., F).

    | kind  | statistics over, channels first       | channels last                       |
    | ----- | ------------------------------------- | ----------------------------------- |
    | batch | rows and positions, per channel       | rows and positions, per feature     |
    | layer | channels and positions, per row       | features, per row and position      |
    | group | a group's channels and positions      | a group's features, at one position |
    | rms   | channels, per row and position        | features, per row and position      |

    Channels last, only `batch` looks at other positions: a causal model stays causal with the others.
    Draws no random numbers, so models that differ only in `norm` start from the same weights.
    """
    kinds = _FIRST if channels_first else _LAST
    if kind not in kinds:
        raise ValueError(f"norm = {kind!r}: expected one of {', '.join(NORMS)}")
    return kinds[kind](features)


def replace_norms(model: nn.Module, kind: str) -> int:
    """Replace each normalization layer inside `model`, in place; return how many there were.

    The new layers have the features, dtype, device and mode of the old, but not their gains and biases.
    BatchNorm, InstanceNorm and GroupNorm are channels first; LayerNorm and RMSNorm are channels last, save
    for subclasses called ...2d (torchvision's and timm's `LayerNorm2d`).

    Left alone: LayerNorm and RMSNorm over several dimensions, LocalResponseNorm, classes that derive from
    none of torch's, and `model` itself, which can't be replaced in place (0 is returned). A layer that does
    more than normalize, or whose features aren't known yet, is a ValueError.
    """
    if kind not in NORMS:
        raise ValueError(f"norm = {kind!r}: expected one of {', '.join(NORMS)}")
    fallback = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places is one layer afterwards, too
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        layout = _layout(layer)
        if not path or layout is None:
            continue
        if layer not in made:
            made[layer] = _successor(path, layer, layout, kind, fallback)
        model.set_submodule(path, made[layer])
    if made:
        _leave_fast_path(model)
    return len(made)


def _group_count(features: int) -> int:
    """Count the groups: as many as MAX_GROUPS allows, of two features or more (one alone normalizes to 0)."""
    return max((g for g in range(1, MAX_GROUPS + 1) if features % g == 0 and features // g >= 2), default=1)


class _BatchNormFirst(_BatchNorm):
    """`nn.BatchNorm1d`, 2d and 3d in one: (N, C) or (N, C, *spatial)."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (N, C) or (N, C, ...), got {tuple(x.shape)}")


class _BatchNormLast(_BatchNorm):
    """Inputs (..., F): statistics per feature over all leading dimensions."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # forward has made it (rows, F)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, self.num_features)).reshape(x.shape)


class _GroupNormLast(nn.Module):
    """Inputs (..., F). `nn.GroupNorm` takes channels first, and averages over all positions of a row."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_channels, self.num_groups = features, _group_count(features)
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.num_channels)
        return functional.group_norm(rows, self.num_groups, self.weight, self.bias, EPS).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}"


class _RMSNormFirst(nn.Module):
    """Inputs (N, C) or (N, C, *spatial): over the channels of each position."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_channels = features
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernel, not x * rsqrt(mean(x^2)): it sums in float32, where fp16 squares overflow at 256
        last = functional.rms_norm(x.movedim(1, -1), (self.num_channels,), self.weight, EPS)
        return last.movedim(-1, 1).contiguous()  # else a convolution's gradient has no batching rule (vmap)

    def extra_repr(self) -> str:
        return f"{self.num_channels}"


Constructor = Callable[[int], nn.Module]

_FIRST: dict[str, Constructor] = {
    "none": lambda _: nn.Identity(),
    "batch": _BatchNormFirst,
    "layer": lambda features: nn.GroupNorm(1, features),
    "group": lambda features: nn.GroupNorm(_group_count(features), features),
    "rms": _RMSNormFirst,
}
_LAST: dict[str, Constructor] = {
    "none": lambda _: nn.Identity(),
    "batch": _BatchNormLast,
    "layer": nn.LayerNorm,
    "group": _GroupNormLast,
    "rms": lambda features: nn.RMSNorm(features, EPS),
}


def _layout(layer: nn.Module) -> tuple[int, bool] | None:
    """(features, channels first) of a normalization layer; None for any other module."""
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        return layer.num_features, not isinstance(layer, _BatchNormLast)
    if isinstance(layer, (nn.GroupNorm, _RMSNormFirst, _GroupNormLast)):
        return layer.num_channels, not isinstance(layer, _GroupNormLast)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1:
        return layer.normalized_shape[0], type(layer).__name__.lower().endswith("2d")
    return None


def _successor(path: str, layer: nn.Module, layout: tuple[int, bool], kind: str, fallback: Tensor) -> nn.Module:
    features, channels_first = layout
    name = type(layer).__name__
    inner = ", ".join(child for child, _ in layer.named_children())
    if inner:  # timm's BatchNormAct2d holds an activation: a replacement would lose it silently
        raise ValueError(
            f"norm = {kind!r}: {path} is a {name}, a normalization layer with layers of its own ({inner}), "
            "which a replacement would lose; expected a plain one. Add a `norm` argument to the model factory"
        )
    if features == 0:
        raise ValueError(
            f"norm = {kind!r}: {path} is a {name} that has not seen data, so its features aren't known; "
            "expected a known number. Give it in the model, or run a batch through the model first"
        )
    like = next((t for t in chain(layer.parameters(), layer.buffers()) if t.is_floating_point()), fallback)
    dtype = like.dtype if like.is_floating_point() else None
    successor = make_norm(kind, features, channels_first=channels_first)
    return successor.to(device=like.device, dtype=dtype).train(layer.training)


def _leave_fast_path(model: nn.Module) -> None:
    """Make `nn.TransformerEncoderLayer` call its norms.

    In evaluation it may call one fused kernel instead, which reads `norm1.weight` and its like and always
    computes LayerNorm; and `nn.TransformerEncoder` packs padded rows into a nested tensor for that kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "neither": the kernel knows these two; forward() has its own
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
