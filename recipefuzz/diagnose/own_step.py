"""One step of the user's own loop once more, with every operation watched, and what it says.

What the model was given and drew at each call is what it was given and drew then, whatever stands around the calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.causes import OVERFLOW, cause_of
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.moment import Moment
from recipefuzz.diagnose.nonfinite import diagnosis_of
from recipefuzz.diagnose.replay import Failure, watched_step
from recipefuzz.diagnose.rerun import Rerun, calls, meeting, rerun_of, user_place
from recipefuzz.diagnose.roots import root_of
from recipefuzz.diagnose.tensors import is_finite, storage
from recipefuzz.diagnose.wording import ADVICE_FOR_RECIPE
from recipefuzz.diagnosis import Diagnosis, Root
from recipefuzz.errors import NonFiniteError, Place
from recipefuzz.verdict import SWOLLEN, Label

MOST_PLACES = 4  # of the way to the symptom that are shown


class Reached(BaseException):
    """The replay has come to where the step was found bad; no `except Exception` of the user's catches it."""


class Stage:
    """A step while it is replayed: gives the model its inputs, and ends it after its last backward pass.

    Args:
        own_inputs: the model takes what the statements compute for it instead.
    """

    def __init__(self, moment: Moment, *, own_inputs: bool = False) -> None:
        self._moment = moment
        self._forwards = iter(() if own_inputs else moment.forwards)
        self._backwards = moment.backwards
        self.loss: Tensor | None = None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the model's next call; its random state is set, too.

        Args:
            args, kwargs: what it is given now; this is taken for what the step had computed from the parameters.
        """
        forward = next(self._forwards, None)
        if forward is None:
            return args, kwargs
        self._moment.set_random(forward.random)
        if len(args) != len(forward.args) or kwargs.keys() != forward.kwargs.keys():
            return forward.args, forward.kwargs
        pairs = zip(forward.args, args, strict=True)
        return tuple(_fixed(*pair) for pair in pairs), {k: _fixed(v, kwargs[k]) for k, v in forward.kwargs.items()}

    def backward(self, loss: Tensor | None) -> None:
        """A backward pass is over.

        Raises:
            Reached: it was the last.
        """
        self.loss = None if loss is None else loss.detach()
        self._backwards -= 1
        if not self._backwards:
            raise Reached


@dataclass(frozen=True)
class Step:
    """A step that was found bad.

    Attributes:
        frame: the function that has called `backward()`.
        number: of the step, counted from 1.
        optimizer: in lower case, such as "adamw".
        rate: its learning rate.
        update: file and line of the optimizer's last step; ("", 0) before the first.
        staged: makes the watch's hooks follow a stage.
    """

    model: nn.Module
    moment: Moment
    frame: FrameType | None
    number: int
    optimizer: str
    rate: float
    update: tuple[str, int]
    staged: Callable[[Stage], AbstractContextManager[None]]

    def rerun(self, *, whole: bool = False) -> Rerun | None:
        """From the statement that calls the model, or from the start of the loop's body."""
        met = meeting(self.frame, self.moment.forwards[0].calls)
        return rerun_of(*met, whole=whole) if met else None

    @cached_property
    def again(self) -> Rerun | None:
        return self.rerun()


NO_FORWARD = (
    "the model was not seen to be called before it, so the step could not be replayed (of a compiled model, watch what "
    "torch.compile returned)"
)
NO_SOURCE = "the step's own statements could not be run again, so only the model's forward pass was replayed"
NOT_AGAIN = "the step was replayed, and was finite then"
DREW_ANEW = "no step before was seen to draw random numbers, so this one's weren't kept, and the replay drew others"


def diagnose(step: Step, health: Health, symptom: str) -> Diagnosis:
    """Where the first value that is not finite came from, and why.

    Args:
        symptom: what was found, in words, for a step that does not fail when it is replayed.
    """
    with _eager():
        failure, remark = _replay(step)
    if step.moment.drew_anew:
        remark = f"{remark}; {DREW_ANEW}" if remark else DREW_ANEW
    if failure is None:
        return _unknown(step, symptom, remark)
    if remark.startswith((NOT_AGAIN, NO_SOURCE)):  # of the model's outputs
        failure = replace(failure, symptom=symptom)
    found = _explained(step, failure, health)
    return replace(found, explanation=f"{found.explanation}; {remark}") if remark else found


