"""Targets: the user's code by import path, their data, their mistakes; scaling and the built-in losses."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from recipefuzz.engines.harmful_rows import harmful_rows
from recipefuzz.engines.rehearse import rehearse
from recipefuzz.errors import InputError, Place
from recipefuzz.targets.imported import load_callable, load_object
from recipefuzz.targets.losses import LOSSES, class_dim, cross_entropy_last, is_ambiguous
from recipefuzz.targets.resolve import resolve, user_files
from recipefuzz.targets.rows import as_rows, non_finite
from recipefuzz.targets.scaling import scaled
from recipefuzz.targets.task import DatasetRows, TensorRows, read_targets, some_rows

PLACE = Place("config.yaml", 2, "target.data")
AT_DATA, AT_MODEL, AT_LOSS = (
    r"config\.yaml:2: target\.data",
    r"config\.yaml:3: target\.model",
    r"config\.yaml:4: target\.loss",
)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# --- import paths


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("mine:one", {"mine": "def one(): return 1"}, 1),
        ("pack.mine:one", {"pack/__init__": "", "pack/mine": "def one(): return 2"}, 2),
        ("pack.sub.mine:one", {"pack/sub/mine": "def one(): return 3"}, 3),
        ("pack:one", {"pack/__init__": "from pack.inner import one", "pack/inner": "def one(): return 4"}, 4),
        ("mine:Box.one", {"mine": "class Box:\n    @staticmethod\n    def one(): return 5"}, 5),
        ("mine:Box.Inner.one", {"mine": "class Box:\n    class Inner:\n        one = lambda: 6"}, 6),
        ("mine:one", {"mine": "from beside import one", "beside": "def one(): return 7"}, 7),
    ],
)
def test_import_from_beside_the_config(tmp_path, path, files, expected):
    assert load_callable(path, write(tmp_path, files), PLACE)() == expected


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(
    ("path", "expected"), [("torch.nn:MSELoss", nn.MSELoss), ("torch:nn.functional.relu", functional.relu)]
)
def test_import_from_an_installed_package(tmp_path, path, expected):
    assert load_object(path, tmp_path, PLACE) is expected


@pytest.mark.usefixtures("user_modules")
def test_import_from_beside_the_config_comes_first(tmp_path):
    """An installed module of the same name is not taken, though it is on the path, and not in the first place."""
    write(tmp_path / "installed", {"namesake": "where = 'installed'"})
    sys.path.insert(0, str(tmp_path / "installed"))
    assert importlib.import_module("namesake").where == "installed"
    write(tmp_path / "here", {"namesake": "where = 'here'"})
    assert load_object("namesake:where", tmp_path / "here", PLACE) == "here"


@pytest.mark.usefixtures("user_modules")
def test_folders_with_modules_of_the_same_name(tmp_path):
    """Back and forth, the helper modules that they import among them; a module is run once a change of folder."""
    for name in ("a", "b"):
        files = {"case": f"import extra\nwhere = '{name}' + extra.where", "extra": f"where = '{name}'"}
        write(tmp_path / name, files)
    seen = [load_object("case:where", tmp_path / name, PLACE) for name in ("a", "b", "a", "a", "b")]
    assert seen == ["aa", "bb", "aa", "aa", "bb"]


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize("loose", [False, True])
def test_packages_of_the_same_name_in_two_folders(tmp_path, loose):
    for name in ("a", "b"):
        files = {"pack/case": "from pack import deep\nwhere = deep.where", "pack/deep": f"where = '{name}'"}
        write(tmp_path / name, files if loose else files | {"pack/__init__": ""})
    seen = [load_object("pack.case:where", tmp_path / name, PLACE) for name in ("a", "b", "a")]
    assert seen == ["a", "b", "a"]


@pytest.mark.usefixtures("user_modules")
def test_a_module_is_not_run_again_by_the_same_folder(tmp_path):
    code = "import sys\nsys.runs_of_counted = getattr(sys, 'runs_of_counted', 0) + 1\none = two = 1"
    write(tmp_path, {"counted": code})
    try:
        load_object("counted:one", tmp_path, PLACE)
        load_object("counted:two", tmp_path, PLACE)
        assert sys.runs_of_counted == 1
    finally:
        del sys.runs_of_counted


BAD_PATHS = [
    ("mine:", {"mine": ""}, "not an import path", r'expected: "module:name", such as "train:build_model"'),
    (":build", {}, "not an import path", "found:    :build"),
    ("mien:build", {"mine": ""}, "no module named 'mien'", "fix:      did you mean 'mine'?"),
    ("pakc.mine:build", {"pack/__init__": ""}, "no module named 'pakc'", "fix:      did you mean 'pack'?"),
    (
        "pack.mien:build",
        {"pack/__init__": "", "pack/mine": ""},
        "no module named 'pack.mien'",
        "did you mean 'pack.mine'?",
    ),
    ("nowhere_at_all:build", {}, "no module named 'nowhere_at_all'", "fix:      put the file beside the config"),
    ("mine.py:build", {"mine": ""}, "no module named 'mine.py'", "fix:      did you mean 'mine:build'?"),
    ("pack/mine.py:build", {"pack/mine": ""}, "no module named", "fix:      did you mean 'pack.mine:build'?"),
    ("mine:biuld", {"mine": "def build(): ..."}, "mine has no 'biuld'", "fix:      did you mean mine:build?"),
    ("mine:build", {"mine": "def f(): ...\ndef g(): ..."}, "mine has no 'build'", "fix:      it defines: f, g"),
    ("mine:Box.maek", {"mine": "class Box:\n    make = 1"}, "mine:Box has no 'maek'", "did you mean mine:Box.make?"),
    ("mine:build", {"mine": "build = 3"}, "not a function", "expected: mine:build to be callable"),
    ("random:build", {"random": "def build(): ..."}, "random.py has the name of a module of Python itself", "rename"),
    ("torch:build", {"torch": "def build(): ..."}, "torch.py has the name of an installed package", "rename"),
]


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(("path", "files", "problem", "shown"), BAD_PATHS)
def test_bad_import_path(tmp_path, path, files, problem, shown):
    with pytest.raises(InputError, match=rf"^config\.yaml:2: target\.data: {re.escape(problem)}") as caught:
        load_callable(path, write(tmp_path, files), PLACE)
    assert shown in str(caught.value)
    assert caught.value.exit_code == 2


RAISING = [
    ("x = 1\ny = x / 0\n", "ZeroDivisionError", 'mine.py", line 2', "y = x / 0"),
    ("import missing_dependency\n", "ModuleNotFoundError", 'mine.py", line 1', "import missing_dependency"),
    ("from mine_too import it\n", "ImportError", 'mine.py", line 1', "from mine_too import it"),
    ("def f(:\n", "SyntaxError", 'mine.py", line 1', "def f(:"),
    ("import json\njson.loads('{')\n", "JSONDecodeError", 'mine.py", line 2', "json.loads('{')"),
    ("import sys\nsys.exit(3)\n", "SystemExit", 'mine.py", line 2', "sys.exit(3)"),
    ("import helper_that_raises\n", "RuntimeError", 'helper_that_raises.py", line 2', "raise RuntimeError('deep')"),
]


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(("code", "kind", "spot", "line"), RAISING)
def test_a_module_that_raises_shows_the_users_own_traceback(tmp_path, code, kind, spot, line):
    helper = "def f(): ...\nraise RuntimeError('deep')\n"
    write(tmp_path, {"mine": code, "mine_too": "", "helper_that_raises": helper})
    with pytest.raises(InputError, match=rf"target\.data: importing mine raised {kind}") as caught:
        load_object("mine:build", tmp_path, PLACE)
    shown = caught.value.detail
    assert spot in shown
    assert line in shown
    assert "recipefuzz" not in shown
    assert "importlib" not in shown
    assert "json/decoder" not in shown


def test_the_place_of_each_key(write_study):
    for key, line in (("data", 2), ("model", 3), ("loss", 4)):
        config = write_study(**{key: "case:absent"})
        with pytest.raises(InputError, match=rf"config\.yaml:{line}: target\.{key}: case has no 'absent'"):
            resolve(config)


def test_a_script_that_calls_recipefuzz_when_it_is_imported(write_study):
    config = write_study(
        """
