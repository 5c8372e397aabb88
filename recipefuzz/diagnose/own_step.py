"""One step of the user's own loop once more, with every operation watched, and what it says.

What the model was given and drew at each call is what it was given and drew then, whatever stands around the calls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from recipefuzz.diagnose.causes import OVERFLOW, cause_of
from recipefuzz.diagnose.explosions import Health, explosion
from recipefuzz.diagnose.moment import Forward, Moment
from recipefuzz.diagnose.nonfinite import diagnosis_of
from recipefuzz.diagnose.replay import Failure, watched_step
from recipefuzz.diagnose.rerun import Rerun, around, calls, meeting, rerun_of, user_place
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
        forwards: what the model was given, in its calls' order; after them it takes what the statements compute for it.
        backwards: passes that the step has; without any it ends with the first after which something is not finite.

    Attributes:
        reached: whether it was ended.
        loss: of the last backward pass; None if it isn't known.
    """

    def __init__(self, moment: Moment, forwards: Sequence[Forward], backwards: int) -> None:
        self._moment = moment
        self._forwards = iter(forwards)
        self._backwards = backwards
        self.reached = False
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
        if not self._backwards or (self._backwards < 0 and not self._is_sound()):
            self.reached = True
            raise Reached

    @property
    def remain(self) -> bool:
        """Whether backward passes are still to come."""
        return self._backwards > 0

    def _is_sound(self) -> bool:
        values = (self.loss, *(p.grad for p in self._moment.parameters))
        return all(is_finite(v) for v in values if v is not None)


class Aside:
    """Of a watch beside the one that replays a step: nothing of it is noted."""

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def backward(self, loss: Tensor | None) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """A step that was found bad.

    Attributes:
        frame: the function that has called `backward()`, or the optimizer's step where there was none.
        home: the function that watches.
        number: of the step, counted from 1.
        optimizer: in lower case, such as "adamw".
        rate: its learning rate.
        update: file and line of the optimizer's last step; ("", 0) before the first.
        staged: makes the watch's hooks follow a stage.
    """

    model: nn.Module
    moment: Moment
    frame: FrameType | None
    home: CodeType | None
    number: int
    optimizer: str
    rate: float
    update: tuple[str, int]
    staged: Callable[[Stage], AbstractContextManager[None]]

    def rerun(self, forwards: Sequence[Forward], *, whole: bool = False) -> Rerun | None:
        """From the statement that calls the model, or from the start of the block in which that stands."""
        met = meeting(self.frame, forwards[0].calls)
        return rerun_of(*met, whole=whole) if met else None

    def reruns(self) -> Iterator[tuple[Rerun, Stage, Sequence[Forward]]]:
        """Those that may show the failure, and what the model is given in them; the first most often does."""
        for forwards in self.moment.beginnings:
            if again := self.rerun(forwards):
                yield again, Stage(self.moment, forwards, self.moment.backwards), forwards
        for again in around(self.frame, self.home):
            yield again, Stage(self.moment, (), 0), ()


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
        failure, again, remark = _replay(step)
    if step.moment.drew_anew:
        remark = f"{remark}; {DREW_ANEW}" if remark else DREW_ANEW
    if failure is None:
        return _unknown(step, symptom, remark)
    if failure.symptom == "loss" and symptom != "the loss":  # of what stands for it
        failure = replace(failure, symptom=symptom)
    found = _explained(step, failure, again, health)
    return replace(found, explanation=f"{found.explanation}; {remark}") if remark else found


