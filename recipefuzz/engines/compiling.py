"""Whether a structure's step is worth compiling, and its way from the recording to the compiled one.

Compiling takes tens of seconds of a processor and makes a step up to twice as fast: it pays in long searches, and where
an earlier run has left what it built. So the question is asked anew after every chunk, from what this search has
measured: the time that a trial of the structure takes, the part of it that is the step, and the trials still to come.
What a build takes and brings is known from the note of an earlier one (of this recording, or else of others on this
machine), or assumed.

The build goes on in a process of its own, while the lanes go on as they are: a compiler that fails, hangs or is killed
costs no trial anything. What it built is used once it has computed, from the lanes' own tensors, what the recording
does, and was faster. On the CPU alone: on a GPU none of this is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from recipefuzz.engines import aot
from recipefuzz.engines.aot import Note, Step
from recipefuzz.engines.probe import tolerance
from recipefuzz.engines.processes import SAFE_PATH, apart_from_users_code
from recipefuzz.engines.program import Program
from recipefuzz.errors import RAISED

# assumed where this machine has built nothing yet: MLPs of 63 and 137 calls took 11 to 18 s each and became 1.6 to 2.4
# times as fast
ASSUMED_SPEEDUP, ASSUMED_SECONDS, ASSUMED_SECONDS_PER_CALL = 1.5, 10.0, 0.08
MARGIN = 2.0  # times its cost that a build must save: the work that is left is an estimate, and cores may be shared
FASTER = 1.05  # under which a compiled step is not used: the measuring is no more exact
REPEATS = 5  # of both steps when they are compared; the least time counts
LONGEST = 600.0  # seconds after which a build is given up


@dataclass(frozen=True)
class Left:
    """What is left to do of one structure, in all processes.

    Attributes:
        seconds: of processor time.
        share: of it that is the step itself, rather than the update, evaluations and verdicts.
    """

    seconds: float
    share: float


def saved(left: Left, cost: float, speedup: float, processes: int) -> float:
    """Seconds that a faster step saves: of the work that is left when it is there.

    Args:
        cost: seconds until then, during which all processes go on as before.
    """
    after = max(0.0, left.seconds - cost * processes)
    return after * left.share * (1 - 1 / speedup) if speedup > 1 else 0.0


def pays(left: Left, cost: float, speedup: float, processes: int) -> bool:
    return saved(left, cost, speedup, processes) > MARGIN * cost


def expected(own: Note | None, others: Iterable[Note], calls: int) -> tuple[float, float]:
    """Seconds that a build is expected to take, and the speed-up that it brings.

    Args:
        own: of this very recording; `others`: of others on this machine.
    """
    known = [note for note in others if note.speedup]
    speedup = median(n.speedup for n in known) if known else ASSUMED_SPEEDUP
    if own is not None:
        return own.seconds, own.speedup or speedup
    slower = median(n.seconds / _assumed_seconds(n.calls) for n in known) if known else 1.0
    return slower * _assumed_seconds(calls), speedup


def _assumed_seconds(calls: int) -> float:
    return ASSUMED_SECONDS + ASSUMED_SECONDS_PER_CALL * calls


def differs(plain: Sequence[Tensor], compiled: Sequence[Tensor], allowed: float) -> bool:
    """Whether two results differ by more than rounding: each lane is compared relative to its largest number.

    Lanes that are not finite must be so in both: a NaN is what this program looks for.
    """
    mine, other = (torch.cat([t.reshape(len(t), -1).float() for t in tensors], dim=1) for tensors in (plain, compiled))
    finite = mine.isfinite().all(1)
    if not torch.equal(finite, other.isfinite().all(1)):
        return True
    gap, largest = (mine - other).abs().amax(1), mine.abs().amax(1)
    return bool((gap > allowed * largest)[finite].any()) or not bool(finite.any())


class Compiling:
    """One structure's way to a compiled step.

    Args:
        inputs: of the step, as the lanes have them.
        processes: that share the work which is left.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor], folder: Path, processes: int) -> None:
        assert program.recording is not None
        self._program, self._processes = program, processes
        self._order = aot.ordered(program.recording, inputs, folder)
        self._process: BaseProcess | None = None
        self._since = 0.0
        # there is nothing more to decide: strides of other tensors could change with the lanes, and are relied on
        self.settled = not all(t.is_contiguous() for t in inputs[len(program.layout.names) :])

    def advance(self, inputs: Sequence[Tensor], left: Left, plain_seconds: float) -> str:
        """Go on by what can be done without waiting; what users are told, or nothing.

        Args:
            plain_seconds: that a step takes by the recording.
        """
        if self._order.library.exists():
            note = aot.read_note(self._order.note)
            cost, speedup = expected(note, (), self._order.calls)
            if self._process is None and not pays(left, 2 * REPEATS * plain_seconds, speedup, self._processes):
                return ""
            self._end()
            return self._take(inputs, note or Note(self._order.calls, cost))
        if self._process is not None:
            return self._wait()
        note = aot.read_note(self._order.note)
        if note is not None and note.failed:
            self.settled = True
        elif pays(left, *self._expected(note), self._processes) and not self._start():
            self.settled = True
            return "steps are not compiled, though it would pay: there is no C++ compiler (g++, or what $CXX names)"
        return ""

    def close(self) -> None:
        """Give up a build that is under way."""
        self._end()

    def _expected(self, own: Note | None) -> tuple[float, float]:
        others = [aot.read_note(path) for path in self._order.note.parent.glob("*.json")] if own is None else []
        return expected(own, filter(None, others), self._order.calls)

    def _start(self) -> bool:
        if aot.compiler() is None:
            return False
        arguments = (self._order, os.environ.get(SAFE_PATH))
        self._process = multiprocessing.get_context("spawn").Process(target=aot.build, args=arguments, daemon=True)
        with apart_from_users_code(None):
            self._process.start()
        self._since = time.monotonic()
        return True

    def _wait(self) -> str:
        assert self._process is not None
        if self._process.is_alive() and time.monotonic() - self._since < LONGEST:
            return ""
        if self._order.library.exists():  # since it was last looked for
            return ""
        note, code = aot.read_note(self._order.note), self._process.exitcode
        self._end()
        self.settled = True
        ended = f"the compiler's process ended with exit code {code}" if code is not None else "it took too long"
        return f"steps go on uncompiled: {note.failed if note and note.failed else ended}"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _take(self, inputs: Sequence[Tensor], note: Note) -> str:
        """Use the library if it computes what the recording does, and faster."""
        self.settled = True
        try:
            step = aot.loaded(self._order.library)
            alike, speedup = self._compared(step, inputs)
        except RAISED as error:
            return f"steps go on uncompiled: the compiled one raised {type(error).__name__}: {error}".partition("\n")[0]
        if not alike:
            return "steps go on uncompiled: the compiled one computes something else"
        aot.write_note(self._order.note, replace(note, speedup=speedup))
        if speedup < FASTER:
            return ""
        self._program.compiled = step
        return f"steps are compiled: {speedup:.1f} times as fast (built in {note.seconds:.0f} s, kept for other runs)"

    def _compared(self, step: Step, inputs: Sequence[Tensor]) -> tuple[bool, float]:
        """Whether both steps give the same, also in what they change in place; how many times as fast it is.

        Parameters, which are views of one flat vector and large, are not changed: what is contiguous may be.
        """
        plain = self._program.recorded_step
        ours, theirs = ([t.clone() if t.is_contiguous() else t for t in inputs] for _ in range(2))
        results = [
            [*run(given), *(t for t in given if t.is_contiguous())] for run, given in ((plain, ours), (step, theirs))
        ]
        alike = not differs(results[0], results[1], tolerance(self._program.recipe))
        times = [(least_seconds(plain, ours, 1), least_seconds(step, theirs, 1)) for _ in range(REPEATS)]
        mine, other = (min(column) for column in zip(*times, strict=True))
        return alike, mine / other


def least_seconds(step: Step, inputs: list[Tensor], repeats: int = REPEATS) -> float:
    """Least seconds of some calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step(inputs)
        times.append(time.perf_counter() - started)
    return min(times)
