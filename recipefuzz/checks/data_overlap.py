"""Rows that are in both sets, inputs and targets alike: what the held-out loss says is then not about new rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from recipefuzz.checks.data_parts import Part, Problem
from recipefuzz.finding import Level

FEW = 0.01  # of the held-out rows: a held-out loss can't show that
MANY = 0.1  # which is enough to make it look better than it is
UNSEEN = 3.0  # rows: what was not seen in n rows has a rate below 3 / n, with 95 % (the rule of three)
SPREAD = 3.0  # standard deviations of a count of rare events


def shared_rows(train: Part, test: Part) -> Iterator[Problem]:
    """Compare all rows that were read. Where rows repeat within the training set, some repeat across the split, too."""
    known = Counter(_digests(train))
    shared = sum(digest in known for digest in _digests(test))
    evidence = {"shared_rows": shared}
    if not shared:
        yield Problem(Level.PASS, "no row in both sets", "", evidence)
        return
    part = f"{shared} of {len(test)} held-out rows{'' if test.whole else ' that were read'}"
    seen = f"{part} are training rows, too, inputs and targets alike"
    repeated = sum(n for n in known.values() if n > 1)
    expected = (repeated + UNSEEN) / len(train) * len(test)
    usual = shared <= expected + SPREAD * math.sqrt(expected)
    share = shared / len(test) * train.total / len(train)  # among some rows of a Dataset, few pairs are met
    if share <= FEW or (usual and share <= MANY):
        yield Problem(Level.PASS, seen, "", evidence)
    elif usual:
        seen += f"; {repeated} of {len(train)} training rows have equals in their own set"
        yield Problem(Level.WARN, seen, "drop rows that repeat before splitting in load()", evidence)
    else:
        yield Problem(Level.FAIL, seen, "a leak: look at the split in load(), each row belongs to one set", evidence)


def _digests(part: Part) -> Iterator[int]:
    """One number a row: of 64 bits, so that a million rows collide with odds of 1 to 10^7."""
    columns = [_bytes(leaf, len(part)) for leaf in tree_leaves((part.inputs, part.targets)) if isinstance(leaf, Tensor)]
    return (hash(row) for row in zip(*columns, strict=True))


def _bytes(values: Tensor, rows: int) -> Iterator[Any]:
    array = values.detach().cpu()
    array = (array + 0.0 if array.is_floating_point() else array).reshape(rows, -1)  # -0.0 is 0.0
    return (row.tobytes() for row in array.contiguous().numpy())
