"""Dropout whose masks are a function of the trial's seed, the layer and the call, and not of a generator's state.

A generator gives a lane other numbers than it gives the same trial alone, and others on a GPU than on a CPU. A hash of
the element's position gives the same everywhere, lane by lane, without a state but for a count of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORD = 0xFFFFFFFF  # numbers of 32 bits, in int64 so that no product overflows unseen
GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio, odd: neighbouring positions are far apart after it


class SeededDropout(nn.Module):
    """`nn.Dropout`, with masks of its own seed.

    Args:
        key: 32 bits, of the trial and the layer.
    """

    key: Tensor
    calls: Tensor

    def __init__(self, p: float, key: int) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("key", torch.tensor(key, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        self.calls += 1
        start = _mixed(self.key + self.calls * GOLDEN)
        position = torch.arange(x.numel(), device=x.device).view(x.shape)
        kept = _mixed(position * GOLDEN + start) >= int(self.p * 2**32)
        return x * kept / (1 - self.p) if self.p < 1 else x * 0

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _mixed(word: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby, 2011): each bit of the word turns each bit of the result half the time."""
    word = word & WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & WORD
    return word ^ (word >> 16)


def seed_dropout(model: nn.Module, seed: int) -> None:
    """Give each `nn.Dropout` of a model masks of a trial's seed, in place.

    Subclasses, channel-wise kinds and `functional.dropout` draw from torch's generator as before.
    """
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places stays one layer
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Dropout and path:
            if layer not in made:
                key = int(_mixed(torch.tensor((seed * GOLDEN + len(made)) & WORD)))
                made[layer] = SeededDropout(layer.p, key).train(layer.training)
            model.set_submodule(path, made[layer])
