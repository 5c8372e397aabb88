"""The shape of the house, read from the source: which file may import which, and which library lives where."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "recipefuzz"

# A file imports from lower layers, and from those listed before it in its own. A folder is one entry: in it there is no
# order, only no cycle.
LAYERS = (
    ("errors", "garbage"),
    ("recipe", "space", "trace", "atomic", "ownership", "records", "peak", "stopping"),
    (
        "evidence",
        "verdict",
        "result",
        "finding",
        "diagnosis",
        "source",
        "axes",
        "section",
        "job_config",
        "config",
        "ranking",
        "narrowing",
    ),
    ("targets/",),
    (
        "engines/",
        *("entry_log", "leases", "locks", "journal", "database"),
        *("cma_sampler", "sampling", "trial_log", "store", "board", "sharing"),
        *("run_folder", "rung", "report/", "template"),
    ),
    ("diagnose/", "checks/"),
    ("listening", "diagnosing", "checking", "searched", "working", "searching", "laddering", "judging"),
    ("launch/",),
    ("cli", "__init__", "__main__"),
)
PURE = 3  # layers from below that know neither torch nor optuna: their rules are tested in milliseconds
HOMES = {
    # a library, and the only places that may import it
    "optuna": {"cma_sampler", "sampling", "trial_log", "store", "board", "sharing", "locks"},
    "pandas": {"report/", "ranking", "judging", "searched"},
    "subprocess": {"targets/command", "launch/"},
    "pydantic": {"section", "job_config", "config"},
    "yaml": {"source"},
    "submitit": {"launch/"},
    "psycopg": {"database"},
    "typer": {"cli"},
    "rich": {"report/", "cli"},
    "sklearn": {"targets/"},
}
RUNS = {
    # what runs or unpickles what it is given, and the only files that may call it: none of them on what a file holds
    # that others may write to. `engines` run our own text, `rerun` the user's own frames.
    "exec": {"engines/aot", "engines/capture", "diagnose/rerun"},
    "eval": set(),
    "torch.load": {"engines/aot"},  # of what its parent process has sent
    "np.load": set(),
    "yaml.load": set(),
    "yaml.unsafe_load": set(),
    "yaml.full_load": set(),
}
UNPICKLERS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "handler", "base", "core", "tools"}
TOP = {"pyproject.toml", "README.md", "LICENSE", "recipefuzz", "studies", "tests"}


@dataclass(frozen=True)
class Import:
    """One import statement: from which file, of what, in which line; `hinted` is for the type checker alone."""

    importer: str
    imported: str
    line: int
    hinted: bool

    def __str__(self) -> str:
        return f"recipefuzz/{self.importer}.py:{self.line} imports {self.imported}"


def modules() -> list[str]:
    """All files of the package, as `config` or `report/tables`."""
    return sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))


@cache
def imports() -> tuple[Import, ...]:
    """All import statements, those inside of functions too."""
    return tuple(found for module in modules() for found in _imports_of(module))


def _imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    hinted = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"recipefuzz/{module}.py:{node.lineno}: a relative import"
            assert node.module
            names = [_submodule(node.module, alias.name) for alias in node.names]
        else:
            continue
        for name in dict.fromkeys(names):
            yield Import(module, name, node.lineno, node in hinted)


def _submodule(package: str, name: str) -> str:
    """`from recipefuzz.targets import losses` imports a file; `from recipefuzz.errors import Place` does not."""
    inside = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if inside.with_suffix(".py").exists() or inside.is_dir() else package


def own(name: str) -> str | None:
    """The file of an imported module of ours, as in `modules`; None for another's."""
    first, _, rest = name.partition(".")
    if first != "recipefuzz":
        return None
    path = rest.replace(".", "/")
    return f"{path}/__init__".lstrip("/") if (PACKAGE / path).is_dir() else path


def entry(module: str) -> str:
    """Its entry in the table."""
    folder, slash, _ = module.partition("/")
    return folder + slash


PLACES = {name: (layer, at) for layer, names in enumerate(LAYERS) for at, name in enumerate(names)}


