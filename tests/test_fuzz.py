"""What others may have written: for any config, table, journal, record or reference a clear error or a right answer.

No traceback, no hang, nothing unpickled. Inputs are valid files that were damaged: values and keys exchanged for hostile
ones, and bytes cut, doubled and overwritten. An ordinary run takes the first few hundred of each kind, `pytest -m slow`
100,000 in all, or the share of them that `FUZZ_SHARE` says; `FUZZ_SEED` makes them others.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pickle
import resource
import signal
import tempfile
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from recipefuzz.axes import check_value
from recipefuzz.checks.reference_file import read_reference
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.diagnosis import Diagnosis, Fix
from recipefuzz.errors import Place, RecipefuzzError
from recipefuzz.peak import Peak
from recipefuzz.report.ranked import rank_run
from recipefuzz.report.recipes_csv import parse_cell, read_table
from recipefuzz.report.status import status_lines
from recipefuzz.report.terminal import drawing, summary
from recipefuzz.report.write import write_reports
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder, identity
from recipefuzz.sampling import distribution, total
from recipefuzz.source import Source, parse_settings, write_yaml
from recipefuzz.store import Asked, Store

SECONDS = 2.0  # of processor time that one input may take
HANG = 20.0
MEMORY = 2**30  # that one input may ask for, beyond what the process holds

# --- damage


class Raw(str):
    """Text that is written as it is."""

    __slots__ = ()


BOTH = (
    *("null", "true", "-1", "0", "1.5", "1e400", "1e-400", "9223372036854775808", '""', '"x"', '"\\u0000"', "[]", "{}"),
    *('"\\ud800"', '"\\u001b[2J"', "[[]]", '{"a": 1}', "[1, 2]", '["nan"]', '"nan"', '"1e5"', '"self"', "[null, true]"),
    *("1" + "0" * 400, "1" + "0" * 5000, f'"{"a" * 3000}"', "[" * 60 + "]" * 60, "-0.0", "3"),
    *('"[/red]"', '{"low": 1, "high": 2}', '"../../x"', '"/dev/zero"', '"=1+1"', "1e308", "-1e308", "5e-324"),
)
JSON = tuple(map(Raw, (*BOTH, "NaN", "Infinity", "-Infinity", "[" * 3000 + "]" * 3000)))
YAML = tuple(
    map(
        Raw,
        (
            *BOTH,
            *(
                "&a [*a]",
                "*a",
                "!!python/object/apply:os.system [ls]",
                "!!binary aGk=",
                "!!int x",
                "!!int ''",
                "!!bool no?",
            ),
            *(
                "!!timestamp x",
                "!!set {a}",
                "0x" + "F" * 9000,
                ".nan",
                ".inf",
                "1:30",
                "1_0",
                "1__0e5",
                "2001-01-01",
                "~",
            ),
            *(
                "<<",
                "{<<: {low: 1}, high: 2}",
                "1:" * 300 + "1.5",
                "1:" * 9000 + "1",
                "|\n x",
                "? a",
                "!!str 1",
                "!!x y",
            ),
            *(
                "{a: &b {c: 1}, d: &e {<<: [*b, *b]}}",
                "!!omap [a: 1]",
                "'",
                "- a",
                "@",
                "%",
                "{1: 2}",
                "{null: 1}",
                "[a",
                "[" * 400,
            ),
        ),
    )
)
NAMES = (
    "",
    "x",
    "self",
    "lr",
    "trial",
    "low",
    "<<",
    "\0",
    "\ud800",
    "\x1b[2J",
    "a" * 3000,
    "seed",
    "norm",
    "input",
    "1",
)


def written(tree: Any) -> str:
    """JSON, which is YAML too, with the raw parts in it."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(written, tree)) + "]"
    return json.dumps(tree)


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in it: what holds it, and under which key."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from spots(tree[key])


