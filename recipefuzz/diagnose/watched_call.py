"""The place where a model is called while it is watched."""

from __future__ import annotations

import sys
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from recipefuzz.diagnose.moment import Moment
from recipefuzz.diagnose.own_step import Aside, Stage

MODEL_FRAMES = 2  # from `WatchedCall` to who calls the model: from torch 2.6 on the other is its own
PLACE = "_compiled_call_impl"  # of a module, which its copies and checkpoints don't take along


class WatchedCall:
    """What a model is called through while it is watched, in the place where `Module.compile` puts its own.

    A forward pre-hook would cost 5 us more a step, and would go with every copy and checkpoint of the model.

    Attributes:
        stage: of a replay, which says what the model is to be called with.
    """

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self.stage: Stage | Aside | None = None
        self._model, self._moment, self._attributes = model, moment, vars(model)
        self._earlier = self._attributes.get(PLACE)
        self._call = self._earlier or model._call_impl
        self._thread = get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_dynamo_compiling():
            if get_ident() != self._thread and (replica := self._replica(sys._getframe(1))):
                return replica._call_impl(*args, **kwargs)
            if self.stage is not None:
                args, kwargs = self.stage.inputs(args, kwargs)
            elif torch.is_grad_enabled():
                self._moment.enter(args, kwargs, sys._getframe(MODEL_FRAMES))
        return self._call(*args, **kwargs)

    def _replica(self, frame: FrameType) -> nn.Module | None:
        """The model's copy that is being called, with its attributes: `nn.DataParallel` runs one a GPU, in a thread."""
        called = frame.f_locals.get("self")
        return called if called is not self._model and isinstance(called, nn.Module) else None

    def __enter__(self) -> None:
        self._attributes[PLACE] = self

    def __exit__(self, *_: object) -> None:
        """Watches of one model may end in any order: a later one calls what this one did."""
        later = self._attributes.get(PLACE)
        while isinstance(later, WatchedCall) and later is not self:
            if later._earlier is self:
                later._earlier, later._call = self._earlier, self._call
            later = later._earlier
        if later is self and self._attributes[PLACE] is self:
            del self._attributes[PLACE]
            if self._earlier is not None:
                self._attributes[PLACE] = self._earlier

    def __deepcopy__(self, _memo: Any) -> None:
        """A copy of the module is not watched."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
