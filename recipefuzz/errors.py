"""What users see when something is wrong: where, what was found, what was expected, how to mend it."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
RAISED = (Exception, SystemExit)  # what a user's code may raise: a script's sys.exit() too, but Ctrl-C is the user's
PROMPTS = ("<ipython-input-", "<python-input-")  # their source is kept, as a file's is
STANDARD_LIBRARY = str(Path(traceback.__file__).parent)

LONGEST = 2000  # characters of a line of a message: a key of a megabyte helps nobody

EXIT_BAD_ANSWER = 1  # the question was answered, and the answer is bad: no safe recipe
EXIT_BAD_INPUT = 2
EXIT_RUN_FAILED = 3


@dataclass(frozen=True)
class Place:
    """Where a fault lies: a file, perhaps a line (from 1), perhaps a key path such as `space.lr.low`."""

    file: str = ""
    line: int | None = None
    key: str = ""

    def __str__(self) -> str:
        spot = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (spot, self.key) if part)


class RecipefuzzError(Exception):
    """Base of everything raised on purpose; the command line prints it without a traceback.

    Args:
        problem: one sentence: what is wrong.
        place: where.
        found: the offending value, as the user wrote it.
        expected: what is accepted there.
        fix: what to do.
        detail: further lines shown as they are (a trimmed traceback of the user's code, a diff).
    """

    exit_code = EXIT_RUN_FAILED

    def __init__(
        self,
        problem: str,
        *,
        place: Place | None = None,
        found: object = None,
        expected: str = "",
        fix: str = "",
        detail: str = "",
    ) -> None:
        self.problem = problem
        self.place = place or Place()
        self.found = found
        self.expected = expected
        self.fix = fix
        self.detail = detail
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.place}: {self.problem}" if str(self.place) else self.problem
        rows = [("found", shorten(self.found)), ("expected", self.expected), ("fix", self.fix)]
        lines = [head, *(f"  {name + ':':<10}{text}" for name, text in rows if text)]
        if self.detail:
            lines += ["", *(f"  {line}" for line in self.detail.rstrip().splitlines())]
        return "\n".join(_clipped(line, LONGEST) for line in printable("\n".join(lines)).split("\n"))


class InputError(RecipefuzzError):
    """The config, the recipes or the user's code can't be used as given. Nothing was overwritten."""

    exit_code = EXIT_BAD_INPUT


class RunFailedError(RecipefuzzError):
    """The input was good, but the run could not go on: a full disk, a damaged store, a dead worker."""


class NonFiniteError(RecipefuzzError):
    """`recipefuzz.watch`: the loss, a gradient or a parameter is not finite; the optimizer's step was not made."""


def printable(text: str) -> str:
    """Text that no terminal obeys: control characters and halves of characters as escapes; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shorten(value: object, limit: int = 120) -> str:
    """A value for a message, on one line of at most `limit` characters; empty for None."""
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return _clipped(text, limit)


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


CALLED = {  # in torch, Lightning, transformers or optax: here
    "learning_rate": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "bs": "batch_size",
    "grad_clip": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "max_norm": "clip_norm",
    "gain": "init_scale",
    "opt": "optimizer",
    "num_warmup_steps": "warmup_steps",
    "hidden_size": "width",
    "hidden": "width",
    "num_layers": "depth",
    "layers": "depth",
    "dtype": "precision",
    "max_steps": "steps",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that `word` is probably a typo of, or another library's name for; or an empty string."""
    known = list(known)
    if (called := CALLED.get(word.lower())) in known:
        return str(called)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"


def user_traceback(error: BaseException) -> str:
    """The traceback without the frames of recipefuzz and of installed packages: the user's own code.

    Frames of packages are kept where the user's code has none (an installed model, say).
    """
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if is_users(f.filename)]
    packages = [f for f in frames if _is_installed(f.filename) and not Path(f.filename).is_relative_to(PACKAGE)]
    shown = traceback.format_list(users or packages[-2:])
    return "".join([*shown, *traceback.format_exception_only(error)]).rstrip()


def describe_exception(error: BaseException) -> str:
    """One line: the exception's class and first line, and the user's file and line where it was raised."""
    text = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    users = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{message} ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else message


def is_users(filename: str) -> bool:
    """Whether a file is neither ours, nor an installed package's, nor Python's."""
    inside = any(Path(filename).is_relative_to(folder) for folder in (PACKAGE, STANDARD_LIBRARY))
    return filename.startswith(PROMPTS) or not (_is_installed(filename) or inside or filename.startswith("<"))


def _is_installed(filename: str) -> bool:
    return "site-packages" in filename or "dist-packages" in filename  # the latter is Debian's
