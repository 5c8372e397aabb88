"""Built-in data sets: small, offline, the same on every call whatever the state of the global generators.

A loader's keyword arguments come from the config's `target.data_args`; it returns x_train, y_train, x_test,
y_test. Features are raw where their scales differ: standardizing them is the recipe's `input_norm`.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from torch import Tensor

Split = tuple[Tensor, Tensor, Tensor, Tensor]

SHUFFLE_SEED = 1234
TRAIN_SHARE = 0.8
TEXT_TRAIN_SHARE = 0.9
MIN_WINDOWS = 10  # of text: one is then held out
ALPHABET = " ,." + ascii_lowercase


def digits(*, images: bool = False) -> Split:
    """1797 handwritten digits of 8 x 8 pixels, 0 to 1; x (N, 64) or images (N, 1, 8, 8), y of 10 classes."""
    x, y = _bundled_table("digits.csv.gz") or _sklearn("load_digits")
    x = x / 16  # ink counts of 4 x 4 blocks
    return _shuffled(x.view(-1, 1, 8, 8) if images else x, y.long())


def breast_cancer() -> Split:
    """569 tumours; x (N, 30) with scales from 1e-3 to 1e3, y of 2 classes."""
    x, y = _sklearn("load_breast_cancer")
    return _shuffled(x, y.long())


def wine() -> Split:
    """178 wines; x (N, 13) with scales from 0.1 to 1e3, y of 3 classes."""
    x, y = _sklearn("load_wine")
    return _shuffled(x, y.long())


def diabetes() -> Split:
    """442 patients; x (N, 10) in medical units, y (N, 1) a disease score of 25 to 346."""
    x, y = _sklearn("load_diabetes", scaled=False)
    return _shuffled(x, y[:, None])


def text(*, length: int = 48, size: int = 160_000) -> Split:
    """Next character of Python's own manual, in windows side by side; x and y (N, length), int64.

    The text is the first `size` characters of the running Python's `pydoc_data.topics` (PSF licence), so it
    differs a little between Python versions. The last tenth is held out; one window between the parts is
    dropped, so that no character is in both.
    """
    ids = _encoded(size)
    longest = max(0, len(ids) - 1) // MIN_WINDOWS
    windows = max(0, len(ids) - 1) // length if length >= 1 else 0
    if windows < MIN_WINDOWS:
        raise ValueError(
            f"data text: length = {length} makes {windows} windows of {len(ids)} characters; expected "
            f"{MIN_WINDOWS} or more: a length of 1 to {longest}, or a larger size"
        )
    x = ids[: windows * length].view(windows, length)
    y = ids[1 : windows * length + 1].view(windows, length)
    cut = int(TEXT_TRAIN_SHARE * (windows - 1))
    return x[:cut], y[:cut], x[cut + 1 :], y[cut + 1 :]


def text_alphabet() -> str:
    """Characters of `text`: id i is the i-th."""
    return ALPHABET


def adding(*, length: int = 30, rows: int = 4096) -> Split:
    """Add the two marked numbers of a sequence: x (N, length, 2) holds numbers and marks, y (N, 1) sums.

    Hochreiter & Schmidhuber 1997, experiment 4, in the form of Le, Jaitly & Hinton 2015 (arXiv:1504.00941):
    numbers uniform in 0..1, a mark in each half. A constant predictor has a mean squared error of 1/6.
    """
    if length < 2 or rows < 2:
        raise ValueError(
            f"data adding: got length = {length}, rows = {rows}; expected 2 or more of each "
            "(two numbers are marked; a row is trained on, another held out)"
        )
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    numbers = torch.rand(rows, length, generator=generator)
    first = torch.randint(0, length // 2, (rows, 1), generator=generator)
    second = torch.randint(length // 2, length, (rows, 1), generator=generator)
    marks = torch.zeros(rows, length).scatter(1, torch.cat([first, second], 1), 1.0)
    x, y = torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)
    cut = int(TRAIN_SHARE * rows)
    return x[:cut], y[:cut], x[cut:], y[cut:]


DATA: dict[str, Callable[..., Split]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "diabetes": diabetes,
    "text": text,
    "adding": adding,
}


def _sklearn(name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Features and targets, float32, of one of scikit-learn's bundled data sets."""
    from sklearn import datasets  # a second of import time that the other data sets don't need

    x, y = getattr(datasets, name)(return_X_y=True, **options)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def _bundled_table(name: str) -> tuple[Tensor, Tensor] | None:
    """Features and targets of a table in scikit-learn's folder, if it is there.

    Without importing scikit-learn: that takes longer than reading the digits, and than a small search of them.
    """
    package = find_spec("sklearn")
    path = Path(package.origin).parent / "datasets" / "data" / name if package and package.origin else None
    if path is None or not path.exists():
        return None
    with gzip.open(path, "rt") as file:
        rows = file.read().split()
    table = torch.from_numpy(np.fromstring(",".join(rows), sep=",", dtype=np.float32)).view(len(rows), -1)
    return table[:, :-1].contiguous(), table[:, -1].contiguous()


def _shuffled(x: Tensor, y: Tensor) -> Split:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    cut = int(TRAIN_SHARE * len(x))
    train, test = order[:cut], order[cut:]
    return x[train], y[train], x[test], y[test]


def _encoded(size: int) -> Tensor:
    """Ids of the first `size` characters; runs of characters outside the alphabet become one space."""
    from pydoc_data.topics import topics  # half a megabyte of strings

    manual = " ".join(topics[name] for name in sorted(topics)).lower()
    kept = re.sub(f"[^{re.escape(ALPHABET.strip())}]+", " ", manual)[: max(0, size)]
    ids = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([ids[character] for character in kept], dtype=torch.int64)
