"""A model held against right outputs: worked out by hand, by another implementation, or recorded before a change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from recipefuzz.checking import check, record
from recipefuzz.checks.reference_file import Reference, read_reference, write_reference
from recipefuzz.cli import app
from recipefuzz.errors import InputError, Place
from recipefuzz.finding import Level
from recipefuzz.run_folder import identity

PLACE = Place("config.yaml", 5, "reference")
# x = (1, 2, 3), all weights 1, no bias: the sum is 6, and three times its hyperbolic tangent is 3
BY_HAND = {
    "input": [[1.0, 2.0, 3.0]],
    "weight:0.weight": [[1, 1, 1]] * 4,
    "weight:0.bias": [0, 0, 0, 0],
    "weight:2.weight": [[1, 1, 1, 0]],
    "weight:2.bias": [0],
    "0": [[6, 6, 6, 6]],
    "1": [[0.9999877] * 4],
    "(model)": [[2.9999631]],
}
RELU = """
def build(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
"""
CLASS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.core, self.head = nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        x = self.cell(torch.tanh(self.cell(x)))
        x = {changed}
        out, (h, c) = self.core(x[:, None])
        return self.head(out[:, -1])


build = Net
"""


@pytest.fixture
def against(write_study, tmp_path):
    """The finding of the reference check: one, or none."""

    def find(values=None, code="", file="right.json", **study):
        if values is not None:
            (tmp_path / file).write_text(json.dumps(values))
        folder = tmp_path / f"code{len(list(tmp_path.glob('code*')))}"  # code that was imported is not imported again
        config = write_study(code, f"reference: ../{file}\n", folder=folder, **study)
        return [f for f in check(config) if f.check == "reference"]

    return find


def test_outputs_worked_out_by_hand(against):
    (found,) = against(BY_HAND)
    assert found.level is Level.PASS
    assert found.seen.startswith("3 outputs agree with ../right.json, largest difference ")


def test_the_first_module_that_differs_is_named_with_the_place_in_it(against):
    (found,) = against(BY_HAND | {"1": [[0.9999877, 0.9999877, 0.9, 1.0]]})
    assert found.level is Level.FAIL
    assert found.seen == (
        "1 (Tanh) is the first that differs, by up to 0.1 at [0, 2]: 0.999988, the reference 0.9; 1 before it agree"
    )
    assert found.evidence["module"] == "1"


def test_what_comes_later_is_not_named(against):
    (found,) = against(BY_HAND, RELU)
    assert found.seen.startswith("1 (ReLU) is the first that differs, by up to 5 at [0, 0]: 6, the reference 0.9999")


def test_digits_that_were_left_out_by_hand_need_a_tolerance(against):
    rounded = BY_HAND | {"1": [[0.99999] * 4], "(model)": [[3.0]]}
    assert against(rounded)[0].level is Level.PASS  # float32 with thousands of terms is no better
    coarse = rounded | {"1": [[0.999] * 4]}
    assert against(coarse)[0].level is Level.FAIL
    assert against(coarse | {"tolerance": 0.01})[0].level is Level.PASS


def test_another_shape_and_a_value_that_is_not_finite_differ(against):
    (found,) = against(BY_HAND | {"0": [[6, 6]]})
    assert (
        "0 (Linear) is the first that differs, its shape is (1, 4), the reference's (1, 2); it is the first"
        in found.seen
    )
    (found,) = against(BY_HAND | {"0": [[6, 6, float("nan"), 6]]})
    assert "by up to nan at [0, 2]: 6, the reference nan" in found.seen


def test_an_input_that_the_model_does_not_take_is_a_finding(against):
    (found,) = against({"input": [[1.0, 2.0]], "0": [[1.0]]})
    assert found.level is Level.FAIL
    assert found.seen.startswith("the model raised on the reference's input: RuntimeError: mat1 and mat2")


def test_another_implementation(against, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3))
    weight = np.random.default_rng(1).normal(size=(4, 3))
    hidden = np.tanh(x @ weight.T)
    arrays = {"input": x, "weight:0.weight": weight, "weight:0.bias": np.zeros(4), "0": x @ weight.T, "1": hidden}
    np.savez(tmp_path / "right.npz", **arrays)
    assert against(file="right.npz")[0].level is Level.PASS
    np.savez(tmp_path / "right.npz", **arrays | {"1": hidden * (1 + 1e-3)})
    assert against(file="right.npz")[0].seen.startswith("1 (Tanh) is the first that differs")


