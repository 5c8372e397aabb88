"""A recorded step as machine code: built by AOTInductor in a process of its own, loaded here in a millisecond.

`torch.compile` would do the same in this process: it imports torch._dynamo, holds up the lanes while it is at work (8
to 28 s), and takes 3 s more in each process that finds its cache warm. A recording needs no tracing by dynamo, and what
AOTInductor makes of it is a library that needs nothing but torch's own. The number of lanes stays open in it: measured,
that costs nothing, and lanes come and go.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipefuzz.atomic import write_atomically
from recipefuzz.engines.capture import Op, Recording, compiled_source
from recipefuzz.engines.processes import SAFE_PATH, leave_with_parent
from recipefuzz.errors import RAISED, RunFailedError
from recipefuzz.ownership import is_ours_alone
from recipefuzz.records import read_record

try:
    import fcntl
except ImportError:  # Windows, where AOTInductor needs a compiler that is rarely there
    fcntl = None  # type: ignore[assignment]

NAMED = (Op, torch.dtype, torch.layout, torch.memory_format)  # things of torch that are sent by name
Step = Callable[[list[Tensor]], Sequence[Tensor]]
FEWEST = 2  # lanes that a library is for: torch.export takes a size of one for one that is always one


@dataclass(frozen=True)
class Note:
    """What a build was: kept beside the library.

    Attributes:
        calls: of the recording.
        seconds: of processor time that the build took, the C++ compiler's included.
        speedup: of the step, as last measured; 0 while it is not.
        failed: why there is no library.
    """

    calls: int
    seconds: float
    speedup: float = 0.0
    failed: str = ""


@dataclass(frozen=True)
class Order:
    """A recording to be built.

    Attributes:
        library: where it goes; its name tells all that it depends on.
        packed: the recording's source, its names and its inputs, in torch's own file format.
    """

    library: Path
    packed: bytes
    calls: int

    @property
    def note(self) -> Path:
        return self.library.with_suffix(".json")


def compiler() -> str | None:
    """The C++ compiler that AOTInductor would call, if it is there."""
    if fcntl is None:
        return None
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def cache_folder() -> Path | None:
    """Where libraries are kept from run to run; None where it can't be written. It may be deleted at any time.

    What lies in it is run: a folder of another user's, or one that others may write to, is as good as none.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "recipefuzz" / "compiled"
    with contextlib.suppress(OSError):
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK | os.X_OK) and _is_private(folder) else None
    return None


def _is_private(folder: Path) -> bool:
    """The folder above it counts too: who may write there can put another in its place."""
    if fcntl is None:
        return True
    return all(is_ours_alone(made.stat()) for made in (folder, folder.parent))


def ordered(recording: Recording, inputs: Sequence[Tensor], folder: Path) -> Order:
    """The order for a recording, for inputs of such dtypes and strides; in front of each are the lanes."""
    source, names = compiled_source(recording)
    torchs = {
        name: f"torch.ops.{v}" if isinstance(v, Op) else str(v) for name, v in names.items() if isinstance(v, NAMED)
    }
    values = {name: value for name, value in names.items() if name not in torchs}
    layouts = [(tuple(t.shape), t.stride(), t.dtype) for t in inputs]
    digest = hashlib.sha256()
    for part in (source, torchs, [(shape[1:], *rest) for shape, *rest in layouts], torch.__version__, _machine()):
        digest.update(repr(part).encode())
    for name, value in values.items():
        digest.update(name.encode() + (_bytes_of(value) if isinstance(value, Tensor) else repr(value).encode()))
    file = io.BytesIO()
    torch.save((source, torchs, values, layouts), file)
    return Order(folder / f"{digest.hexdigest()[:32]}.so", file.getvalue(), len(recording.calls))


def _bytes_of(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(tensor.cpu().flatten().view(torch.uint8).tolist())


def _machine() -> str:
    """A library is for one kind of processor: home folders are shared by the nodes of a cluster."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    kept = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return repr((platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), kept))


def loaded(library: Path) -> Step:
    """The step of a library, for any number of lanes from `FEWEST`."""
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)  # noqa: SLF001 - the public one imports dynamo
    run: Step = runner.run
    return run


def read_note(path: Path) -> Note | None:
    try:
        return read_record(Note, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):  # not there, or of another version
        return None


def write_note(path: Path, note: Note) -> None:
    with contextlib.suppress(RunFailedError):  # a full disk: it is built or measured again
        write_atomically(path, json.dumps(asdict(note)))


def build(order: Order, safe_path: str | None) -> None:
    """Build in this process, which is for nothing else. It leaves a library, or a note that says why there is none."""
    if safe_path is None:
        os.environ.pop(SAFE_PATH, None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()
    _silence()
    with _alone(order.library.with_suffix(".lock")):
        if order.library.exists():  # another process was first
            return
        try:
            _build(order)
        except RAISED as error:
            message = str(error).strip().partition("\n")[0]
            write_note(order.note, Note(order.calls, _spent(), failed=f"{type(error).__name__}: {message}"))


def _silence() -> None:
    """What compilers print would go through the progress display."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Whoever comes second waits, and finds what the first has built. The lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(order: Order) -> None:
    torch.set_num_threads(1)  # it is built for as many threads as it is to run on
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(order.library.parent / "inductor")
    source, torchs, values, layouts = torch.load(io.BytesIO(order.packed), weights_only=False)
    names = values | {name: _named(text) for name, text in torchs.items()}
    exec(compile(source, "<lanes>", "exec"), names)  # noqa: S102 - our own text, see `capture.compiled_source`
    make = names["make"]

    class Replay(torch.nn.Module):
        def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            replayed: tuple[Tensor, ...] = make(inputs[0].size(0))(*inputs)
            return replayed

    inputs = tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in layouts)
    lanes = torch.export.Dim("lanes", min=FEWEST)
    with torch.no_grad():
        program = torch.export.export(Replay(), (inputs,), dynamic_shapes=(tuple({0: lanes} for _ in inputs),))
        built = torch._inductor.aot_compile(program.module(), (inputs,))  # noqa: SLF001
    part = order.library.with_suffix(f".{os.getpid()}")
    shutil.copy(str(built), part)
    write_note(order.note, Note(order.calls, _spent()))
    part.replace(order.library)


def _named(text: str) -> Any:
    """As `torch.ops.aten.mm.default`."""
    found: Any = torch
    for part in text.split(".")[1:]:
        found = getattr(found, part)
    return found


def _spent() -> float:
    """Seconds of processor time of this process and those that it has waited for."""
    return sum(os.times()[:4])