def _eager() -> AbstractContextManager[Any]:
    """Compiled models run operation by operation; not imported where nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _replay(step: Step) -> tuple[Failure | None, str]:
    """The failure, and what is to be said of the replay."""
    if not step.moment.forwards:
        return None, NO_FORWARD
    failure = _watched(step, step.again) if step.again else None
    if failure is not None:
        return _before_the_model(step, failure) or failure, ""
    return _watched(step, None), NOT_AGAIN if step.again else NO_SOURCE


def _before_the_model(step: Step, failure: Failure) -> Failure | None:
    """Where the model's input went bad in the loop's own statements before the call, if it did there."""
    again = step.rerun(whole=True) if failure.origin.outside == "x" else None
    earlier = _watched(step, again, own_inputs=True) if again else None
    return earlier if earlier and earlier.origin.event else None


def _watched(step: Step, again: Rerun | None, *, own_inputs: bool = False) -> Failure | None:
    """The step replayed: its statements, or the model's forward passes alone; None where it is finite, or fails."""
    stage = Stage(step.moment, own_inputs=own_inputs)

    def run() -> Tensor:
        if again is None:
            return _outputs(step)
        try:
            again.run()
        except Reached:
            assert stage.loss is not None
            return stage.loss
        raise RuntimeError("the statements ended before the backward pass")

    inputs = [t.detach() for f in step.moment.forwards for t in _tensors_in([f.args, f.kwargs]) if not t.grad_fn]
    given = [t for t in inputs if not _is_mask(t)]
    known = {storage(t) for t in given}
    others = [t for _, t in _data(again) if storage(t) not in known and not _is_mask(t)]
    try:
        with step.moment.back(), step.staged(stage):
            return watched_step(step.model, run, given, others, step.number)
    except Exception:  # whatever the user's statements raise the second time
        return None


def _data(again: Rerun | None) -> list[tuple[str, Tensor]]:
    """Tensors that the statements read and that don't depend on the parameters: targets, masks, weights."""
    variables = again.reads.items() if again else ()
    return [(name, t) for name, value in variables for t in _tensors_in(value) if not t.requires_grad]


def _fixed(earlier: Any, now: Any) -> Any:
    """The earlier input, but for one that hangs on a graph, which its backward pass has freed."""
    return now if any(t.grad_fn for t in _tensors_in(earlier)) else earlier


def _is_mask(tensor: Tensor) -> bool:
    """Whether its infinities are meant: the rest of it is zeros."""
    return not is_finite(tensor) and bool(((tensor == 0) | torch.isinf(tensor)).all())


def _outputs(step: Step) -> Tensor:
    """What the model makes of its inputs: the first tensor that is not finite, if one is."""
    made = [t for f in step.moment.forwards for t in _tensors_in(step.model(*f.args, **f.kwargs))]
    return next((t for t in made if not is_finite(t)), made[0])


def _tensors_in(value: Any, depth: int = 3) -> list[Tensor]:
    """The tensors of lists, dictionaries and plain objects, one in the other at most `depth` times."""
    if isinstance(value, Tensor):
        return [value] if value.layout is torch.strided else []
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, ModuleType, type)):
        inside = vars(value).values()
    return [t for inner in list(inside) for t in _tensors_in(inner, depth - 1)] if depth else []


def _explained(step: Step, failure: Failure, health: Health) -> Diagnosis:
    origin = failure.origin
    updated = origin.outside.startswith("parameter") and step.number > 1
    cause = cause_of(origin)
    if cause == OVERFLOW:
        phase = origin.event.spot.phase if origin.event else "optimizer"
        sudden = frozenset({"clip_norm"} if health.swell < SWOLLEN else ())  # what clipping would have held
        cause = explosion(phase, health, step.optimizer, 1.0, recurrent=failure.recurrent, mended_by=sudden)
        if updated and health.sound and any(_is_half(p) for p in step.moment.parameters):
            cause = "half_precision_overflow"
    root = root_of(cause, health, mended=None, remedied=not health.sound, in_half=torch.is_autocast_enabled())
    named = replace(origin, outside=_words(step, failure))
    found = diagnosis_of(replace(failure, origin=named), health, cause, root)
    found = replace(found, advice=found.advice or f"{ADVICE_FOR_RECIPE} (it is {step.rate:.3g} now, {step.optimizer})")
    if not updated:
        return found
    file, line = step.update
    return replace(found, phase="optimizer", file=file, line=line)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _words(step: Step, failure: Failure) -> str:
    """What came in not finite, as the user calls it."""
    outside = failure.origin.outside
    if outside == "x":
        return "the model's input"
    if outside == "y":
        return next((f"`{name}`" for name, t in _data(step.again) if not is_finite(t)), "the batch")
    if outside.startswith("parameter") and step.number > 1:
        return f"{outside}, which the update of step {step.number - 1} left so"
    return outside


def _unknown(step: Step, symptom: str, remark: str) -> Diagnosis:
    file, line = user_place(calls(step.frame))
    return Diagnosis(
        Label.NAN,
        Root.CODE if remark == NOT_AGAIN else "",
        "unknown",
        file=file,
        line=line,
        step=step.number,
        explanation=f"step {step.number}: {symptom} is not finite; {remark}",
        evidence={"symptom": symptom},
    )


def message(found: Diagnosis) -> NonFiniteError:
    """A diagnosis as an error, in ten lines at most."""
    route = (
        found.chain[1:] if len(found.chain) < MOST_PLACES + 2 else (*found.chain[1:MOST_PLACES], "...", found.chain[-1])
    )
    lines = [
        found.source,
        found.explanation.removeprefix(f"step {found.step}: "),
        f"from there: {', '.join(route)}" if route else "",
    ]
    symptom = found.evidence["symptom"]
    root = f" ({found.root})" if found.root else ""
    return NonFiniteError(
        f"step {found.step}: {symptom} is not finite: {found.cause}{root}",
        place=Place(found.file, found.line),
        fix=found.advice,
        detail="\n".join(line for line in lines if line),
    )