@st.composite
def damaged(draw: Any, trees: tuple[Any, ...], values: tuple[Raw, ...] = JSON) -> Any:
    """One of the trees with up to three of its values exchanged, left out, under another name, or doubled."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(spots(tree))
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["exchange", "exchange", "exchange", "leave out", "rename", "double", "move"]))
        if how == "exchange":
            holder[key] = draw(st.sampled_from(values))
        elif how == "move":
            holder[key] = copy.deepcopy((other := found[draw(st.integers(0, len(found) - 1))])[0][other[1]])
        elif isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * 2 if how == "double" else []
        else:
            value = holder[key] if how == "double" else holder.pop(key)
            if how != "leave out":
                holder[draw(st.sampled_from(NAMES))] = value
    return tree


BYTES = (
    *(
        b"\0",
        b"\n",
        b"\r",
        b"\t",
        b'"',
        b"'",
        b",",
        b":",
        b": ",
        b"- ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"<<: *a\n",
    ),
    *(
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xc3",
        b"1e999",
        b"nan",
        b".inf",
        b"0",
        b"-",
        b"#",
        b"!",
        b"%",
    ),
    *(
        b"|\n",
        b">\n",
        b"---\n",
        b"...\n",
        b"? ",
        b"\\",
        b"\x1b[2J",
        b"9" * 5000,
        b"a" * 140_000,
        b"[" * 2000,
        b"\n" * 500,
        b" ",
    ),
    *(
        "\u2028".encode(),
        "\u0085".encode(),
        "é".encode(),
        "٣".encode(),
        b"\x80\x04.",
        b"\xff\xff\xff\x7f",
        b"PK\x01\x02",
    ),
)


@st.composite
def scrambled(draw: Any, contents: tuple[bytes, ...]) -> bytes:
    """One of the files with up to four pieces put in, cut out, overwritten, doubled, or all after a place lost."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 2, 7, 60, 1000]))
        how = draw(st.integers(0, 5))
        if how <= 1:
            data[at:at] = draw(st.sampled_from(BYTES))
        elif how == 2:
            del data[at : at + size]
        elif how == 3:
            piece = draw(st.sampled_from(BYTES))
            data[at : at + len(piece)] = piece
        elif how == 4:
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


# --- the contract