from pathlib import Path
from recipefuzz.config import load_config
from recipefuzz.targets.resolve import resolve
resolve(load_config(Path(__file__).with_name("config.yaml")))
"""
    )
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"target\.data: importing case calls recipefuzz, which imports it"
        ) as caught:
            resolve(config)
        assert 'fix:      put the call under: if __name__ == "__main__":' in str(caught.value)


@pytest.mark.parametrize(
    ("key", "word", "near"),
    [("data", "digit", "digits"), ("model", "mpl", "mlp"), ("loss", "cross_entrop", "cross_entropy")],
)
def test_unknown_built_in_name(write_study, key, word, near):
    config = write_study(**{key: word})
    with pytest.raises(InputError, match=rf"target\.{key}: no built-in .* of that name(.|\n)*did you mean '{near}'\?"):
        resolve(config)


# --- data in every form


class Lazy(Dataset):
    """Rows made when they are asked for; remembers which were."""

    def __init__(self, rows, make):
        self.rows, self.make, self.asked = rows, make, []

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        self.asked.append(i)
        return self.make(i)


def rows_of(x, y):
    return as_rows((x, y, x, y), PLACE)[0]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.ones((4, 2)), torch.float32),
        (np.ones((4, 2), np.float32), torch.float32),
        (np.ones((4, 2), np.float16), torch.float32),
        (np.ones((4, 2), ">f8"), torch.float32),
        (np.ones((4, 2), np.int32), torch.int64),
        (np.ones((4, 2), np.uint8), torch.int64),
        (np.ones((4, 2), bool), torch.bool),
        ([[1.5, 2.5]] * 4, torch.float32),
        ([[1, 2]] * 4, torch.int64),
        (torch.ones(4, 2, dtype=torch.float64), torch.float64),
        (torch.ones(4, 2, dtype=torch.bfloat16), torch.bfloat16),
        (torch.ones(4, 2, dtype=torch.int32), torch.int32),
    ],
)
def test_arrays_become_tensors_and_tensors_stay(given, dtype):
    rows = rows_of(given, given)
    assert (rows.x.dtype, rows.y.dtype) == (dtype, dtype)
    assert rows.x.shape == (4, 2)
    assert torch.equal(
        rows.x.double(),
        torch.as_tensor(np.asarray(given, float) if not isinstance(given, torch.Tensor) else given).double(),
    )


def test_awkward_arrays():
    backwards, locked = np.arange(8.0).reshape(4, 2)[::-1], np.arange(8.0, dtype=np.float32).reshape(4, 2)
    locked.flags.writeable = False  # as of a memory map opened to be read
    assert rows_of(backwards, locked).x[0].tolist() == [6, 7]
    assert rows_of(backwards, locked).y[0].tolist() == [0, 1]


def test_data_that_need_a_gradient_lose_it():
    x = torch.ones(4, 2, requires_grad=True) * 2
    assert not rows_of(x, x).x.requires_grad


def test_tensor_datasets_are_kept_whole():
    data = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3))
    train, test = as_rows((data, data), PLACE)
    assert isinstance(train, TensorRows)
    assert isinstance(test, TensorRows)
    x, y = train.take(torch.tensor([2, 0, 2]))
    assert (x.tolist(), y.tolist()) == ([[4, 5], [0, 1], [4, 5]], [2, 0, 2])


@pytest.mark.parametrize(
    ("row", "dtypes"),
    [
        (lambda i: (torch.full((2,), float(i)), torch.tensor(i)), (torch.float32, torch.int64)),
        (lambda i: (np.full(2, float(i)), i), (torch.float32, torch.int64)),
        (lambda i: (np.full(2, i, np.float32), float(i)), (torch.float32, torch.float32)),
        (lambda i: (np.full(2, i), np.float64(i)), (torch.int64, torch.float32)),
        (lambda i: [torch.full((2,), i, dtype=torch.float64), torch.tensor([i])], (torch.float64, torch.int64)),
    ],
)
def test_lazy_datasets_give_what_arrays_give(row, dtypes):
    """Python's and numpy's numbers have 64 bits and no meaning by it: a model's weights have 32."""
    data = Lazy(5, row)
    train, _ = as_rows((data, data), PLACE)
    assert isinstance(train, DatasetRows)
    assert len(train) == 5
    assert data.asked == []
    x, y = train.take(torch.tensor([3, 3, 1]))
    assert (x.dtype, y.dtype) == dtypes
    assert (x[:, 0].tolist(), y.flatten().tolist()) == ([3, 3, 1], [3, 3, 1])
    assert data.asked == [3, 3, 1]


def test_datasets_of_several_inputs():
    data = Lazy(5, lambda i: ({"a": torch.tensor(i), "b": (1.5, "word")}, i))
    x, y = as_rows((data, data), PLACE)[0].take(torch.tensor([1, 4]))
    assert x["a"].tolist() == y.tolist() == [1, 4]
    assert x["b"][0].dtype is torch.float32
    assert list(x["b"][1]) == ["word", "word"]


FORMS = {
    "tensors": "x, y, x, y",
    "arrays": "x.double().numpy(), y.double().numpy(), x.numpy(), y.numpy()",
    "datasets": "TensorDataset(x, y), TensorDataset(x, y)",
    "lazy": "Lazy(x, y), Lazy(x, y)",
}


@pytest.mark.parametrize("returned", FORMS.values(), ids=FORMS)
def test_every_form_of_data_trains(write_study, returned):
    config = write_study(
        f"""
from torch.utils.data import Dataset, TensorDataset

class Lazy(Dataset):
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i].double().numpy(), self.y[i].double().numpy()

first = load

def load():
    x, y, *_ = first()
    return {returned}
"""
    )
    task = resolve(config)
    _, y, *_ = sys.modules["case"].first()
    assert rehearse(task, config) == pytest.approx(float(y.var(correction=0)), rel=1e-5)


# --- values that are not finite may be harmless: the model and the loss tell

