"""What a trained model really says about held-out rows: the look that no loss replaces."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from recipefuzz.targets.losses import class_dim
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import Rows, some_rows

ROWS = 10
PROMPT, SAMPLED = 24, 96  # characters
TEMPERATURE = 0.7  # a little sharper than the model's own probabilities: what it is sure of shows sooner


class Kind(StrEnum):
    TEXT = "text"
    CLASSES = "classes"
    NUMBERS = "numbers"
    NONE = "none"  # an output or a target that is no single tensor


@dataclass(frozen=True)
class Predictions:
    """Predicted and true values, or a text.

    Attributes:
        predicted, true: of `ROWS` held-out rows, evenly spread: classes, or numbers as the recipe scales them. Of
            targets by position the last position, of several columns the first.
        prompt, sampled: held-out characters, and how the model goes on.
    """

    kind: Kind
    predicted: tuple[float, ...] = ()
    true: tuple[float, ...] = ()
    prompt: str = ""
    sampled: str = ""


def predictions(model: nn.Module, rows: Rows, loss_kind: str, alphabet: str, device: torch.device) -> Predictions:
    """Of a trained model, in eval mode; model and random states are left as they were.

    Args:
        rows: held-out, on the device.
        alphabet: characters of the token ids, by id; empty where the rows are no text.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), seeded(0, device):
            return _text(model, rows, alphabet) if alphabet else _values(model, rows, loss_kind)
    finally:
        model.train(was_training)


def _values(model: nn.Module, rows: Rows, loss_kind: str) -> Predictions:
    x, y = rows.take(some_rows(rows, ROWS).to(rows.index_device))
    output = model(x)
    if not isinstance(output, Tensor) or not isinstance(y, Tensor) or output.dim() == 0 or y.dim() == 0:
        return Predictions(Kind.NONE)
    if not y.is_floating_point() and loss_kind != "bce" and output.dim() > 1:
        chosen = output.argmax(class_dim(output, y))
        return Predictions(Kind.CLASSES, _one_a_row(chosen, last=True), _one_a_row(y, last=True))
    numbers = output.float().sigmoid() if loss_kind == "bce" else output.float()
    return Predictions(Kind.NUMBERS, _one_a_row(numbers, last=False), _one_a_row(y.float(), last=False))


def _one_a_row(values: Tensor, *, last: bool) -> tuple[float, ...]:
    flat = values.reshape(len(values), -1)
    return tuple(flat[:, -1 if last else 0].tolist())


def _text(model: nn.Module, rows: Rows, alphabet: str) -> Predictions:
    """Go on from the first held-out characters, each next one drawn from the model's probabilities."""
    x, _ = rows.take(torch.zeros(1, dtype=torch.int64, device=rows.index_device))
    window = x.shape[1]  # a transformer knows no positions beyond it
    ids = x[:, :PROMPT]
    start = ids.shape[1]
    for _ in range(SAMPLED):
        logits = model(ids[:, -window:])[0, -1].float()
        if not bool(logits.isfinite().all()):
            break
        drawn = torch.multinomial((logits / TEMPERATURE).softmax(0).cpu(), 1).to(ids.device)
        ids = torch.cat([ids, drawn[None]], 1)
    text = "".join(alphabet[i] for i in ids[0].tolist())
    return Predictions(Kind.TEXT, prompt=text[:start], sampled=text[start:])