def test_no_reference_no_finding(write_study):
    assert not [f for f in check(write_study()) if f.check == "reference"]


@pytest.mark.parametrize("file", ["today.npz", "today.json"])
def test_a_refactoring_is_held_against_what_was_recorded(against, write_study, tmp_path, file):
    line = record(write_study(CLASS.format(changed="x")), tmp_path / file)
    assert line == f"7 outputs written; to compare with them, put into the config: reference: {file}"
    (found,) = against(code=CLASS.format(changed="x"), file=file)
    assert (found.level, found.evidence["differences"]) == (
        Level.PASS,
        dict.fromkeys(["cell", "cell#2", "core", "core:1", "core:2", "head", "(model)"], 0.0),
    )
    (found,) = against(code=CLASS.format(changed="x * 1.001"), file=file)
    assert found.seen.startswith("core (LSTM) is the first that differs, by up to ")
    assert found.seen.endswith("; 2 before it agree")


def test_a_recording_brings_its_weights(against, write_study, tmp_path):
    record(write_study(CLASS.format(changed="x")), tmp_path / "today.npz")
    drawn_before = CLASS.format(changed="x").replace("super().__init__()", "super().__init__(); torch.randn(5)")
    assert against(code=drawn_before, file="today.npz")[0].level is Level.PASS