MASKED = """
def loss(output, target):
    kept = target.isfinite()
    return ((output - target)[kept] ** 2).mean()
class Masked(nn.Linear):
    def forward(self, x): return super().forward(x.masked_fill(~x.isfinite(), 0.0))
def spoiled(*rows, side, value=float("nan"), test=False):
    def load():
        x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
        y = x.sum(1, keepdim=True)
        (x, y)[side][list(rows)] = value
        return x[:40], y[:40], x[40:], y[40:]
    return load
"""
MASKING, PLAIN = "def build(): return Masked(3, 1)\n", "def build(): return nn.Linear(3, 1)\n"
UNHEALTHY = "class build(Masked):\n    def forward(self, x): return super().forward(x) / 0 * 0\n"
BROKEN = "class build(Masked):\n    def forward(self, x): return x.absent\n"
CHECKING = "class build(nn.Linear):\n    def __init__(self): super().__init__(3, 1)\n    def forward(self, x):\n        if x.isnan().any(): raise ValueError('NaN')\n        return super().forward(x)\n"
HARM = {
    # the model, what load() returns, the loss, which side does harm
    "labels that the loss leaves out": (PLAIN, "5, 7, side=1", "case:loss", None),
    "labels of every row but one": (PLAIN, "*range(39), side=1", "case:loss", None),
    "held-out labels that the loss leaves out": (PLAIN, "41, side=1", "case:loss", None),
    "labels that a built-in loss takes": (PLAIN, "5, side=1", "mse", "y_train"),
    "held-out labels that a built-in loss takes": (PLAIN, "45, side=1", "mse", "y_test"),
    "inputs that the model masks": (MASKING, "5, side=0, value=-float('inf')", "mse", None),
    "inputs of every row, masked": (MASKING, "*range(48), side=0", "case:loss", None),
    "inputs of every row": (PLAIN, "*range(48), side=0", "case:loss", "x_train"),
    "inputs that nothing masks": (PLAIN, "5, side=0", "case:loss", "x_train"),
    "held-out inputs that nothing masks": (PLAIN, "44, side=0, value=float('inf')", "case:loss", "x_test"),
    "inputs that make the model raise": (CHECKING, "5, side=0", "mse", "x_train"),
    "a model that is not finite on healthy rows": (UNHEALTHY, "5, side=0", "mse", None),
    "a model that raises on healthy rows": (BROKEN, "5, side=0", "mse", None),
}


@pytest.mark.parametrize(("model", "spoil", "loss", "expected"), HARM.values(), ids=HARM)
def test_whether_values_that_are_not_finite_do_harm(write_study, model, spoil, loss, expected):
    config = write_study(MASKED + model + f"load = spoiled({spoil})\n", loss=loss)
    before = torch.get_rng_state()
    task = resolve(config)
    assert task.non_finite
    for scale in (1.0, 1e30):  # an overflow of the recipe is none of the data
        finding = harmful_rows(task, config.default_recipe().but(init_scale=scale), 0)
        assert (finding.name if finding else None) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("more", ["", "recipe: {input_norm: standardize, target_norm: minmax}\n"])
@pytest.mark.parametrize(
    "spoil", ["5, 7, side=1", "*range(0, 48, 2), side=1", "5, side=0", "41, side=0, value=-float('inf')"]
)
def test_harmless_values_leave_baseline_and_step_finite(write_study, spoil, more):
    config = write_study(MASKED + MASKING + f"load = spoiled({spoil})\n", more, loss="case:loss")
    task = resolve(config)
    y = scaled(task.train, task.test, "none", config.default_recipe().target_norm)[0].y
    expected = float(y[y.isfinite()].var(correction=0))
    assert rehearse(task, config) == pytest.approx(expected, rel=0.15)  # batches of 64 of 40 rows


@pytest.mark.parametrize("how", ["standardize", "minmax"])
def test_scaling_is_by_the_finite_values(how):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    holes = torch.cat([x, torch.full((2, 3), torch.nan)])
    holes[41, 1], holes[:, 2] = -torch.inf, torch.nan
    (whole, _), (rows, _) = (scaled(TensorRows(v, v), TensorRows(v, v), how, "none") for v in (x, holes))
    torch.testing.assert_close(rows.x[:40, :2], whole.x[:, :2])
    assert torch.equal(rows.x.isfinite(), holes.isfinite())
    assert rows.x[41, 1] == -torch.inf


def test_some_rows_stay_inside_where_float32_counts_in_twos():
    class Rows:
        def __len__(self):
            return 2**24 + 4

    index = some_rows(Rows(), 1000)
    assert (int(index[0]), int(index[-1]), len(index.unique())) == (0, 2**24 + 3, 1000)
    assert some_rows(rows_of(np.ones((7, 1)), np.ones(7)), 9).tolist() == list(range(7))


# --- data that can't be trained on: (code, loss, place, problem, what else is shown)

LOADED = "def load(): return "
ONES = "torch.ones(4, 3)"
LABELS = "torch.tensor([0, 1, 2, 3])"
DATASET = """
from torch.utils.data import Dataset, IterableDataset
class Mine(Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): {}
def load(): return Mine(), Mine()
"""

