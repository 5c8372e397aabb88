"""What a stalled trial suffers from: suspects by what was measured, settled by what mends it. Pure rules.

A symptom that is there before the first step comes from the initial weights, the data or the model; one that training
brought comes from how large its steps were, and a smaller one is the proof. Dead units are an exception: they are named
however they came about, since a dead layer stays dead whatever the rate is later. Where the same run can be mended in
two ways that point to different causes, the smaller change decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipefuzz.diagnose.explosions import ADAPTIVE
from recipefuzz.diagnose.signals import Signals
from recipefuzz.diagnosis import Fix, Root
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.verdict import SOME, SWOLLEN, VANISHED, Label

DEAD = 0.9  # share of a layer's units, from which next to nothing passes it
SATURATED = 0.5  # share of a layer's outputs: most of them, most of the time
CONSTANT = 0.01  # of the targets' spread, or in logits: a hundredth moves no prediction
OVERSHOT = 0.75  # share of the steps that raised the loss of their own batch: by chance it is rare, so most of them
RATES = ("lr_too_low", "lr_too_high")
BY_MEND = (*RATES, "vanishing_gradients", "constant_output")  # that a change which mends points to by itself
SHRUNK = 0.3  # size of the weights, relative to their first, that only their decay explains


@dataclass(frozen=True)
class Findings:
    """What was measured of a stalled trial.

    Attributes:
        start, end: signals before the first step and after the last.
        overshot: share of the last steps that raised the loss of the very batch that they were made on.
        swell: size of the parameters at the end, relative to their first.
        overflow: first step with a gradient whose square left float32's range, counted from 1; 0 if there was none.
        told: the cause that the verdict's own rule gave.
    """

    start: Signals
    end: Signals
    overshot: float
    swell: float
    overflow: int
    told: str


def suspects(found: Findings, recipe: Recipe) -> tuple[str, ...]:
    """Causes that the evidence allows, the strongest first."""
    decayed = recipe.weight_decay and found.swell < SHRUNK
    evidence = (
        ("dead_units", _dead(found.start) or _dead(found.end)),
        ("saturated_units", _saturated(found.start)),
        ("constant_output", decayed and found.end.spread < CONSTANT),
        ("lr_too_high", _too_high(found)),
        ("vanishing_gradients", _vanishes(found.start) and not _blocked(found.start)),
        ("lr_too_low", found.told == "lr_too_low"),
        ("lr_too_high", _saturated(found.end) or _vanishes(found.end)),
        ("saturated_units", _saturated(found.end)),
        ("vanishing_gradients", _vanishes(found.end) and not _blocked(found.end)),
        ("constant_output", found.end.spread < CONSTANT),
    )
    return tuple(dict.fromkeys(cause for cause, holds in evidence if holds))


def _dead(signals: Signals) -> bool:
    return signals.dead is not None and signals.dead.dead >= DEAD


def _saturated(signals: Signals) -> bool:
    return signals.saturated is not None and signals.saturated.saturated > SATURATED


def _blocked(signals: Signals) -> bool:
    """Whether a single layer stops the gradient: what vanishes behind it does so for that reason."""
    return _dead(signals) or _saturated(signals)


def _vanishes(signals: Signals) -> bool:
    """Whether some layer, or the far end of a sequence, gets less than a thousandth of the gradient."""
    return signals.weakest[1] < VANISHED or signals.through_time < VANISHED


SIGNS = {"dead_units": _dead, "saturated_units": _saturated, "vanishing_gradients": _vanishes}  # seen in single layers


def _too_high(found: Findings) -> bool:
    """Its own steps raise the loss, unless the gradient itself is wrong; or the weights were thrown far."""
    uphill = found.start.descent <= 0
    return found.told == "lr_too_high" or found.swell >= SWOLLEN or (found.overshot >= OVERSHOT and not uphill)


def helps(cause: str, values: Mapping[str, Scalar], recipe: Recipe) -> bool:
    """Whether a change is the treatment of a cause, so that its success confirms it."""
    moved = {name: _direction(name, value, recipe) for name, value in values.items()}
    lr, scale = moved.get("lr", ""), moved.get("init_scale", "")
    alone = len(moved) == 1
    return {
        "lr_too_low": (lr == "up" and alone)
        or "off" in (moved.get("clip_norm"), moved.get("clip_value"))
        or "optimizer" in moved,
        "lr_too_high": lr == "down" or moved.get("clip_norm") == "on" or "warmup_steps" in moved,
        "vanishing_gradients": scale == "up" or "norm" in moved or ("optimizer" in moved and not scale),
        "saturated_units": scale == "down" or bool({"norm", "input_norm", "target_norm"} & moved.keys()),
        "dead_units": bool(scale) or lr == "down" or bool({"clip_norm", "input_norm", "norm"} & moved.keys()),
        "constant_output": "weight_decay" in moved or "norm" in moved or "input_norm" in moved or scale == "up",
    }.get(cause, False)


def turns(cause: str, values: Mapping[str, Scalar]) -> bool:
    """Whether a change turns the very knob that a cause names, and no other."""
    return cause in RATES and values.keys() == {"lr"}


def _direction(name: str, value: Scalar, recipe: Recipe) -> str:
    if name in ("clip_norm", "clip_value"):
        return "off" if value is None else "on"
    old = recipe.values().get(name)
    if isinstance(value, float) and isinstance(old, (int, float)):
        return "up" if value > old else "down"
    return "changed"


def settled(suspected: Sequence[str], fixes: Sequence[Fix], recipe: Recipe) -> str:
    """The cause, in this order: a suspect that a change confirmed, a symptom that is plain to see, what the mends say.

    Too low a rate wins over vanishing gradients by a smaller change, suspected or not; if no higher one converges, it
    is refuted.
    """
    working = [fix for fix in fixes if fix.verdict == Label.CONVERGING]
    ranks = {
        cause: next((i for i, fix in enumerate(working) if helps(cause, fix.values, recipe)), math.inf)
        for cause in (*suspected, *BY_MEND)
    }
    confirmed = [cause for cause in suspected if ranks[cause] < math.inf]
    if confirmed[:1] == ["vanishing_gradients"]:
        return min(("vanishing_gradients", "lr_too_low"), key=lambda cause: ranks[cause])
    seen = [cause for cause in suspected if cause not in RATES]
    mending = sorted((cause for cause in BY_MEND if ranks[cause] < math.inf), key=lambda cause: ranks[cause])
    refuted = "lr_too_low" if fixes else ""
    left = (cause for cause in suspected if cause != refuted)
    return next(iter((*confirmed, *seen, *mending, *left)), "unknown")


def root_of_stall(*, learnt: bool, mended: bool, related: float, generalizes: bool, broken: bool) -> Root:
    """Where the fault lies.

    Args:
        learnt: whether the model can learn ten rows by heart.
        mended: whether some change of the recipe converges.
        related: how well a row's nearest others predict its target, as a skill; NaN if that could not be asked.
        generalizes: whether what converges is better than a constant on held-out rows, too.
        broken: whether signals hardly passed the model from the start, so that it is no witness about the data.
    """
    if not learnt:
        return Root.CODE
    if mended or broken:
        return Root.RECIPE if generalizes else Root.DATA
    return Root.DATA if related < SOME else Root.RECIPE


def cause_in_code(start: Signals) -> str:
    """Of a model that can't learn ten rows: the symptom of its architecture, unless its graph is broken."""
    if _dead(start):
        return "dead_units"
    if _vanishes(start) and start.weakest[1] > 0:
        return "vanishing_gradients"
    return "cannot_overfit"


def overflows(largest: float, optimizer: str) -> bool:
    """Whether a gradient's square leaves float32's range: an adaptive optimizer then divides by inf, and stands still.

    Args:
        largest: gradient norm of the run; inf where its own square did.
    """
    return optimizer in ADAPTIVE and not largest < 1.8e19  # the root of float32's greatest number
