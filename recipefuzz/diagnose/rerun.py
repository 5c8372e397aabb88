"""The user's own statements, from the one that calls the model to the one that calls `backward()`, run once more.

They are found by where two calls stand in a function that is still running, cut from its source, and run on a copy of
its names, under their own file and line numbers. What stands before them is not run again: it has changed the
function's variables already (`x = x / 255`), and what the model was given is known.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any

from recipefuzz.errors import is_users

AGAIN = "_recipefuzz_again"
DEPTH = 16  # frames of a call that are kept: the model's, the user's helpers'

Calls = list[tuple[CodeType, int]]
Statements = Sequence[ast.stmt]


@dataclass(frozen=True, order=True)
class Position:
    """In a source file: the line from 1, the column in bytes from 0."""

    line: int
    column: int


def calls(frame: FrameType | None, depth: int = DEPTH, outermost: FrameType | None = None) -> Calls:
    """The functions that are running, innermost first, and which instruction of each. Cheap: made at every step.

    Args:
        outermost: the last that is of interest.
    """
    found: Calls = []
    while frame is not None and len(found) < depth:
        found.append((frame.f_code, frame.f_lasti))
        frame = None if frame is outermost else frame.f_back
    return found


def steady(frame: FrameType) -> FrameType | None:
    """A running function whose callers stay what they are until it ends: not one that can pause."""
    return None if frame.f_code.co_flags & _PAUSES else frame


_PAUSES = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def meeting(frame: FrameType | None, earlier: Calls) -> tuple[FrameType, int] | None:
    """The innermost running function that made an earlier call, too, and the instruction of that call."""
    made = dict(reversed(earlier))
    for _ in range(DEPTH):
        if frame is None:
            return None
        if frame.f_code in made:
            return frame, made[frame.f_code]
        frame = frame.f_back
    return None


def is_user_frame(frame: FrameType) -> bool:
    return is_users(frame.f_code.co_filename)


def user_place(made: Calls) -> tuple[str, int]:
    """File and line of the innermost call that the user's code made; ("", 0) where there is none."""
    for code, instruction in made:
        if is_users(code.co_filename) and (at := position(code, instruction)):
            return code.co_filename, at.line
    return "", 0