BAD_DATA = [
    ("pair", LOADED + f"{ONES}, {ONES}", "mse", "load() returned something else", "found:    (Tensor, Tensor)"),
    ("three", LOADED + f"{ONES}, {ONES}, {ONES}", "mse", "load() returned something else", "(x_train, y_train, x_test, y_test)"),
    ("nothing", "def load(): pass", "mse", "load() returned something else", "NoneType"),
    ("a dict", LOADED + "{'x': 1}", "mse", "load() returned something else", "<class 'dict'>"),
    ("words", LOADED + "['a'], [1], ['b'], [2]", "mse", "load() returned something that is no tensor", "expected: (x_train"),
    ("ragged", LOADED + "[[1], [1, 2]], [1, 2], [[1]], [1]", "mse", "load() returned something that is no tensor", "<class 'list'>"),
    ("a number", LOADED + f"torch.tensor(1.), {ONES}, {ONES}, {ONES}", "mse", "x_train or y_train is a single number", "expected:"),
    ("no rows", LOADED + f"{ONES}[:0], {ONES}[:0], {ONES}, {ONES}", "mse", "the train data have no rows", "fix:      look at the split"),
    ("no test rows", LOADED + f"{ONES}, {ONES}, {ONES}[:0], {ONES}[:0]", "mse", "the test data have no rows", "expected: at least one row"),
    ("lengths", LOADED + f"{ONES}, {ONES}[:3], {ONES}, {ONES}", "mse", "inputs and targets of different lengths", "x_train has 4 rows, y_train has 3"),
    ("test lengths", LOADED + f"{ONES}, {ONES}, {ONES}, {ONES}[:1]", "mse", "inputs and targets of different lengths", "x_test has 4 rows, y_test has 1"),
    ("exits", "import sys\ndef load():\n    sys.exit('no data')", "mse", "loading case:load raised SystemExit", "SystemExit: no data"),
    ("raises", "def load():\n    return open('absent.csv')", "mse", "loading case:load raised FileNotFoundError", "return open('absent.csv')"),
    ("iterable", DATASET.format("...").replace("Mine(Dataset):", "Mine(IterableDataset):\n    def __iter__(self): ..."), "mse", "the train Dataset has no length", "a map-style Dataset with __len__ and __getitem__"),
    ("no dataset rows", DATASET.format("...").replace("return 6", "return 0"), "mse", "the train data have no rows", "expected: at least one row"),
    ("rows of three", DATASET.format("return 1., 2., 3."), "mse", "reading the train Dataset raised ValueError", "a row of the Dataset is a tuple of 3, expected a pair: (input, target)"),
    ("rows of one", DATASET.format("return torch.ones(2)"), "mse", "reading the train Dataset raised ValueError", "a row of the Dataset is a Tensor of 2, expected a pair"),
    ("rows of names", DATASET.format("return {'x': 1., 'y': 2.}"), "mse", "reading the train Dataset raised ValueError", "a row of the Dataset is a dict of 2, expected a pair"),
    ("rows that are numbers", DATASET.format("return 1."), "mse", "reading the train Dataset raised ValueError", "a row of the Dataset is a float, expected a pair"),
    ("rows that raise", DATASET.format("return [][i]"), "mse", "reading the train Dataset raised IndexError", "return [][i]"),
    ("rows of many lengths", DATASET.format("return torch.ones(i + 1), 1."), "mse", "reading the train Dataset raised RuntimeError", "equal size"),
    ("single class", LOADED + f"{ONES}, {LABELS} * 0 + 2, {ONES}, {LABELS}", "cross_entropy", "every training target is the same", "y_train is 2 in all 4 rows"),
    ("one number", LOADED + f"{ONES}, {ONES}, {ONES}, {ONES} * 2", "mse", "every training target is the same", "y_train is [1.0, 1.0, 1.0] in all 4 rows"),
    ("labels for mse", LOADED + f"{ONES}, {LABELS}, {ONES}, {LABELS}", "mse", "mse needs targets that are numbers", "fix:      loss: cross_entropy for class labels, or convert the targets with .float()"),
    ("numbers for classes", LOADED + f"{ONES}, {LABELS}.float(), {ONES}, {LABELS}.float()", "cross_entropy", "class labels must be integers", "fix:      convert the targets with .long(), or use loss: mse"),
    ("bce outside", LOADED + f"{ONES}, {LABELS}.float() - 1, {ONES}, {LABELS}.float()", "bce", "bce needs targets of 0 to 1", "found:    -1 to 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "loss", "problem", "shown"), [row[1:] for row in BAD_DATA], ids=[row[0] for row in BAD_DATA]
)
def test_bad_data(write_study, code, loss, problem, shown):
    with pytest.raises(InputError, match=rf"{AT_DATA}: {re.escape(problem)}") as caught:
        resolve(write_study(code, loss=loss))
    assert shown in str(caught.value)
    assert "recipefuzz/" not in str(caught.value)


NON_FINITE = [
    ("x[7, 1] = float('nan')", "x_train", "row 7, column 1", "nan; 1 such value in 1 row"),
    ("x[7:9] = float('inf'); x[30, 2] = float('nan')", "x_train", "row 7, column 0", "inf; 7 such values in 3 rows"),
    ("y[39, 0] = -float('inf')", "y_train", "row 39, column 0", "-inf; 1 such value in 1 row"),
    ("x[43, 2] = float('nan')", "x_test", "row 3, column 2", "nan; 1 such value in 1 row"),
    ("y = y[:, 0]; y[5] = float('nan')", "y_train", "row 5 ", "nan; 1 such value in 1 row"),
    ("x = x[:, :, None].repeat(1, 1, 2); x[4, 1, 1] = float('nan')", "x_train", "row 4, column 1, 1", "nan; 1 such"),
]


@pytest.mark.parametrize(("spoil", "name", "spot", "count"), NON_FINITE)
def test_values_that_are_not_finite_are_found_before_training(write_study, spoil, name, spot, count):
    code = f"""
def load():
    x = torch.zeros(48, 3); y = torch.arange(48.)[:, None]
    {spoil}
    return x[:40], y[:40], x[40:], y[40:]
def build(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
"""
    config = write_study(code)
    task = resolve(config)
    problem = f"{name} holds a value that is not finite: {spot}"
    with pytest.raises(InputError, match=rf"{AT_DATA}: {re.escape(problem)}.*counted from 0") as caught:
        rehearse(task, config)
    assert f"found:    {count}" in str(caught.value)
    assert "fix:      drop or fill those rows in load()" in str(caught.value)


def test_values_of_a_lazy_dataset_that_are_not_finite():
    data = Lazy(5000, lambda i: (torch.tensor([0.0, float("nan") if i in (4500, 4700) else 1.0]), i))
    rows, _ = as_rows((data, data), PLACE)
    (found,) = non_finite(rows, "train")
    error = found.error(PLACE)
    assert "config.yaml:2: target.data: x_train holds a value that is not finite: row 4500, column 1" in str(error)
    assert "nan; 2 such values in 2 rows" in str(error)
    assert (found.rows, found.total_rows, found.column, found.count) == ((4500, 4700), 2, (1,), 2)
    assert math.isnan(found.value)
    assert non_finite(as_rows((Lazy(4000, data.make), data), PLACE)[0], "train") == ()


def test_a_finding_counts_all_rows_and_names_the_first_thousand():
    rows = rows_of(np.where(np.arange(200_000) % 2, np.inf, 0.0), np.full((200_000, 2), np.nan))
    of_x, of_y = non_finite(rows, "test")
    assert (of_x.name, of_x.row, of_x.column, of_x.value, of_x.count) == ("x_test", 1, (), math.inf, 100_000)
    assert (of_x.rows, of_x.total_rows) == (tuple(range(1, 2001, 2)), 100_000)
    assert (of_y.name, of_y.row, of_y.column, of_y.count, of_y.total_rows) == ("y_test", 0, (0,), 400_000, 200_000)
    assert of_y.rows == tuple(range(1000))


# --- models and losses that don't fit: (code, more of the config, loss, place, problem, what else is shown)

BAD_CODE = [
    ("unknown axis", "", "recipe: {widht: 3}\n", "mse", r"config\.yaml:5: recipe\.widht", "nothing takes the axis 'widht'", "fix:      did you mean 'width'?"),
    ("unknown searched axis", "", "space:\n  widht: [3, 4]\n", "mse", r"config\.yaml:6: space\.widht", "nothing takes the axis 'widht'", "an argument of the model factory case:build (width)"),
    ("mistyped recipe axis", "", "recipe: {clip_nrom: 3}\n", "mse", r"config\.yaml:5: recipe\.clip_nrom", "nothing takes the axis 'clip_nrom'", "did you mean 'clip_norm'?"),
    ("another library's name", "", "recipe: {learning_rate: 3}\n", "mse", r"config\.yaml:5: recipe\.learning_rate", "nothing takes the axis 'learning_rate'", "did you mean 'lr'?"),
    ("factory without arguments", "def build(): return nn.Linear(3, 1)", "recipe: {depth: 3}\n", "mse", r"config\.yaml:5: recipe\.depth", "nothing takes the axis 'depth'", "(it takes none)"),
    ("axis and model_args", "", "  model_args: {width: 3}\nrecipe: {width: 4}\n", "mse", r"config\.yaml:6: recipe\.width", "width is an axis and stands in target.model_args", "fix:      keep one of them"),
    ("unknown model_args", "", "  model_args:\n    widht: 3\n", "mse", r"config\.yaml:6: target\.model_args\.widht", "case:build takes no argument 'widht'", "fix:      did you mean 'width'?"),
    ("unknown data_args", "", "  data_args: {rows: 3}\n", "mse", r"config\.yaml:5: target\.data_args\.rows", "case:load takes no argument 'rows'", "expected: no arguments"),
    ("kwargs passed on", "def build(**more): return nn.Linear(3, 1, **more)", "recipe: {widht: 3}\n", "mse", AT_MODEL, "building the model raised TypeError", "return nn.Linear(3, 1, **more)"),
    ("missing argument", "def build(width): return nn.Linear(3, width)", "", "mse", AT_MODEL, "building the model raised TypeError", "fix:      model_args: {width: ...} under target"),
    ("missing arguments", "def build(width, *, depth): return nn.Linear(3, width)", "", "mse", AT_MODEL, "building the model raised TypeError", "model_args: {width: ...} under target"),
    ("missing inside", "def build(): return nn.Linear(3)", "", "mse", AT_MODEL, "building the model raised TypeError", "return nn.Linear(3)"),
    ("no module", "def build(): return [nn.Linear(3, 1)]", "", "mse", AT_MODEL, "the model factory returned a list, not a torch.nn.Module", ""),
    ("forgotten return", "def build(): nn.Linear(3, 1)", "", "mse", AT_MODEL, "the model factory returned None (is a `return` missing?), not a torch.nn.Module", ""),
    ("factory raises", "def build():\n    return nn.Linear(3, absent)", "", "mse", AT_MODEL, "building the model raised NameError", "return nn.Linear(3, absent)"),
    ("no parameters", "def build(): return nn.Flatten()", "", "mse", AT_MODEL, "the model has no parameters to train", "found:    Flatten"),
    ("all frozen", "def build(): return nn.Linear(3, 1).requires_grad_(False)", "", "mse", AT_MODEL, "the model has no parameters to train", "requires_grad"),
    ("shape", "def build(): return nn.Linear(5, 1)", "", "mse", AT_MODEL, "the model, given x of shape (40, 3), raised RuntimeError", "mat1 and mat2 shapes cannot be multiplied (40x3 and 5x1)"),
    ("outputs", "def build(): return nn.Linear(3, 2)", "", "mse", AT_LOSS, "the model's output has shape (40, 2), the target (40, 1)", "fix:      give the model 1 output a row"),
    ("bce outputs", "def load(): return torch.rand(8, 3), torch.eye(8)[:, :3], torch.rand(8, 3), torch.eye(8)[:, :3]\ndef build(): return nn.Linear(3, 2)", "", "bce", AT_LOSS, "the model's output has shape (8, 2), the target (8, 3)", "expected: an output of shape (8, 3)\n  fix:      give the model 3 outputs a row"),
    ("a tuple for mse", "class build(nn.Linear):\n    def __init__(self): super().__init__(3, 1)\n    def forward(self, x): return super().forward(x), x", "", "mse", AT_LOSS, "mse needs a model whose output is one tensor", "found:    <class 'tuple'>"),
    ("as many positions as classes", "def load():\n    x = torch.randn(8, 4); y = torch.arange(32).reshape(8, 4) % 3\n    return x, y, x, y\ndef build(): return nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 4)))", "", "cross_entropy", AT_LOSS, "which dimension of the output holds the classes? Both have 4", "fix:      def loss(output, target): return torch.nn.functional.cross_entropy(output.flatten(0, 1)"),
    ("the same model", "NET = nn.Linear(3, 1)\ndef build(): return NET", "", "mse", AT_MODEL, "case:build() must return a fresh model that depends on nothing but the seed", "found:    two calls return the same parameter weight"),
    ("a shared part", "BODY = nn.Linear(3, 5)\ndef build(): return nn.Sequential(BODY, nn.Linear(5, 1))", "", "mse", AT_MODEL, "case:build() must return a fresh model", "the same parameter 0.weight"),
    ("a shared storage", "FLAT = torch.zeros(4)\ndef build():\n    net = nn.Linear(3, 1)\n    net.weight = nn.Parameter(FLAT[:3].view(1, 3))\n    return net", "", "mse", AT_MODEL, "case:build() must return a fresh model", "the same parameter weight"),
    ("a counter", "CALLS = []\ndef build():\n    CALLS.append(1)\n    net = nn.Linear(3, 1)\n    nn.init.constant_(net.weight, len(CALLS))\n    return net", "", "mse", AT_MODEL, "case:build() must return a fresh model", "found:    the initial parameters differ in two calls with the seed 0"),
    ("norm choice", "", "space:\n  norm:\n    - null\n    - batch\n", "mse", r"config\.yaml:8: space\.norm\[1\]", "norm = 'batch': the model factory takes no `norm` argument", "leave 'batch' out of the axis"),
    ("norm choice that raises", "def build(norm='none'):\n    return {'none': nn.Linear(3, 1)}[norm]", "space:\n  norm: [none, rms]\n", "mse", r"config\.yaml:6: space\.norm\[1\]", "norm = 'rms': the default recipe with this value raised KeyError", "return {'none': nn.Linear(3, 1)}[norm]"),
    ("input_norm choice", "def load():\n    x = torch.arange(40).reshape(8, 5)\n    return x, x[:, 0] % 2, x, x[:, 0] % 2\ndef build(): return nn.Sequential(nn.Embedding(40, 2), nn.Flatten(), nn.Linear(10, 2))", "space:\n  input_norm: [none, standardize]\n", "cross_entropy", r"config\.yaml:6: space\.input_norm\[1\]", "input_norm = 'standardize': standardize needs floating-point values", "leave it at none"),
    ("target_norm choice", "def load(): return torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Linear(3, 4)", "space:\n  target_norm: [none, minmax]\n", "cross_entropy", r"config\.yaml:6: space\.target_norm\[1\]", "target_norm = 'minmax': minmax needs floating-point values", "class labels"),
    ("precision choice", "def loss(o, y):\n    return (o.view(torch.int32).float() * 0 + (o - y) ** 2).mean() if o.dtype == torch.float32 else o.absent", "space:\n  precision: [fp32, bf16]\n", "case:loss", r"config\.yaml:6: space\.precision\[1\]", "precision = 'bf16': the default recipe with this value raised AttributeError", "o.absent"),
    ("norm of nothing", "", "recipe: {norm: batch}\n", "mse", AT_MODEL, "norm = 'batch': the model factory takes no `norm` argument, and the model has no normalization layers", "add a `norm` argument"),
    ("token scaling", "def load():\n    x = torch.arange(40).reshape(8, 5)\n    return x, x[:, 0] % 2, x, x[:, 0] % 2", "space:\n  input_norm: [standardize, none]\n", "cross_entropy", r"config\.yaml:6: space\.input_norm", "standardize needs floating-point values, but these are torch.int64", "leave it at none"),
    ("label scaling", "def load(): return torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Linear(3, 4)", "recipe:\n  lr: 1\n  target_norm: minmax\n", "cross_entropy", r"config\.yaml:7: recipe\.target_norm", "minmax needs floating-point values, but these are torch.int64", "class labels"),
    ("labels above", "def load(): return torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Linear(3, 3)", "", "cross_entropy", AT_MODEL, "a label outside the model's 3 classes", "y_train: label 3 in row 3; 1 such labels"),
    ("labels below", "def load(): return torch.ones(4, 3), torch.arange(4) - 1, torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Linear(3, 4)", "", "cross_entropy", AT_MODEL, "a label outside the model's 4 classes", "y_train: label -1 in row 0; 1 such labels"),
    ("labels from 1", "def load(): return torch.ones(4, 3), torch.arange(4) + 1, torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Linear(3, 4)", "", "cross_entropy", AT_MODEL, "a label outside the model's 4 classes", "fix:      give the model 5 outputs, or renumber the labels from 0"),
    ("test labels", "def load(): return torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), torch.arange(4) * 9\ndef build(): return nn.Linear(3, 4)", "", "cross_entropy", AT_MODEL, "a label outside the model's 4 classes", "y_test: label 9 in row 1; 3 such labels"),
    ("labels by position", "def load(): return torch.ones(4, 3), torch.arange(12).reshape(4, 3), torch.ones(4, 3), torch.arange(12).reshape(4, 3)\ndef build(): return nn.Sequential(nn.Linear(3, 30), nn.Unflatten(1, (3, 10)))", "", "cross_entropy", AT_MODEL, "a label outside the model's 10 classes", "y_train: label 10 in row 3; 2 such labels"),
    ("no logits", "def load(): return torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), torch.arange(4)\ndef build(): return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))", "", "cross_entropy", AT_MODEL, "cross_entropy needs logits", "found:    output (4,)"),
    ("loss by row", "def loss(o, y): return ((o - y) ** 2).mean(1)", "", "case:loss", AT_LOSS, "the loss is not scalar", "fix:      end it with .mean()"),
    ("loss a number", "def loss(o, y): return ((o - y) ** 2).mean().item()", "", "case:loss", AT_LOSS, "the loss is not scalar", "found:    float\n  expected: one number per batch\n  fix:      return the tensor, not .item()"),
    ("loss of nothing", "def loss(o, y): ((o - y) ** 2).mean()", "", "case:loss", AT_LOSS, "the loss is not scalar", "fix:      is a `return` missing?"),
    ("loss detached", "def loss(o, y): return ((o.detach() - y) ** 2).mean()", "", "case:loss", AT_LOSS, "the loss does not depend on the model's parameters", "fix:      look for .detach(), .item() or torch.no_grad()"),
    ("loss raises", "def loss(o, y):\n    return (o @ y).mean()", "", "case:loss", AT_LOSS, "the loss, given output of shape (40, 1) and target of shape (40, 1), raised RuntimeError", "return (o @ y).mean()"),
    ("loss of one argument", "def loss(o): return o.mean()", "", "case:loss", AT_LOSS, "the loss, given output of shape (40, 1) and target of shape (40, 1), raised TypeError", "takes 1 positional argument but 2 were given"),
    ("loss class with arguments", "class Loss(nn.Module):\n    def __init__(self, gamma): super().__init__()", "", "case:Loss", AT_LOSS, "making a case:Loss raised TypeError", "missing 1 required positional argument: 'gamma'"),
    ("loss class of no module", "class Loss: pass", "", "case:Loss", AT_LOSS, "a class that is no torch.nn.Module", "found:    case:Loss"),
    ("backward raises", "class Bad(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x): return x * 1\n    @staticmethod\n    def backward(ctx, g): return g.absent\ndef loss(o, y): return Bad.apply(o).mean()", "", "case:loss", AT_LOSS, "the backward pass raised AttributeError", "return g.absent"),
    ("test set of another shape", "def load(): return torch.ones(4, 3), torch.arange(4.), torch.ones(5, 2), torch.arange(5.)", "", "mse", AT_DATA, "an evaluation, given the test set's x of shape (5, 2) and y of shape (5,), raised RuntimeError", "(5x2 and 3x4)"),
    ("test targets of another shape", "def load(): return torch.ones(4, 3), torch.arange(4.), torch.ones(5, 3), torch.ones(5, 2)", "", "mse", AT_DATA, "the model's output has shape (5, 1), the target (5, 2)", ""),
    ("loss without a baseline", "def loss(o, y): return (o / o.std()).mean()", "", "case:loss", AT_LOSS, "the loss is not finite for any constant output", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "more", "loss", "place", "problem", "shown"),
    [row[1:] for row in BAD_CODE],
    ids=[row[0] for row in BAD_CODE],
)
def test_bad_code(write_study, code, more, loss, place, problem, shown):
    config = write_study(code, more, loss=loss)
    with pytest.raises(InputError, match=rf"{place}: {re.escape(problem)}") as caught:
        rehearse(resolve(config), config)
    assert shown in str(caught.value)
    assert "recipefuzz/engines" not in str(caught.value)
    assert "recipefuzz/targets" not in str(caught.value)


def test_labels_of_a_large_dataset_are_named_by_their_row(write_study):
    config = write_study(
        """
from torch.utils.data import Dataset
class Mine(Dataset):
    def __len__(self): return 25_000
    def __getitem__(self, i): return torch.zeros(3), 7 if i == 24_999 else i % 2
def load(): return Mine(), Mine()
def build(): return nn.Linear(3, 2)
""",
        loss="cross_entropy",
    )
    task = resolve(config)
    with pytest.raises(InputError, match=r"a label outside the model's 2 classes(.|\n)*label 7 in row 24999"):
        rehearse(task, config)


def test_targets_that_are_no_tensor_meet_a_built_in_loss(write_study):
    config = write_study(
        """
from torch.utils.data import Dataset
class Mine(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.zeros(3), {"label": i}
def load(): return Mine(), Mine()
""",
        loss="cross_entropy",
    )
    task = resolve(config)
    with pytest.raises(
        InputError, match=rf"{AT_LOSS}: the loss, given output of shape \(8, 1\) and target of shape dict, raised"
    ):
        rehearse(task, config)


def test_positions_and_classes_of_a_built_in_model_are_not_confused(write_study):
    code = """
def load():
    x = torch.arange(36).reshape(9, 4) * 7 % 5 % 4
    return x, x.roll(1, 1), x, x.roll(1, 1)
"""
    config = write_study(code, model="gru", loss="cross_entropy")
    assert rehearse(resolve(config), config) > 0


def test_choices_that_are_no_fault(write_study):
    """The factory's own axes may fail in a trial; initial weights may be fixed, and be copied from one model."""
    code = """
import copy
NET = nn.Linear(3, 1)
def build(norm="none", kind="good"):
    return {"good": copy.deepcopy(NET)}[kind]
"""
    space = (
        "  norm: [none, batch, layer]\n  kind: [good, bad]\n  precision: [fp32, bf16, fp16]\n  lr: {low: 1, high: 2}\n"
    )
    config = write_study(code, "space:\n" + space)
    rehearse(resolve(config), config)


def test_one_recipe_alone_is_rehearsed_where_one_is_given(write_study):
    config = write_study("", "space: {norm: [null, batch]}\n")
    rehearse(resolve(config), config, config.default_recipe())


def test_a_missing_argument_of_the_loader_and_a_dot_for_a_colon(write_study, tmp_path):
    with pytest.raises(InputError, match=r"target\.data: loading case:load raised TypeError") as caught:
        resolve(write_study("def load(rows): ..."))
    assert "fix:      data_args: {rows: ...} under target" in str(caught.value)
    with pytest.raises(InputError, match=r"target\.model: no built-in model of that name") as caught:
        resolve(write_study(model="case.build", folder=tmp_path / "other"))
    assert "fix:      did you mean 'case:build'?" in str(caught.value)


def test_a_row_that_is_no_pair_is_shown_whole_where_data_are_scaled(write_study):
    code = """
from torch.utils.data import Dataset
class Mine(Dataset):
    broken = False
    def __len__(self): return 6
    def __getitem__(self, i): return 1.0 if self.broken else (torch.randn(3), torch.randn(1))
def load(): return Mine(), Mine()
"""
    config = write_study(code, "recipe: {input_norm: standardize}\n")
    task = resolve(config)
    sys.modules["case"].Mine.broken = True
    with pytest.raises(
        InputError, match=rf"{AT_DATA}: a row of the Dataset is a float, expected a pair: \(input, target"
    ):
        rehearse(task, config)


def test_the_files_of_the_users_code(write_study, tmp_path):
    """Those that the named module imports, too; neither the installed ones nor a script that calls us."""
    files = {"helper": "", "pack/__init__": "", "pack/deep": "", "other": "", "venv/lib/site-packages/theirs": ""}
    write(tmp_path, files)
    sys.path.insert(0, str(tmp_path / "venv/lib/site-packages"))
    config = write_study("import helper, theirs\nfrom pack import deep")
    assert user_files(config) == [tmp_path / "case.py"]
    resolve(config)
    names = ["case.py", "helper.py", "pack/__init__.py", "pack/deep.py"]
    assert user_files(config) == [tmp_path / name for name in names]


# --- Datasets are read in parts


class Counting(DatasetRows):
    """Remembers how many rows were taken at once, and where from."""

    taken: list[int]

    def take(self, index):
        assert index.device == self.index_device == torch.device("cpu")
        self.taken.append(len(index))
        return super().take(index)


@pytest.mark.parametrize(
    "check", [lambda r: non_finite(r, "train"), read_targets, lambda r: scaled(r, r, "minmax", "minmax")]
)
def test_checks_read_a_dataset_in_parts(check):
    data = Lazy(30_000, lambda i: (torch.tensor([float(i)]), float(i)))
    Counting.taken = []
    check(Counting(data))
    assert max(Counting.taken) <= 1024
    assert sum(Counting.taken) == 10_000
    assert {0, 29_999} <= set(data.asked)


def test_what_a_custom_loss_makes_unneeded_is_not_read(write_study):
    config = write_study(
        """
from torch.utils.data import Dataset
asked = []
class Mine(Dataset):
    def __len__(self): return 5000
    def __getitem__(self, i):
        asked.append(i)
        return torch.zeros(3) + i, torch.zeros(1)
def load(): return Mine(), Mine()
""",
        loss="case:loss",
    )
    resolve(config)
    assert len(sys.modules["case"].asked) == 2 * 5000 + 2  # once for values that are not finite


def test_the_device_of_an_index_and_of_the_statistics():
    meta = torch.device("meta")
    tensors = TensorRows(torch.ones(4, 2), torch.ones(4)).to(meta)
    assert tensors.index_device == meta
    data = DatasetRows(Lazy(4, lambda i: (torch.tensor([float(i)]), float(i))))
    rows, _ = scaled(data, data, "standardize", "none")
    moved = rows.to(meta)
    assert (moved.index_device, moved.scale_x.shift.device, moved.scale_y) == (torch.device("cpu"), meta, None)
    x, y = moved.take(torch.tensor([1, 2]))
    assert (x.device, y.device) == (meta, meta)


# --- factories

FACTORIES = [
    ("def build(): return nn.Linear(3, 1)", False, frozenset()),
    ("def build(norm='none'): return nn.Linear(3, 1)", True, frozenset({"norm"})),
    ("def build(*, norm='none', width=3): return nn.Linear(3, 1)", True, frozenset({"norm", "width"})),
    ("def build(norm='none', **more): return nn.Linear(3, 1)", True, None),
    ("def build(**more): return inner(**more)\ndef inner(norm='none'): return nn.Linear(3, 1)", True, None),
    ("def build(**more): return inner(**more)\ndef inner(width=1): return nn.Linear(3, width)", False, None),
    ("def build(*sizes): return nn.Linear(3, 1)", False, frozenset()),
    ("class build(nn.Linear):\n    def __init__(self, norm='none'): super().__init__(3, 1)", True, frozenset({"norm"})),
]


@pytest.mark.parametrize(("code", "takes_norm", "takes"), FACTORIES)
def test_what_a_factory_takes(write_study, code, takes_norm, takes):
    task = resolve(write_study(code))
    assert (task.takes_norm, task.takes) == (takes_norm, takes)


def test_kwargs_take_any_axis(write_study):
    config = write_study(
        "def build(**more): return nn.Sequential(nn.Linear(3, more['width']), nn.Linear(more['width'], 1))",
        "recipe: {width: 7}\n",
    )
    task = resolve(config)
    rehearse(task, config)
    assert task.build(width=7)[0].out_features == 7


def test_trying_a_factory_draws_nothing_of_the_users(write_study):
    config = write_study("def build(**more): return nn.Linear(3, 1)")
    before = torch.get_rng_state()
    rehearse(resolve(config), config)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_args_reach_the_factory(write_study):
    task = resolve(write_study(more="  model_args: {width: 9}\n"))
    assert task.build()[0].out_features == 9


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("torch.nn:MSELoss", ""),
        ("case:loss", "loss = nn.MSELoss()"),
        (
            "case:loss",
            "class loss(nn.Module):\n    def forward(self, output, target): return ((output - target) ** 2).mean()",
        ),
        (
            "case:Losses.mse",
            "class Losses:\n    @staticmethod\n    def mse(output, target): return ((output - target) ** 2).mean()",
        ),
        ("case:loss", "def loss(output, target): return ((output - target) ** 2).mean()[None]"),
    ],
)
def test_a_users_loss(write_study, name, code):
    config = write_study(code, loss=name)
    task = resolve(config)
    assert task.loss_kind == "custom"
    assert float(task.loss(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))) == 2.5
    assert rehearse(task, config) == pytest.approx(float(task.train.y.var(correction=0)), rel=1e-3)