def _eager() -> AbstractContextManager[Any]:
    """Compiled models run operation by operation; not imported where nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _replay(step: Step) -> tuple[Failure | None, Rerun | None, str]:
    """The failure, the statements that showed it, and what is to be said of the replay."""
    ended = False
    for again, stage, forwards in step.reruns():
        failure, was_over = _watched(step, again, stage, forwards)
        ended |= was_over
        if failure is not None:
            return _before_the_model(step, failure, forwards) or failure, again, ""
    for forwards in step.moment.beginnings:
        failure, _ = _watched(step, None, Stage(step.moment, forwards, 0), forwards)
        if failure is not None:
            break
    else:
        failure = None
    if ended:
        return failure, None, NOT_AGAIN
    return failure, None, NO_SOURCE if step.moment.beginnings else NO_FORWARD


def _before_the_model(step: Step, failure: Failure, forwards: Sequence[Forward]) -> Failure | None:
    """Where the model's input went bad in the loop's own statements before the call, if it did there."""
    again = step.rerun(forwards, whole=True) if forwards and failure.origin.outside == "x" else None
    earlier = _watched(step, again, Stage(step.moment, (), step.moment.backwards), ())[0] if again else None
    return earlier if earlier and earlier.origin.event else None


def _watched(step: Step, again: Rerun | None, stage: Stage, forwards: Sequence[Forward]) -> tuple[Failure | None, bool]:
    """The step replayed: its statements, or the model's forward passes alone.

    Returns:
        None where it is finite, or fails; whether it came to its end.
    """

    def run() -> Tensor:
        if again is None:
            return _outputs(step.model, forwards)
        try:
            again.run()
        except BaseException:
            if not stage.reached:
                raise
        if stage.remain:
            raise EOFError("the statements ended before the backward pass")
        return _bad_gradient(step) if stage.loss is None else stage.loss

    try:
        inputs = [t.detach() for f in forwards for t in _tensors_in([f.args, f.kwargs]) if not t.grad_fn]
        given = [t for t in inputs if not _is_mask(t)]
        known = {storage(t) for t in given}
        others = [t for _, t in _data(again) if storage(t) not in known and not _is_mask(t)]
        with step.moment.back(forwards), step.staged(stage):
            return watched_step(step.model, run, given, others, step.number), True
    except Exception:  # whatever the user's statements raise the second time
        return None, False


def _bad_gradient(step: Step) -> Tensor:
    """Stands for the loss where that isn't known."""
    gradients = (p.grad for p in step.moment.parameters if p.grad is not None and not is_finite(p.grad))
    return next(gradients, torch.zeros(()))


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


def _outputs(model: nn.Module, forwards: Sequence[Forward]) -> Tensor:
    """What the model makes of its inputs: the first tensor that is not finite, if one is."""
    made = [t for f in forwards for t in _tensors_in(model(*f.args, **f.kwargs))]
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


def _explained(step: Step, failure: Failure, again: Rerun | None, health: Health) -> Diagnosis:
    origin = failure.origin
    given = origin.is_models and _is_given(step, origin.outside)
    updated = origin.outside.startswith("parameter") and not given
    cause = OVERFLOW if origin.is_models and not given else cause_of(origin)
    if cause == OVERFLOW:
        phase = origin.event.spot.phase if origin.event else "optimizer"
        sudden = frozenset({"clip_norm"} if health.swell < SWOLLEN else ())  # what clipping would have held
        cause = explosion(phase, health, step.optimizer, 1.0, recurrent=failure.recurrent, mended_by=sudden)
        if updated and health.sound and any(_is_half(p) for p in step.moment.parameters):
            cause = "half_precision_overflow"
    root = root_of(cause, health, mended=None, remedied=not health.sound, in_half=torch.is_autocast_enabled())
    named = replace(origin, outside=_words(step, failure, again))
    found = diagnosis_of(replace(failure, origin=named), health, cause, root)
    rate = "" if math.isnan(step.rate) else f" (it is {step.rate:.3g} now, {step.optimizer})"
    found = replace(found, advice=found.advice or f"{ADVICE_FOR_RECIPE}{rate}")
    if not updated:
        return found
    file, line = step.update
    return replace(found, phase="optimizer", file=file, line=line)


def _is_given(step: Step, outside: str) -> bool:
    """Whether what the model keeps was not finite before the first step: it is frozen, or this is the first."""
    frozen = (f"parameter {name}" for name, p in step.model.named_parameters() if not p.requires_grad)
    return step.number == 1 or outside in frozen


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _words(step: Step, failure: Failure, again: Rerun | None) -> str:
    """What came in not finite, as the user calls it."""
    outside = failure.origin.outside
    if outside == "x":
        return "the model's input"
    if outside == "y":
        return next((f"`{name}`" for name, t in _data(again) if not is_finite(t)), "the batch")
    if failure.origin.is_models and _is_given(step, outside):
        return f"{outside}, which was so before the first step"
    if outside.startswith("parameter"):
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