def position(code: CodeType, instruction: int) -> Position | None:
    """Where an instruction stands."""
    line, _, column, _ = next(islice(code.co_positions(), instruction // 2, None), (None,) * 4)
    return None if line is None else Position(line, column or 0)


def statements_between(body: Statements, first: Position, last: Position) -> tuple[Statements, int] | None:
    """The innermost block in which both positions stand, cut after the second; the index of the first's statement.

    Where the first comes after the second (it was called in the loop's last round), an empty block.
    """
    for block in _blocks(body):
        start = next((i for i, s in enumerate(block) if _covers(s, first)), None)
        end = next((i for i, s in enumerate(block) if _covers(s, last)), None)
        if start is None or end is None:
            continue
        if start == end and (inner := _within(block[start], first, last)):
            return inner
        return (block[: end + 1], start) if start <= end else ((), 0)
    return None


def _within(statement: ast.stmt, first: Position, last: Position) -> tuple[Statements, int] | None:
    for block in _blocks_of(statement):
        if found := statements_between(block, first, last):
            return found
    return None


def _blocks(body: Statements) -> Iterator[Statements]:
    yield body
    for statement in body:
        for block in _blocks_of(statement):
            yield from _blocks(block)


def _blocks_of(statement: ast.stmt) -> Iterator[Statements]:
    for name in ("body", "orelse", "finalbody"):
        if isinstance(block := getattr(statement, name, None), list):
            yield block
    for handler in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
        yield handler.body


def _covers(statement: ast.stmt, at: Position) -> bool:
    end = Position(statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
    return Position(statement.lineno, statement.col_offset) <= at <= end


@dataclass(frozen=True)
class Rerun:
    """Statements that can be run again.

    Attributes:
        run: does so.
        reads: variables that they mention, with the values that the function has for them now.
    """

    run: Callable[[], None]
    reads: Mapping[str, Any]


def body_around(tree: ast.AST, at: Position) -> tuple[Statements, bool]:
    """The innermost body of a loop or a function in which a position stands, cut after it; whether it's a loop's."""
    found: tuple[Statements, bool] = (), False
    for node in ast.walk(tree):  # outer ones come first
        body: Statements = ()
        if isinstance(node, (ast.For, ast.While, ast.FunctionDef)):
            body = node.body
        elif isinstance(node, ast.Lambda):
            body = [ast.copy_location(ast.Expr(node.body), node.body)]
        end = next((i for i, s in enumerate(body) if _covers(s, at)), None)
        if end is not None:
            found = body[: end + 1], isinstance(node, (ast.For, ast.While))
    return found


def around(frame: FrameType | None, home: CodeType | None) -> Iterator[Rerun]:
    """What the user's functions do from the start of their bodies to where they are, out to the innermost loop.

    Args:
        home: the function that watches: no more than a loop in it is run again.
    """
    for _ in range(DEPTH):
        if frame is None or (_is_expression(frame.f_code) and frame.f_code.co_name != "<lambda>"):
            return
        if is_user_frame(frame):
            source, at = _source(frame), position(frame.f_code, frame.f_lasti)
            body, is_loop = body_around(ast.parse(source), at) if source and at else ((), False)
            if is_loop or frame.f_code is not home:
                kept = [s for s in body if not _draws(s)]
                if kept and not _is_unfit(kept) and (again := _callable(kept, frame)):
                    yield again
            if is_loop or frame.f_code is home:
                return
        frame = frame.f_back


def rerun_of(frame: FrameType, instruction: int, *, whole: bool = False) -> Rerun | None:
    """What the function does from an earlier call to the one that it is in; None where that can't be run again.

    It can't where there is no source, where that is no longer what runs, or where the statements wait, yield, or bind
    names of an outer function.

    Args:
        instruction: of the earlier call.
        whole: from the start of the loop's body, what stands before the call included.
    """
    source = "" if _is_expression(frame.f_code) else _source(frame)
    first, last = position(frame.f_code, instruction), position(frame.f_code, frame.f_lasti)
    if not source or first is None or last is None:
        return None
    found = statements_between(ast.parse(source).body, first, last)
    block, start = found or ((), 0)
    if not block:
        return None
    body = [s for i, s in enumerate(block) if i >= (0 if whole else start) and (i == start or not _draws(s))]
    return None if any(map(_draws, body)) or _is_unfit(body) else _callable(body, frame)


def _is_expression(code: CodeType) -> bool:
    """Whether it is a part of a statement: a lambda, a comprehension that goes through all batches."""
    return code.co_name.startswith("<") and code.co_name != "<module>"


def _source(frame: FrameType) -> str:
    """What the function was compiled from; "" where that isn't known."""
    source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    return source if _is_of(frame.f_code, source) else ""


def _is_unfit(body: Statements) -> bool:
    return any(isinstance(n, _UNFIT) for s in body for n in ast.walk(s))


_UNFIT = (ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith, ast.Nonlocal)


def _is_of(code: CodeType, source: str) -> bool:
    """Whether the function was compiled from this very source: files are edited while they train.

    IPython compiles each of a cell's statements by itself.
    """
    try:
        tree = ast.parse(source)
        parts = [tree, *(ast.Module([s], []) for s in tree.body)] if code.co_name == "<module>" else [tree]
        waiting = [compile(part, code.co_filename, "exec", dont_inherit=True) for part in parts]
    except SyntaxError:
        return False
    while waiting:
        found = waiting.pop()
        alike = found.co_qualname == code.co_qualname and found.co_firstlineno == code.co_firstlineno
        if alike and found.co_code == code.co_code:
            return True
        waiting += [inner for inner in found.co_consts if isinstance(inner, CodeType)]
    return False


def _draws(statement: ast.stmt) -> bool:
    """Whether it takes the next batch from an iterator, which must not go on."""
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "next" for n in ast.walk(statement)
    )


class _WithoutUpdates(ast.NodeTransformer):
    """Leaves out what steps an optimizer, a scheduler, a scaler or an average of weights: that was done already."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        call = node.value
        named = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
        if named == "step" or (named == "update" and isinstance(call, ast.Call) and not (call.args or call.keywords)):
            return ast.copy_location(ast.Pass(), node)
        return node


def _callable(body: Statements, frame: FrameType) -> Rerun | None:
    """The statements as a function of the names that they bind; `break` and `continue` end it."""
    body = [_WithoutUpdates().visit(s) for s in body]
    names = {**frame.f_globals, **frame.f_locals}
    bound = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    declared = {name for s in body for n in ast.walk(s) if isinstance(n, ast.Global) for name in n.names}
    given = sorted((bound & names.keys()) - declared)
    shell = ast.parse(f"def {AGAIN}({', '.join(given)}):\n for _ in (None,):\n  pass")
    function = shell.body[0]
    assert isinstance(function, ast.FunctionDef)
    loop = function.body[0]
    assert isinstance(loop, ast.For)
    loop.body = list(body)
    try:
        exec(compile(shell, frame.f_code.co_filename, "exec", dont_inherit=True), names)  # noqa: S102 - the user's own
    except SyntaxError:
        return None
    again: Callable[..., Any] = names.pop(AGAIN)  # of which it would be a part, so that batches lived on
    values = [frame.f_locals[n] if n in frame.f_locals else frame.f_globals[n] for n in given]
    read = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name)} & names.keys()
    return Rerun(lambda: again(*values), {name: names[name] for name in sorted(read)})