# --- built-in losses

RANDOM = torch.Generator().manual_seed(0)
LOGITS, SEQUENCE, IMAGE = (torch.randn(shape, generator=RANDOM) for shape in ((6, 4), (6, 5, 4), (6, 4, 3, 2)))
SHAPES = [
    ("cross_entropy", LOGITS, (6,), functional.cross_entropy),
    ("cross_entropy", SEQUENCE.transpose(1, 2), (6, 5), functional.cross_entropy),
    ("cross_entropy", SEQUENCE, (6, 5), lambda o, y: functional.cross_entropy(o.reshape(30, 4), y.reshape(30))),
    ("cross_entropy", IMAGE, (6, 3, 2), functional.cross_entropy),
]


@pytest.mark.parametrize(("name", "output", "shape", "expected"), SHAPES)
def test_cross_entropy_shapes(name, output, shape, expected):
    target = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(LOSSES[name](output, target), expected(output, target))


@pytest.mark.parametrize(
    ("output", "target", "dim", "ambiguous"),
    [((6, 4), (6,), 1, False), ((6, 4), (6, 4), 1, False), ((6, 4, 5), (6, 5), 1, False), ((6, 5, 4), (6, 5), 2, False),
     ((6, 4, 4), (6, 4), 1, True), ((6, 4, 3, 3), (6, 3, 3), 1, False), ((6, 3, 3, 3), (6, 3, 3), 1, True),
     ((6, 3, 2, 4), (6, 3, 2), 3, False), ((4, 4), (4,), 1, False)],
)  # fmt: skip
def test_the_dimension_of_the_classes(output, target, dim, ambiguous):
    output, target = torch.zeros(output), torch.zeros(target, dtype=torch.long)
    assert (class_dim(output, target), is_ambiguous(output, target)) == (dim, ambiguous)


