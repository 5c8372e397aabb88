"""What `recipefuzz.watch` adds to a step of the user's own loop, in percent of the plain step's time.

Time is the thread's own, so that other work on the machine counts less; torch runs on one thread.

Plain and watched loops take turns on one model: where its numbers lie in memory is worth a percent or two. A pair of turns
that stand next to each other gives one ratio; the table has their median, and the quartiles, which say how busy the machine was.

    python watch_overhead.py --pairs 60
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from row import Row
from torch import nn
from torch.nn import functional

import recipefuzz

MOST = 3.0  # percent


@dataclass(frozen=True)
class Loop:
    """A model in training.

    Attributes:
        turn: steps between two looks at the clock, many, as those that a watch begins with cost more.
    """

    name: str
    model: nn.Module
    batch: tuple[torch.Tensor, torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    turn: int


def loops() -> Iterator[Loop]:
    torch.manual_seed(0)
    rows, labels = torch.randn(256, 64), torch.randint(0, 10, (256,))
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    yield Loop("MLP, SGD", mlp, (rows, labels), lambda p: torch.optim.SGD(p, lr=1e-3), 100)
    yield Loop("MLP, AdamW", mlp, (rows, labels), lambda p: torch.optim.AdamW(p, lr=1e-3), 100)
    normed = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.BatchNorm1d(128)
    )
    yield Loop("MLP with batch norm, dropout", normed, (rows, labels), lambda p: torch.optim.AdamW(p, lr=1e-3), 100)
    deep = nn.Sequential(*[layer for _ in range(16) for layer in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 10))
    yield Loop("deep MLP, 34 gradients, SGD", deep, (rows, labels), lambda p: torch.optim.SGD(p, lr=1e-3), 100)
    wide = nn.Sequential(nn.Linear(64, 384), nn.ReLU(), nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 10))
    yield Loop("wider MLP, AdamW", wide, (rows, labels), lambda p: torch.optim.AdamW(p, lr=1e-3), 100)
    pixels, digits = torch.randn(32, 1, 14, 14), torch.randint(0, 10, (32,))
    yield Loop("CNN, SGD", _cnn(), (pixels, digits), lambda p: torch.optim.SGD(p, lr=1e-3), 100)
    yield Loop("LSTM, Adam", Recurrent(), (torch.randn(32, 16, 8), digits), lambda p: torch.optim.Adam(p, lr=1e-3), 100)
    yield Loop("transformer", Transformer(), _text(), lambda p: torch.optim.AdamW(p, lr=1e-3), 5)


def _cnn() -> nn.Module:
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(256, 10))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.out = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(64, 64)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.words(words))[:, -1])


def _text() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 64, (16, 64)), torch.randint(0, 64, (16,))


class Turns:
    """One loop, plain or watched, run a few steps at a time."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._optimizer = loop.optimizer(loop.model.parameters())

    def seconds(self, *, watched: bool) -> float:
        """Of one step, over a turn."""
        with recipefuzz.watch(self._loop.model, self._optimizer) if watched else nullcontext():
            started = time.thread_time()
            self._train()
            return (time.thread_time() - started) / self._loop.turn

    def _train(self) -> None:
        model, optimizer = self._loop.model, self._optimizer
        x, y = self._loop.batch
        for _ in range(self._loop.turn):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    def pair(self, *, watched_first: bool) -> tuple[float, float]:
        """Seconds of a plain and of a watched step, in two turns next to each other."""
        if watched_first:
            after = self.seconds(watched=True)
            return self.seconds(watched=False), after
        return self.seconds(watched=False), self.seconds(watched=True)


def rows(pairs: int) -> Iterator[Row]:
    for loop in loops():
        turns = Turns(loop)
        turns.pair(watched_first=False)
        seconds = [turns.pair(watched_first=i % 2 > 0) for i in range(pairs)]
        percent = [100 * (watched / plain - 1) for plain, watched in seconds]
        low, middle, high = statistics.quantiles(percent, n=4)
        before, after = (statistics.median(side) for side in zip(*seconds, strict=True))
        note = f"quartiles {low:.1f} to {high:.1f} %"
        ours, peer = f"{1e3 * after:.3f} ms", f"{1e3 * before:.3f} ms"
        yield Row(f"watched step: {loop.name}", ours, peer, middle, MOST, at_most=True, unit=" %", note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(args.pairs):
        print(f"{row.work:<42}{row.peer:>10} -> {row.ours:>10}  {row.ratio:+.1f} %  ({row.note})", flush=True)


if __name__ == "__main__":
    main()