def test_every_file_has_its_place_in_the_table():
    assert {entry(module) for module in modules()} - set(PLACES) == set(), "add new files to LAYERS"
    assert set(PLACES) - {entry(module) for module in modules()} == set(), "take files that are gone out of LAYERS"


def test_files_import_from_below():
    """Imports inside of functions and for the type checker included: a layer is what one has to know to read it."""
    upward = [
        str(i)
        for i in imports()
        if (target := own(i.imported)) is not None
        and entry(target) != entry(i.importer)
        and PLACES[entry(target)] >= PLACES[entry(i.importer)]
    ]
    assert upward == []


def test_there_are_no_import_cycles():
    graph = {module: set() for module in modules()}
    for i in imports():
        if (target := own(i.imported)) is not None and not i.hinted:
            graph[i.importer].add(target)
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert sorted(graph) == [], "these import each other"


@pytest.mark.parametrize("library", HOMES)
def test_library_stays_where_it_belongs(library):
    strays = [
        str(i)
        for i in imports()
        if i.imported.split(".")[0] == library and not {i.importer, entry(i.importer)} & HOMES[library]
    ]
    assert strays == []


@pytest.mark.parametrize("library", ["torch", "optuna", "sklearn", "scipy"])
def test_pure_layers_import_no_heavy_library(library):
    pure = {name for names in LAYERS[:PURE] for name in names}
    strays = [str(i) for i in imports() if i.imported.split(".")[0] == library and entry(i.importer) in pure]
    assert strays == []


def test_pandas_is_only_a_type_to_searching_and_judging():
    users = ("searching", "judging")
    pandas = [i for i in imports() if i.imported.split(".")[0] == "pandas" and i.importer in users]
    assert all(i.hinted for i in pandas)


def test_nothing_private_is_imported_from_another_file():
    private = []
    for module in modules():
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and own(node.module or "") is not None:
                private += [
                    f"{module}: {a.name}" for a in node.names if a.name.startswith("_") and a.name != "__version__"
                ]
    assert private == []


def test_nothing_is_run_or_unpickled_that_others_may_have_written():
    assert [str(i) for i in imports() if i.imported.split(".")[0] in UNPICKLERS] == []
    found: dict[str, set[str]] = {name: set() for name in RUNS}
    for module in modules():
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in RUNS:
                found[name].add(module)
            assert not (
                isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
            )
    assert found == RUNS


@pytest.mark.parametrize("folder", ["recipefuzz", "tests", "studies"])
def test_no_file_is_a_junk_drawer(folder):
    words = {part for path in (ROOT / folder).rglob("*.py") for part in path.stem.split("_")}
    assert words & NAMELESS == set()


def test_top_level_shows_only_what_it_must():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    names = {path.split("/")[0] for path in listed.stdout.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP


IMPORTED = """
import json, sys
sys.argv = ["recipefuzz", "--help"]
try:
    {statement}
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
LIGHT = [
    # what is run, what it must not load
    ("from recipefuzz.cli import main; main()", {"torch", "optuna", "pandas", "numpy", "sklearn", "scipy", "pydantic"}),
    ("import recipefuzz", {"torch", "optuna", "pandas", "numpy", "typer", "pydantic", "yaml"}),
    ("import recipefuzz.config, recipefuzz.ranking", {"torch", "optuna", "pandas", "sklearn", "scipy"}),
    ("import recipefuzz.report.status", {"torch", "pandas", "sklearn"}),
]


@pytest.mark.parametrize(("statement", "heavy"), LIGHT, ids=[statement for statement, _ in LIGHT])
def test_what_is_light_loads_nothing_heavy(statement, heavy):
    code = IMPORTED.format(statement=statement)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    loaded = set(json.loads(ran.stdout.splitlines()[-1]))
    assert "recipefuzz" in loaded
    assert loaded & heavy == set()


def test_public_names_are_there():
    import recipefuzz

    assert sorted(recipefuzz.__all__) == sorted(recipefuzz._HOMES)
    for name in recipefuzz.__all__:
        home = recipefuzz._HOMES[name]
        tree = ast.parse((PACKAGE / f"{home.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{name} is not in {home}"
    with pytest.raises(AttributeError, match="module 'recipefuzz' has no attribute 'serach'"):
        recipefuzz.serach  # noqa: B018