def test_cross_entropy_of_probabilities_and_ignored_positions():
    shares = LOGITS.softmax(1).roll(1, 0)
    torch.testing.assert_close(LOSSES["cross_entropy"](LOGITS, shares), -(shares * LOGITS.log_softmax(1)).sum(1).mean())
    target = torch.tensor([0, -100, 2, -100, 1, 3])
    kept = target >= 0
    torch.testing.assert_close(
        LOSSES["cross_entropy"](LOGITS, target), functional.cross_entropy(LOGITS[kept], target[kept])
    )
    square = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))  # as many positions as classes
    labels = torch.arange(12).reshape(3, 4) % 4
    torch.testing.assert_close(cross_entropy_last(square, labels), functional.cross_entropy(square.mT, labels))


@pytest.mark.parametrize("name", ["mse", "bce"])
@pytest.mark.parametrize(
    ("output", "target"), [((6, 1), (6,)), ((6,), (6, 1)), ((6, 1), (6, 1)), ((6, 4), (6, 4)), ((6, 2, 2), (6, 4))]
)
def test_one_column_and_none_are_the_same(name, output, target):
    """Broadcast, (6, 1) and (6,) would be 36 differences."""
    count = 24 if 4 in target else 6
    o, y = torch.randn(count, generator=torch.Generator().manual_seed(0)), (torch.arange(count) % 2).float()
    plain = {"mse": functional.mse_loss, "bce": functional.binary_cross_entropy_with_logits}[name]
    loss = LOSSES[name](o.reshape(output), y.reshape(target))
    torch.testing.assert_close(loss, plain(o, y))