def test_two_recordings_are_the_same_bytes_and_leave_random_numbers_alone(write_study, tmp_path):
    before = torch.get_rng_state()
    for name in ("a.npz", "b.npz"):
        record(write_study(), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_and_batch_norm_are_in_eval_mode(against, write_study, tmp_path):
    code = "\ndef build():\n    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))\n"
    record(write_study(code), tmp_path / "today.npz")
    (found,) = against(code=code, file="today.npz")
    assert found.level is Level.PASS
    held = read_reference(tmp_path / "today.npz", PLACE)
    assert np.array_equal(held.outputs["0"], held.outputs["1"])
    assert "0.num_batches_tracked" in held.weights


NAMED = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        x = torch.arange(3.0) + i
        return {made}, x.sum()[None]


def load():
    return Rows(), Rows()


class Net(nn.Linear):
    def forward(self, x):
        return super().forward({read})


def build():
    return Net(3, 1)
"""


@pytest.mark.parametrize(
    ("made", "read"),
    [('{"a": x, "b": -x}', 'x["a"] - 2 * x["b"]'), ("(x, -x)", "x[0] - 2 * x[1]")],
    ids=["dict", "tuple"],
)
def test_inputs_by_name(against, write_study, tmp_path, made, read):
    code = NAMED.format(made=made, read=read)
    record(write_study(code), tmp_path / "today.npz")
    assert against(code=code, file="today.npz")[0].level is Level.PASS
    assert set(read_reference(tmp_path / "today.npz", PLACE).inputs) == ({"a", "b"} if "a" in made else {"0", "1"})


@pytest.mark.slow
def test_tokens_stay_whole_numbers(against, write_study, tmp_path):
    study = {"data": "text", "model": "gru", "loss": "cross_entropy"}
    record(write_study(**study), tmp_path / "today.json")
    assert against(file="today.json", **study)[0].level is Level.PASS


# errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "no such file\n  found: .*right.json\n  fix: .*--record FILE writes one"),
        ([1], "can't be read: it holds a list\n  found: .*\n  expected: arrays by name, as a JSON object"),
        ({"0": [[1]]}, "right.json: no input\n  expected: input, or input:NAME"),
        ({"input": [1], "input:a": [1], "0": [1]}, "right.json: input and input:NAME are given"),
        ({"input": [1]}, r"right.json: no output to compare\n  expected: names of modules, \(model\)"),
        ({"input": [1], "0": [[1, 2], [3]]}, "right.json: '0' is no array of numbers\n  expected: lists of numbers"),
        ({"input": ["a"], "0": [1]}, "right.json: 'input' is no array of numbers"),
        (BY_HAND | {"tolerance": -1}, "right.json: not a tolerance\n  found: .*-1\n  expected: one number, 0 or more"),
        (BY_HAND | {"(modell)": [1]}, r"no module '\(modell\)'\n  expected: .*\n  fix: +did you mean '\(model\)'\?"),
        (BY_HAND | {"weight:0.wieght": [1]}, "no weight '0.wieght'\n  expected: .*\n  fix: +did you mean '0.weight'"),
        (
            BY_HAND | {"weight:2.bias": [1, 2]},
            r"weight:2.bias has another shape\n  found: +\(2,\)\n  expected: +\(1,\)",
        ),
        (BY_HAND | {"1#2": [1]}, "gives no output '1#2' on this input\n  expected: an output of a module that runs"),
    ],
)
def test_errors_teach(against, values, message):
    with pytest.raises(InputError, match=rf"config\.yaml:5: reference: (?s:.*){message.replace(': +', ': *')}"):
        against(values)


@pytest.mark.parametrize(("file", "content"), [("right.json", "{"), ("right.npz", "no zip"), ("right.npz", "")])
def test_files_of_another_kind(against, tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml:5: reference: can't be read: "):
        against(file=file)


def test_a_single_array_is_no_reference(against, tmp_path):
    with (tmp_path / "right.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="can't be read: File is not a zip file"):
        against(file="right.npz")


def test_another_suffix_is_refused_with_the_config(write_study):
    with pytest.raises(InputError, match=r"config.yaml:5: reference: not a file of arrays\n  found: +right.txt"):
        write_study(more="reference: right.txt\n")


@pytest.mark.parametrize("file", ["today.txt", "nowhere/today.npz"])
def test_recordings_go_into_known_files(write_study, tmp_path, file):
    with pytest.raises(InputError, match="--record: can't write a reference there"):
        record(write_study(), tmp_path / file)


# files


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    values = np.array([[1.5, np.nan, np.inf]], dtype=np.float32)
    written = Reference({"": np.arange(3)}, {"file": values, "(model)": values}, {"a.b": np.array(3)})
    write_reference(tmp_path / f"f{suffix}", written)
    read = read_reference(tmp_path / f"f{suffix}", PLACE)
    for part in ("inputs", "outputs", "weights"):
        before, after = getattr(written, part), getattr(read, part)
        assert list(before) == list(after)
        for name, array in before.items():
            assert np.array_equal(array, after[name], equal_nan=array.dtype.kind == "f")
            assert array.shape == after[name].shape


def test_a_reference_changes_no_trial_and_is_found_from_anywhere(write_study, tmp_path):
    plain, held = write_study(), write_study(more="reference: right.json\n")
    assert identity(plain, {}) == identity(held, {})
    assert held.resolved()["reference"] == str(tmp_path / "right.json")
    assert plain.resolved()["reference"] is None


def test_the_command_records_and_then_compares(write_study, tmp_path):
    write_study(more="reference: today.npz\n")
    config, runner = str(tmp_path / "config.yaml"), CliRunner()
    recorded = runner.invoke(app, ["check", config, "--record", str(tmp_path / "today.npz")])
    assert (recorded.exit_code, "outputs written" in recorded.output) == (0, True)
    found = json.loads(runner.invoke(app, ["check", config, "--json"]).output)
    assert [f["level"] for f in found if f["check"] == "reference"] == ["pass"]
