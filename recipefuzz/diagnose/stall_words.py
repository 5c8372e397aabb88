"""A stalled trial in words: the numbers that tell its cause, and where the code is at fault what to look at."""

from __future__ import annotations

from collections.abc import Sequence

from recipefuzz.diagnose.overfit import ROWS, Overfit
from recipefuzz.diagnose.signals import Signals
from recipefuzz.diagnose.symptoms import SIGNS, Findings
from recipefuzz.diagnosis import Fix, Root
from recipefuzz.recipe import Recipe
from recipefuzz.verdict import VANISHED, Label, times

CODE = (
    "train on ten rows until they are known by heart, and look at: a graph cut by detach(), .data, .item() or "
    "no_grad(); rows and targets in different orders; a loss or softmax along the wrong dimension, or shapes that "
    "broadcast; an average over the rows of a batch; an output that is clamped or rounded; a backward pass of your own"
)
DEAF = "these weights get no gradient: look for detach(), .data, no_grad(), argmax or rounding after them"
UPHILL = "the backward pass disagrees with the forward pass: check every autograd.Function and hook with gradcheck"
INPUTS = "the inputs do not tell the rows apart: look at how they are loaded and scaled"
TARGETS = "every row has the same target: look at how the targets are loaded"
ARCHITECTURE = (
    "the model itself does not pass the gradient on: add normalization or skip connections, or make it shallower"
)
UNRELATED = "check that inputs and targets of a row belong together"


def symptom(cause: str, found: Findings, recipe: Recipe) -> str:
    """One clause with the numbers behind a cause."""
    if cause.startswith("exploding"):
        return "the gradient's square left float32's range: the optimizer divides by infinity and stands still"
    if cause == "lr_too_low":
        return f"lr {recipe.lr:.3g} is too small for the gradients that it gets"
    if cause == "lr_too_high":
        text = f"lr {recipe.lr:.3g} is too large: the weights are {times(found.swell)} their first size"
        rose = f", and {found.overshot:.0%} of the last steps raised the loss of their own batch"
        return text + rose if found.overshot else text
    if cause == "constant_output":
        return f"the output hardly depends on the row: its spread is {found.end.spread:.2g} at the end"
    present = SIGNS.get(cause)
    if present is None:
        return _gradient_words(found.start)
    early = present(found.start)
    return f"{_layer_words(cause, found.start if early else found.end)} {'from the start' if early else 'at the end'}"


def _gradient_words(start: Signals) -> str:
    if start.descent <= 0:
        return (
            f"a small step against the gradient changes the loss by {start.descent:.2f} of what the gradient promises"
        )
    if start.unreached:
        return f"{len(start.unreached)} of {len(start.weights)} weights get no gradient at all"
    if start.weights and all(w.gradient == 0 for w in start.weights):
        return "every weight's gradient is exactly 0 from the start"
    if start.spread == 0:
        return "the output is the same for every row from the start"
    return "no single fault was seen in activations and gradients"


def _layer_words(cause: str, signals: Signals) -> str:
    dead, saturated = signals.dead, signals.saturated
    if cause == "dead_units" and dead:
        return f"{dead.dead:.0%} of the {dead.units} units behind {dead.layer} give 0 for every row"
    if cause == "saturated_units" and saturated:
        return f"{saturated.saturated:.0%} of the {saturated.op} outputs behind {saturated.layer} are saturated"
    if signals.through_time < VANISHED:
        return f"the far end of a sequence gets {signals.through_time:.2g} of the gradient at the near end"
    module, share = signals.weakest
    return f"{module} gets {share:.2g} of the gradient at the layer that gets the most"


def layer(cause: str, found: Findings) -> str:
    """The module or weight that a cause is seen at; empty where it is the whole model's."""
    present = SIGNS.get(cause)
    if present is None:
        return ""
    signals = found.start if present(found.start) else found.end
    if cause == "vanishing_gradients":
        return signals.weakest[0] if signals.weakest[1] < VANISHED else ""
    seen = signals.dead if cause == "dead_units" else signals.saturated
    return seen.layer if seen else ""


def interventions(fixes: Sequence[Fix], learnt: Overfit | None) -> str:
    """What was run, and what came of it."""
    working = sum(f.verdict == Label.CONVERGING for f in fixes)
    text = f"{working} of {len(fixes)} changed recipes converge"
    if learnt is None:
        return text
    done = "were learned by heart" if learnt.works else "could not be learned by heart"
    return f"{text}; {ROWS} rows {done}: best skill {learnt.skill:.2f} in {learnt.runs} runs of Adam"


def advice(cause: str, root: Root, found: Findings) -> str:
    """What to look at in code or data; empty for a recipe's failure."""
    if root is Root.DATA:
        return UNRELATED
    if root is Root.RECIPE:
        return ""
    if cause not in ("cannot_overfit", "unknown"):
        return ARCHITECTURE
    hints = [CODE]
    if found.start.unreached:
        hints.insert(0, f"{', '.join(found.start.unreached[:3])}: {DEAF}")
    if found.start.descent <= 0:
        hints.insert(0, UPHILL)
    return "; ".join(hints)