@pytest.mark.parametrize("name", ["mse", "bce"])
@pytest.mark.parametrize(("output", "target"), [((6, 2), (6,)), ((6, 1), (6, 2)), ((6,), (3, 2)), ((2, 6), (6, 2))])
def test_other_shapes_are_not_broadcast(name, output, target):
    with pytest.raises(ValueError, match=re.escape(f"output has shape {output}, the target {target}")):
        LOSSES[name](torch.zeros(output), torch.zeros(target))


def test_bce_takes_labels_of_any_kind():
    output = torch.tensor([[0.5], [-1.0]])
    expected = functional.binary_cross_entropy_with_logits(output[:, 0], torch.tensor([1.0, 0.0]))
    for target in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0], dtype=torch.float64)):
        torch.testing.assert_close(LOSSES["bce"](output, target), expected)


# --- scaling: shape of a batch, dimensions over which the statistics are

SCALED_SHAPES = [((40,), (0,)), ((40, 3), (0,)), ((40, 5, 3), (0, 1)), ((40, 3, 4, 2), (0, 2, 3))]


def two_sets(shape):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-3, 1.0, 1e4]) if 3 in shape else torch.tensor(7.0)
    scale = scale.view(-1, 1, 1) if len(shape) == 4 else scale
    train, test = ((torch.randn(shape, generator=generator) + 2) * scale for _ in range(2))
    return train, test * 3 - 1


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(("shape", "over"), SCALED_SHAPES)
@pytest.mark.parametrize("how", ["standardize", "minmax"])
@pytest.mark.parametrize("side", [0, 1])
def test_scaling_is_by_the_training_set_alone(shape, over, how, side, lazily):
    train, test = two_sets(shape)
    other = torch.arange(40)
    if how == "standardize":
        shift, scale = train.mean(over, keepdim=True), train.std(over, correction=0, keepdim=True)
    else:
        shift = train.amin(over, keepdim=True)
        scale = train.amax(over, keepdim=True) - shift
    pairs = [(t, other) if side == 0 else (other, t) for t in (train, test)]
    sets = [DatasetRows(TensorDataset(*pair)) if lazily else TensorRows(*pair) for pair in pairs]
    norms = (how, "none") if side == 0 else ("none", how)
    for rows, raw in zip(scaled(*sets, *norms), (train, test), strict=True):
        index = torch.tensor([5, 0, 39])
        batch = rows.take(index)
        torch.testing.assert_close(batch[side], ((raw - shift) / scale)[index])
        assert torch.equal(batch[1 - side], other[index])
        assert len(rows) == 40
        assert rows.to(torch.device("cpu")).take(index)[side].shape == (3, *shape[1:])


