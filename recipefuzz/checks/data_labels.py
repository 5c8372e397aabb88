"""Labels: their range, how often each occurs, and whether both sets have them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recipefuzz.checks.data_parts import Part, Problem
from recipefuzz.checks.untrained import few
from recipefuzz.finding import Level
from recipefuzz.targets.losses import IGNORED

RARE = 10.0  # expected rows: a class that is missing by chance alone where so many are expected has odds of e**-10
USUAL = 0.9  # share of one class, above which saying it always looks like learning


def label_problems(loss_kind: str, train: Part, test: Part) -> Iterator[Problem]:
    """Of targets that are labels: integers, or zeros and ones for bce."""
    yield from _copied(train)
    labels, held_out = _labels(train.y, loss_kind), _labels(test.y, loss_kind)
    if labels is None or held_out is None or not labels.numel():
        return
    size = int(max(labels.max(), held_out.max() if held_out.numel() else 0)) + 1
    counts, others = (torch.bincount(part, minlength=size) for part in (labels, held_out))
    yield from _missing(counts, others, "training set", Level.FAIL, "shuffle before splitting in load()")
    yield from _missing(others, counts, "held-out set", Level.WARN, "shuffle before splitting in load()")
    first = int((counts + others).nonzero()[0])
    if first > 0 and train.y is not None and train.y.dim() == 1:
        seen = f"labels begin at {first}: no row has a label below"
        todo = f"y = y - {first} in load(): classes are counted from 0"
        yield Problem(Level.WARN, seen, todo, {"first_label": first})
    yield from _balance(counts, per_row=train.y is not None and train.y.dim() == 1)


def _labels(y: Tensor | None, loss_kind: str) -> Tensor | None:
    """All labels in a row; None where targets are numbers."""
    if y is None:
        return None
    if y.is_floating_point():
        binary = loss_kind == "bce" and y.numel() == len(y) and bool(((y == 0) | (y == 1)).all())
        return y.flatten().long() if binary else None
    labels = y.flatten().long().cpu()
    labels = labels[labels != IGNORED]
    if not labels.numel() or int(labels.min()) < 0 or int(labels.max()) > 10 * labels.numel():  # no classes: numbers
        return None
    return labels


def _copied(train: Part) -> Iterator[Problem]:
    """Tokens that are their own targets: of numbers that is an autoencoder, of tokens a shift that was left out."""
    x, y = train.x, train.y
    tokens = x is not None and y is not None and y.dim() > 1 and not y.is_floating_point()
    if tokens and x is not None and y is not None and x.shape == y.shape and bool((x == y).all()):
        seen = "each position's target is its own input: there is nothing to predict"
        yield Problem(Level.WARN, seen, "to predict the next token: x = tokens[:, :-1], y = tokens[:, 1:] in load()")


def _missing(counts: Tensor, others: Tensor, where: str, level: Level, todo: str) -> Iterator[Problem]:
    """Classes that one set (whose counts come first) lacks, though it should have many rows of them."""
    expected = others.double() / max(1, int(others.sum())) * int(counts.sum())
    missing = ((counts == 0) & (expected >= RARE)).nonzero()[:, 0].tolist()
    if missing:
        shown = few([f"class {c} (about {float(expected[c]):.0f} rows expected)" for c in missing])
        yield Problem(level, f"the {where} lacks {shown}", todo, {f"missing_in_{where.replace(' ', '_')}": missing})


def _balance(counts: Tensor, *, per_row: bool) -> Iterator[Problem]:
    share = counts.double() / counts.sum()
    seen_classes = int((counts > 0).sum())
    most, most_class = float(share.max()), int(share.argmax())
    least = float(share[counts > 0].min())
    evidence = {"classes": seen_classes, "largest_share": most}
    if per_row and most >= USUAL and seen_classes > 1:
        seen = f"class {most_class} makes up {most:.1%} of the training rows: always saying it is right as often"
        yield Problem(Level.WARN, seen, "weigh the classes in the loss, or look at skill and not at accuracy", evidence)
    else:
        yield Problem(Level.PASS, f"{seen_classes} classes, {least:.2g} to {most:.2g} of the labels each", "", evidence)
