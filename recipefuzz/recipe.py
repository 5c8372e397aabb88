"""A recipe: the frozen set of values that one training run is made with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

Scalar = bool | int | float | str | None

NORMS = ("none", "batch", "layer", "group", "rms")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "rmsprop")
PRECISIONS = ("fp32", "bf16", "fp16")
SCALINGS = ("none", "standardize", "minmax")


@dataclass(frozen=True)
class AxisRule:
    """What values an axis may take.

    Attributes:
        words: the allowed words; empty for a numeric axis.
        low: the least number; `open_low` excludes it.
        integer: whole numbers only.
        nullable: null is a value (it switches the mechanism off).
        meaning: one line for the error messages and the README.
    """

    meaning: str
    words: tuple[str, ...] = ()
    low: float = 0.0
    open_low: bool = False
    integer: bool = False
    nullable: bool = False

    @property
    def expected(self) -> str:
        """The accepted values, in words."""
        if self.words:
            text = "one of " + ", ".join(self.words)
        else:
            bound = f"{'>' if self.open_low else '>='} {self.low:g}"
            text = f"{'an integer' if self.integer else 'a number'} {bound}"
        return text + (", or null" if self.nullable else "")

    def accepts(self, value: Scalar) -> bool:
        if value is None:
            return self.nullable
        if self.words:
            return value in self.words
        if isinstance(value, (bool, str)) or not is_finite(value):
            return False
        if self.integer and value != int(value):
            return False
        return value > self.low if self.open_low else value >= self.low


def is_finite(value: float) -> bool:
    """Whether a number has a float's range: integers can be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


AXES: dict[str, AxisRule] = {
    "lr": AxisRule("learning rate", open_low=True),
    "init_scale": AxisRule("factor on every parameter with two or more dimensions", open_low=True),
    "norm": AxisRule("normalization layers; null leaves the model as it is", NORMS, nullable=True),
    "clip_norm": AxisRule("global-norm clip of the gradient", open_low=True, nullable=True),
    "clip_value": AxisRule("element-wise clip of the gradient", open_low=True, nullable=True),
    "optimizer": AxisRule("update rule, as in torch.optim", OPTIMIZERS),
    "weight_decay": AxisRule("weight decay; null is the optimizer's default", nullable=True),
    "warmup_steps": AxisRule("steps over which lr rises linearly from lr / warmup_steps", integer=True),
    "batch_size": AxisRule("rows drawn with replacement per step", low=1, integer=True),
    "precision": AxisRule("number format of forward and backward", PRECISIONS),
    "input_norm": AxisRule("scaling of the inputs by training-set statistics", SCALINGS),
    "target_norm": AxisRule("scaling of the targets by training-set statistics", SCALINGS),
}


@dataclass(frozen=True)
class Recipe:
    """Values for every axis. `extra` holds the axes that go to the model factory as keyword arguments.

    The meaning of each value is in the design's section 4 and the README, and in code only in
    `engines/prepare.py`.
    """

    lr: float = 0.01
    init_scale: float = 1.0
    norm: str | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    optimizer: str = "sgd"
    weight_decay: float | None = None
    warmup_steps: int = 0
    batch_size: int = 64
    precision: str = "fp32"
    input_norm: str = "none"
    target_norm: str = "none"
    extra: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Scalar]) -> Recipe:
        """Build from axis names and values.

        Raises:
            ValueError: a known axis has a value that its rule does not accept.
        """
        known = {name: _checked(name, value) for name, value in values.items() if name in AXES}
        extra = tuple(sorted((k, v) for k, v in values.items() if k not in AXES))
        return cls(**known, extra=extra)  # type: ignore[arg-type]

    def values(self) -> dict[str, Scalar]:
        """Every axis with its value, the extra ones last."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return own | dict(self.extra)

    def but(self, /, **changes: Scalar) -> Recipe:
        return Recipe.of(self.values() | changes)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that are equal for equal recipes, on every machine."""
        text = json.dumps({name: _plain(value) for name, value in self.values().items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def shown(value: Scalar) -> str:
    """A recipe's value for people: three digits, null and truth values as in the config."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Scalar) -> Scalar:
    """Equal values in one spelling: 1, 1.0 and true are equal to Python, and so are recipes with them."""
    return int(value) if isinstance(value, (bool, float)) and is_finite(value) and value == int(value) else value


def _checked(name: str, value: Scalar) -> Scalar:
    rule = AXES[name]
    if not rule.accepts(value):
        raise ValueError(f"{name} = {value!r}: expected {rule.expected}")
    if value is None or rule.words:
        return value
    return int(value) if rule.integer else float(value)