@pytest.mark.parametrize(("how", "start"), [("standardize", 0.0), ("minmax", 0.0)])
@pytest.mark.parametrize("value", [0.0, 5.0, -3e7, 1e-12])
def test_a_constant_column_is_shifted_and_not_divided_by_zero(how, start, value):
    x = torch.stack([torch.full((40,), value), torch.arange(40.0)], dim=1)
    test = x + torch.tensor([1.0, 0.0])
    rows, held_out = scaled(TensorRows(x, x), TensorRows(test, test), how, how)
    torch.testing.assert_close(rows.x[:, 0], torch.full((40,), start))
    torch.testing.assert_close(held_out.x[:, 0], test[:, 0] - x[:, 0])
    assert rows.x[:, 1].std() > 0.2
    assert rows.y.isfinite().all()


def test_no_scaling_is_the_same_rows():
    rows = TensorRows(torch.arange(4), torch.arange(4))
    assert scaled(rows, rows, "none", "none") == (rows, rows)


@pytest.mark.parametrize(
    ("axis", "norms"), [("input_norm", ("minmax", "none")), ("target_norm", ("none", "standardize"))]
)
def test_integers_are_not_scaled(axis, norms):
    rows = TensorRows(torch.arange(4), torch.arange(4))
    with pytest.raises(ValueError, match=rf"{axis}: \w+ needs floating-point values, but these are torch.int64"):
        scaled(rows, rows, *norms)
    dicts = DatasetRows(Lazy(4, lambda i: ({"a": i}, {"b": i})))
    with pytest.raises(ValueError, match=rf"{axis}: \w+ needs floating-point values, but these are dict"):
        scaled(dicts, dicts, *norms)


def test_a_folder_whose_name_begins_like_ours_is_the_users(monkeypatch):
    from recipefuzz import errors

    monkeypatch.setattr(errors, "PACKAGE", "/src/recipefuzz")  # a checkout: an installed package is told by its folder
    assert errors.is_users("/src/recipefuzz_models/model.py")
    assert not errors.is_users("/src/recipefuzz/config.py")