class Hang(BaseException):
    """Not an error that anybody catches."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Memory and time are limited: a bomb must be an error, not the end of the process."""

    def over(*_: object) -> None:
        raise Hang

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    handler = signal.signal(signal.SIGPROF, over)
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def keeps_contract(act: Callable[[], object], errors: type[Exception] = RecipefuzzError) -> None:
    begun, said = time.process_time(), "an answer"
    signal.setitimer(signal.ITIMER_PROF, HANG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, on files that other versions of it wrote
        try:
            act()
        except errors as error:
            said = str(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    assert time.process_time() - begun < SECONDS
    assert said.strip()
    assert len(said) < 100_000
    assert not {c for c in said if unicodedata.category(c) in ("Cc", "Cs")} - {"\n", "\t"}, "what a terminal obeys"


# --- configs

STUDY: dict[str, Any] = {
    "study": "fuzzed",
    "target": {
        "data": "digits",
        "model": "mlp",
        "loss": "cross_entropy",
        "model_args": {"width": 8, "deep": [1, {"a": None}]},
    },
    "space": {
        "lr": {"low": 1e-4, "high": 10, "log": True},
        "width": {"low": 16, "high": 128, "integer": True},
        "dropout": {"low": 0.0, "high": 0.9, "step": 0.3},
        "clip_norm": [None, 1, 5],
    },
    "recipe": {"optimizer": "momentum", "depth": 2, "weight_decay": 0.1},
    "trial": {"steps": 20, "batch_size": 8, "seed": 1, "extend": 0, "timeout": "90s"},
    "search": {
        "trials": 12,
        "sampler": "grid",
        "time": "2h",
        "window": 4,
        "grid_points": 3,
        "confirm": {"top": 1, "seeds": 2},
    },
    "run": {"device": "auto", "engine": "auto", "workers": 0, "folder": "runs/x"},
    "ladder": ["rnn", {"model": "lstm", "model_args": {"depth": 1}}],
    "base": ".",
    "reference": "right.npz",
}
SMALL: dict[str, Any] = {
    "target": {"data": "digits", "model": "mlp"},
    "space": {"lr": [0.1, 1], "norm": ["none", None]},
}
BLOCK = b"""\
# a study
study: block
target: &t {data: digits, model: mlp}
space:
  lr: {low: 1e-5, high: 10, log: true}
  clip_norm: [null, 1, 5]
  other: &o {low: 1, high: 3}
  another:
    <<: *o
    high: 7
recipe: {optimizer: momentum}
trial:
    steps: 300
search: {time: 10m}
"""


def use_config(config: Config) -> None:
    """What every command does with a config, and that it stays the same when it is written and read again."""
    for _, axis in config.axes.axes:
        distribution(axis)
    config.default_recipe().fingerprint  # noqa: B018
    total(config.search, config.axes)
    identity(config, {})
    assert config.folder.is_absolute()
    RunFolder.of(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(write_yaml(config.resolved()), encoding="utf-8", errors="backslashreplace")
        again = load_config(path)
    assert again.resolved() == config.resolved()
    assert again.axes == config.axes


def config_of(content: bytes, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_bytes(content)
    keeps_contract(lambda: use_config(load_config(path)))


def configs(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    return damaged((STUDY, SMALL), YAML), lambda tree: config_of(written(tree).encode("utf-8", "replace"), folder)


def config_bytes(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    contents = (BLOCK, write_yaml(STUDY).encode(), written(SMALL).encode())
    return scrambled(contents), lambda content: config_of(content, folder)


# --- settings of the command line


def given_settings(_: Path) -> tuple[Any, Callable[[Any], None]]:
    config = parse_config(STUDY)

    def act(texts: list[str]) -> None:
        def use() -> None:
            values = parse_settings(texts)
            for name, value in values.items():
                check_value(name, value, Source(), "--set", name)
            config.default_recipe().but(**values).fingerprint  # noqa: B018

        keeps_contract(use)

    word = st.sampled_from(YAML) | st.text(max_size=8) | st.sampled_from(["1e-3", "null", "0.1 # note", "{a: 1}"])
    setting = st.tuples(
        st.sampled_from([*NAMES, *STUDY["space"], "optimizer"]), st.sampled_from(["=", "=", "=", "", "=="]), word
    )
    return st.lists(setting.map("".join), min_size=1, max_size=3), act


# --- tables of recipes

TABLE = b"lr,init_scale,norm,clip_norm,width\n0.1,1,none,,16\n1e-3,2.5,batch,5,32\n"
CELL = st.sampled_from(
    [
        "",
        "0.1",
        "nan",
        "inf",
        "-1",
        "none",
        "null",
        "1e400",
        "9" * 5000,
        "a" * 140_000,
        '"',
        '"a,b"',
        '"a\nb"',
        "\0",
        "\ufeff",
        "=1+1",
    ]
) | st.text(max_size=6)
ROWS = st.lists(st.lists(CELL | st.sampled_from(["lr", "norm", "batch_size", "width", "seed"]), max_size=6), max_size=5)


def tables(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    from recipefuzz.judging import _recipe

    config, path = parse_config(SMALL), folder / "recipes.csv"

    def use() -> None:
        table = read_table(path)
        assert table.notna().all(axis=None)
        for row in range(min(len(table), 3)):
            _recipe(config, table, [c for c in table.columns if c in ("lr", "norm", "width")], row, Place(str(path)))
            assert all(
                isinstance(parse_cell("x", cell), (bool, int, float, str, type(None))) for cell in table.iloc[row]
            )

    def act(content: bytes) -> None:
        path.write_bytes(content)
        keeps_contract(use)

    rows = ROWS.map(lambda rows: "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass"))
    return scrambled((TABLE, b"\xef\xbb\xbf" + TABLE, TABLE.replace(b"\n", b"\r\n"))) | rows, act


# --- journals

JOURNALS = ("tpe", "random", "qmc", "grid", "cmaes")
MODEST = {key: STUDY[key] for key in ("target", "recipe", "trial")} | {"space": STUDY["space"], "study": "fuzzed"}


@cache
def config_for(sampler: str) -> Config:
    return parse_config(MODEST | {"search": STUDY["search"] | {"sampler": sampler, "trials": 14}})


def outcome(asked: Asked, config: Config) -> TrialResult:
    values = config.recipe_of(asked.values).values()
    if asked.number % 5 == 3:
        return TrialResult(asked.number, Phase.SEARCH, 1, values, error="killed")
    if asked.number % 5 == 2:
        return TrialResult(
            asked.number, Phase.SEARCH, 1, values, "nan", "exploding_parameters", "at step 3", first_bad=3
        )
    curve = (2.3, 1.0, 0.5)
    return TrialResult(
        asked.number, Phase.SEARCH, 1, values, "converging", skill=0.5, score=0.4, loss=1.0, steps=20, curve=curve
    )


def go_on(path: Path, config: Config, *, steps: int = 3) -> list[TrialResult]:
    """Resume the study in a journal."""
    store = Store(path, write=True)
    try:
        study = store.begin(identity(config, {}), config.axes, config.search, 4)
        for _ in range(steps):
            for asked in study.refill():
                study.record(outcome(asked, config), 1.5)
        best = next((r for r in study.results if r.converging), None)
        if best is not None:
            again = TrialResult(best.trial, Phase.CONFIRM, 2, best.values, "converging", skill=0.5, score=0.4)
            study.record_all([again], 2.0, Peak(100, 50))
        return study.results
    finally:
        store.close()


@cache
def journal_of(sampler: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        go_on(path, config_for(sampler))
        return path.read_bytes()


def use_journal(path: Path, config: Config) -> None:
    """What can be read is read the same again after the study has gone on."""
    store = Store(path, write=False)
    before = store.results()
    store.seconds(), store.peak(), store.meta()
    store.close()
    after = [repr(r) for r in go_on(path, config, steps=2)]
    assert {repr(r) for r in before} <= set(after)
    again = Store(path, write=False)
    assert [repr(r) for r in again.results()] == after
    again.close()


def journal_from(sampler: str, content: bytes, folder: Path) -> None:
    path = folder / "study.journal"
    path.write_bytes(content)
    keeps_contract(lambda: use_journal(path, config_for(sampler)))


def journals(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    """Fields exchanged, in the entries of one study."""
    trees = tuple([sampler, [json.loads(line) for line in journal_of(sampler).splitlines()]] for sampler in JOURNALS)

    def act(tree: Any) -> None:
        sampler, lines = tree if isinstance(tree, list) and len(tree) == 2 else ("tpe", tree)
        sampler = sampler if isinstance(sampler, str) and sampler in JOURNALS else "tpe"
        lines = lines if isinstance(lines, list) else [lines]
        journal_from(sampler, "".join(f"{written(line)}\n" for line in lines).encode("utf-8", "replace"), folder)

    return damaged(trees), act


def journal_bytes(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    contents = {sampler: journal_of(sampler) for sampler in ("tpe", "cmaes")}
    inputs = st.sampled_from(list(contents)).flatmap(lambda s: st.tuples(st.just(s), scrambled((contents[s],))))
    return inputs, lambda drawn: journal_from(*drawn, folder)


def journal_order(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    """Entries doubled, lost, and in another order, of several studies."""
    lines = {sampler: journal_of(sampler).splitlines(keepends=True) for sampler in JOURNALS}

    def act(drawn: tuple[str, list[tuple[str, int, int]]]) -> None:
        sampler, moves = drawn
        mine = list(lines[sampler])
        for other, source, target in moves:
            mine.insert(target % (len(mine) + 1), lines[other][source % len(lines[other])])
            if source % 3:
                del mine[source % len(mine)]
        journal_from(sampler, b"".join(mine), folder)

    names = st.sampled_from(JOURNALS)
    return st.tuples(
        names, st.lists(st.tuples(names, st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=6)
    ), act


# --- records

RESULT = TrialResult(
    3,
    Phase.SEARCH,
    1,
    {"lr": 0.1, "norm": None, "bias": True},
    "nan",
    "x",
    "y",
    first_bad=4,
    loss=1.0,
    curve=(1.0, 2.0),
).record()
FIX = Fix("lr 0.3 -> 0.1", {"lr": 0.1}, "converging", 0.9, 3, 3)
FOUND = Diagnosis(
    "nan",
    "recipe",
    "exploding_parameters",
    "forward",
    "exp",
    "net.0",
    __file__,
    3,
    5,
    "text",
    {"a": [1.0, None]},
    ("x at 1",),
    "",
    (FIX,),
).record({"lr": 0.3})


def records(_: Path) -> tuple[Any, Callable[[Any], None]]:
    def use(tree: Any) -> None:
        try:
            plain = json.loads(written(tree))
        except (ValueError, RecursionError):
            return  # no JSON
        if isinstance(plain, dict) and "fixes" in plain:
            found = Diagnosis.from_record(plain)
            assert Diagnosis.from_record(json.loads(json.dumps(found.record({})))).record({}) == found.record({})
        else:
            result = TrialResult.from_record(plain)
            assert repr(TrialResult.from_record(result.record())) == repr(result)

    return damaged((RESULT, FOUND)), lambda tree: keeps_contract(lambda: use(tree), ValueError)


# --- a run's folder


def folders(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    """Status, report and resumption of a run of which one file is damaged."""
    config = config_for("tpe")
    whole = {
        "config.yaml": config.resolved(),
        "study.journal": [json.loads(line) for line in journal_of("tpe").splitlines()],
        "diagnoses.json": {"2": FOUND, "7": FOUND},
    }

    def use() -> None:
        run = RunFolder(folder)
        study = run.load_config()
        assert list(status_lines(run))
        results, _, peak = run.read(study)
        ranking, winner = rank_run(study, results)
        known = run.diagnoses()
        run.keep(known)
        assert run.diagnoses() == known
        write_reports(folder, study, results, ranking, winner, known)
        drawing(summary(folder, study, results, ranking, known, peak), "")
        run.open(study, {}, fresh=False).close()

    def act(drawn: tuple[str, Any]) -> None:
        name, part = drawn
        for file, tree in (whole | {name: part}).items():
            text = (
                "".join(f"{written(line)}\n" for line in tree)
                if file.endswith("journal") and isinstance(tree, list)
                else written(tree)
            )
            (folder / file).write_bytes(text.encode("utf-8", "replace"))
        keeps_contract(use)

    names = st.sampled_from(list(whole))
    return names.flatmap(
        lambda n: st.tuples(st.just(n), damaged((whole[n],), YAML if n == "config.yaml" else JSON))
    ), act


# --- references


class Attack:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


ENTRIES = (
    *map(npy, ([[1.0, 2.0]], 3, [], [[1, 2], [3, 4]], [True], ["a"], [1j], np.array([None, Attack()], dtype=object))),
    npy(np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])),
    header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    header("{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }"),
    header("{'descr': '<f8', 'fortran_order': False, 'shape': (-5,), }"),
    header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + pickle.dumps(Attack()),
    header("{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000,), }"),
    header("(" * 3000),
    *(b"", b"\x93NUMPY", b"\x93NUMPY\x03\x00\xff\xff\xff\xff", pickle.dumps(Attack()), bytes(2**20), b"text"),
)
PARTS = ("input", "input:a", "(model)", "0", "weight:0", "tolerance", "", "../x", "a" * 300, "a.npy", "\udcff", "\0")


def zipped(entries: list[tuple[str, bytes, int]]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, content, how in entries:
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy" if how < 3 else name or "x"), content, (0, 8, 8, 0, 12, 14)[how]
            )
    return file.getvalue()


WHOLE = zipped([("input", npy([[1.0, 2.0]]), 0), ("(model)", npy([[0.5]]), 1), ("tolerance", npy(0.1), 0)])
BOMB = zipped([("input", npy([[1.0]]), 0), ("(model)", npy(np.zeros(2**24)), 1)])  # 128 MB in 130 kB


def references(suffix: str, inputs: Any) -> Callable[[Path], tuple[Any, Callable[[Any], None]]]:
    def kind(folder: Path) -> tuple[Any, Callable[[Any], None]]:
        path = folder / f"right{suffix}"

        def use() -> None:
            found = read_reference(path, Place(key="reference"))
            assert found.inputs
            assert found.outputs
            assert {
                a.dtype.kind for part in (found.inputs, found.outputs, found.weights) for a in part.values()
            } <= set("fiub")

        def act(content: bytes) -> None:
            path.write_bytes(content)
            keeps_contract(use)
            assert not Path("unpickled").exists()

        return inputs, act

    return kind


ARCHIVE = st.tuples(st.sampled_from(PARTS[:-2]) | st.text(max_size=3), st.sampled_from(ENTRIES), st.integers(0, 5))
GIVEN = {
    "input": [[1.0, 2.0]],
    "(model)": [[0.5, [1], "a"]],
    "0": [[1, 2], [3, 4]],
    "weight:0": [[True]],
    "tolerance": 0.1,
}
npz_parts = references(
    ".npz", st.lists(ARCHIVE, max_size=4).map(lambda entries: zipped([("input", npy([1.0]), 0), *entries]))
)
npz_bytes = references(".npz", scrambled((WHOLE, WHOLE, WHOLE, BOMB)))
json_parts = references(".json", damaged((GIVEN,)).map(lambda tree: written(tree).encode("utf-8", "replace")))
json_bytes = references(".json", scrambled((written(GIVEN).encode(),)))

# --- all of them: how many in an ordinary run, and how many in a slow one

KINDS: dict[str, tuple[Callable[[Path], tuple[Any, Callable[[Any], None]]], int, int]] = {
    "config": (configs, 100, 6_000),
    "config, bytes": (config_bytes, 60, 3_000),
    "settings": (given_settings, 150, 20_000),
    "table": (tables, 100, 11_000),
    "journal": (journals, 30, 3_000),
    "journal, bytes": (journal_bytes, 30, 3_000),
    "journal, order": (journal_order, 20, 2_000),
    "record": (records, 150, 24_000),
    "folder": (folders, 12, 600),
    "npz": (npz_parts, 60, 3_400),
    "npz, bytes": (npz_bytes, 40, 8_000),
    "reference.json": (json_parts, 60, 10_000),
    "reference.json, bytes": (json_bytes, 40, 7_000),
}


def fuzz(kind: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    inputs, act = KINDS[kind][0](folder)

    @seed(int(os.environ.get("FUZZ_SEED", "6")))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def holds(drawn: Any) -> None:
        act(drawn)

    with bounded():
        holds()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_written_is_an_error_or_an_answer(kind, tmp_path, monkeypatch):
    fuzz(kind, KINDS[kind][1], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_written_is_an_error_or_an_answer_100_000_times(kind, tmp_path, monkeypatch):
    assert sum(slow for _, _, slow in KINDS.values()) > 100_000
    share = float(os.environ.get("FUZZ_SHARE", "1"))
    fuzz(kind, math.ceil(share * KINDS[kind][2]), tmp_path, monkeypatch)
