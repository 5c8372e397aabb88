"""`recipefuzz diagnose` from a config to its answer, what it tries, what it prints, and what a search keeps of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from test_cli import cli
from torch import nn

import recipefuzz
from recipefuzz import searched
from recipefuzz.diagnose import remedies
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.remedies import Applies, Remedy
from recipefuzz.diagnose.shrink import ROUNDS, Shrunk, shrink
from recipefuzz.diagnose.trial import diagnose_trial, levels_off
from recipefuzz.diagnosing import diagnose
from recipefuzz.diagnosis import Diagnosis, Fix
from recipefuzz.engines.job import Outcome
from recipefuzz.recipe import Recipe
from recipefuzz.report.diagnosed import diagnosed
from recipefuzz.report.failures import buckets
from recipefuzz.report.tables import DIAGNOSIS_COLUMNS, FAILURE_COLUMNS, failures_frame
from recipefuzz.report.terminal import PLAIN
from recipefuzz.result import Phase, TrialResult
from recipefuzz.run_folder import RunFolder
from recipefuzz.space import Choice, Range, Space
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.task import Task, TensorRows
from recipefuzz.trace import Trace
from recipefuzz.verdict import Label, Verdict

LOG = """
def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    x[7, 0] = 0
    return x[:40], x[:40, :1].abs(), x[40:], x[40:, :1].abs()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"size": Size()})
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(torch.cat([x, self.parts["size"](x)], dim=1))


class Size(nn.Module):
    def forward(self, x):
        return torch.log(x[:, :1].abs())


def build():
    return Model()
"""

INPUTS = """
def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0)) * 300
    y = x.sum(1, keepdim=True) / 300
    return x[:40], y[:40], x[40:], y[40:]


def build():
    return nn.Linear(3, 1)
"""

RNN = """
def load():
    x = torch.randn(48, 20, 1, generator=torch.Generator().manual_seed(0))
    return x[:40], x[:40].sum(1), x[40:], x[40:].sum(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.take, self.keep, self.head = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            h = self.take(step) + self.keep(h)
        return self.head(h)


def build():
    return Model()
"""

VECTORS = """
def load():
    x = torch.randint(0, 20, (48, 2), generator=torch.Generator().manual_seed(0))
    x[x == 3] = 2
    x[7, 0] = 3
    y = x[:, :1] / 20
    return x[:40], y[:40], x[40:], y[40:]


def vectors():
    v = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    v[3] = 0
    return v / v.norm(dim=1, keepdim=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(vectors(), freeze=FREEZE)
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(self.words(x).sum(1))


def build():
    return Model()
"""
UNIT = "return v / v.norm(dim=1, keepdim=True)"
FROM_FILE = "return torch.from_numpy((v / v.norm(dim=1, keepdim=True)).numpy().copy())"  # numpy's copy is not seen

PARTIAL = """
def load():
    x = torch.randn(49, 3, generator=torch.Generator().manual_seed(0))
    return x[:41], x[:41].sum(1, keepdim=True), x[41:], x[41:].sum(1, keepdim=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        spread = x.std(0)
        return self.linear(x / (spread + 1e-3))


def build():
    return Model()
"""

# the user's code, the recipe, rows in a batch, then what is found: verdict, root, cause, phase, operation, module, line
TRIALS = {
    "log of zero": (LOG, {"lr": 0.02}, 4, ("nan", "code", "log_of_zero", "forward", "log", "parts.size", "return torch.log(x[:, :1].abs())")),
    "rate too high": ("", {"lr": 10}, 8, ("nan", "recipe", "exploding_parameters", "loss", "mse_loss", "", "")),
    "inputs as they are": (INPUTS, {"lr": 0.03}, 8, ("nan", "recipe", "exploding_parameters", "loss", "mse_loss", "", "")),
    "recurrence": (RNN, {"lr": 0.03}, 8, ("nan", "recipe", "exploding_gradients", "forward", "addmm", "keep", "h = self.take(step) + self.keep(h)")),
    "last batch": (PARTIAL, {"lr": 0.1}, 8, ("converging", "code", "empty_reduction", "forward", "std", "", "spread = x.std(0)")),
    "clean": ("", {"lr": 0.1}, 8, ("converging", "", "", "", "", "", "")),
}  # fmt: skip
MENDED_BY = {
    "rate too high": {("lr",)},
    "inputs as they are": {("input_norm",), ("input_norm", "target_norm")},
    "recurrence": {("lr",), ("clip_norm",), ("target_norm",), ("input_norm", "target_norm")},
}
KEYS = {"verdict", "root", "cause", "phase", "op", "module", "file", "line", "step", "explanation", "fixes"}


def more(batch_size=8, engine="auto", **recipe):
    parts = {"recipe": recipe, "trial": {"steps": 60, "batch_size": batch_size}, "run": {"workers": 0}}
    parts["run"]["engine"] = engine
    return yaml.dump(parts)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_explained(name, write_study):
    code, recipe, batch_size, expected = TRIALS[name]
    found = diagnose(write_study(code, more(batch_size, **recipe)))
    record = found.record()
    told = tuple(record[k] for k in ("verdict", "root", "cause", "phase", "op", "module", "source"))
    assert told == expected
    assert record.keys() >= KEYS
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {tuple(f["values"]) for f in record["fixes"] if f["verdict"] == "converging"} == MENDED_BY.get(name, set())
    for fix in record["fixes"]:
        assert fix["recipe"] == record["recipe"] | fix["values"]
    assert (record["step"] > 0) is bool(record["cause"])
    assert bool(record["advice"]) is (record["root"] == "code")
    again = Diagnosis.from_record(record)
    assert again.record(found.recipe.values()) == found.diagnosis.record(found.recipe.values())


@pytest.mark.parametrize("freeze", [True, False])
def test_weights_that_the_model_is_built_with(freeze, write_study):
    """Frozen ones fail at the step that reads them, others at once; the line that made them is named."""
    found = diagnose(write_study(VECTORS.replace("FREEZE", str(freeze)), more(4, lr=0.1))).diagnosis
    assert (found.root, found.cause, found.phase, found.op) == ("code", "division_by_zero", "data", "div")
    assert found.source == UNIT
    assert (found.step > 1) is freeze
    assert "as the model was built, div at case.py:" in found.explanation
    assert not found.fixes


@pytest.mark.parametrize(("freeze", "phase"), [(True, "forward"), (False, "data")])
def test_weights_that_come_from_elsewhere(freeze, phase, write_study):
    code = VECTORS.replace("FREEZE", str(freeze)).replace(UNIT, FROM_FILE)
    found = diagnose(write_study(code, more(4, lr=0.1))).diagnosis
    assert (found.root, found.cause, found.phase) == ("data", "data_nonfinite", phase)
    assert "4 of 80 NaN), which was so before the first step" in found.explanation
    assert "came in with parameter words.weight" in found.explanation
    assert found.source == ("return self.linear(self.words(x).sum(1))" if freeze else "")
    assert not found.fixes
    assert "a file that was saved after a NaN" in found.advice


CONSTANT = """
SCALE = torch.tensor([1.0, float("nan"), 1.0])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x / SCALE)


def build():
    return Model()


def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    return x[:40], x[:40, :1], x[40:], x[40:, :1]
"""


def test_a_constant_of_the_code(write_study):
    found = diagnose(write_study(CONSTANT, more(4, lr=0.1))).diagnosis
    assert (found.root, found.cause, found.phase, found.op) == ("data", "data_nonfinite", "forward", "div")
    assert found.source == "return self.linear(x / SCALE)"


def test_numbers_of_the_step_are_in_the_explanation(write_study):
    text = diagnose(write_study(LOG, more(4, lr=0.02))).diagnosis.explanation
    assert "log at case.py:" in text
    assert "in parts.size gave -inf in 1 of 4 elements, given 4x1 float32, 0 to 2.57, 1 of 4 zero" in text
    assert "training row 7;" in text


def test_the_last_batch_is_told_as_ahead(write_study):
    with pytest.warns(UserWarning, match="degrees of freedom"):
        found = diagnose(write_study(PARTIAL, more(lr=0.1)))
    text = found.diagnosis.explanation
    assert text.startswith("the trial itself converges, but an epoch over all rows meets a batch of 1 row that")
    with_full_batches = PARTIAL.replace("49", "48").replace("41", "40")
    assert diagnose(write_study(with_full_batches, more(lr=0.1))).diagnosis.cause == ""


EVALUATION = """
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.START(3))

    def forward(self, x):
        spread = x.std(0) if self.training else self.spread
        return x / spread


def build():
    return nn.Sequential(Scale(), nn.Linear(3, 1))


def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    return x[:40], x[:40].sum(1, keepdim=True), x[40:], x[40:].sum(1, keepdim=True)
"""


@pytest.mark.parametrize("start", ["zeros", "ones"])
def test_a_held_out_loss_that_only_eval_mode_breaks(start, write_study):
    found = diagnose(write_study(EVALUATION.replace("START", start), more(lr=0.1))).diagnosis
    if start == "ones":
        assert (found.verdict, found.cause) == ("converging", "")
        return
    assert (found.verdict, found.root, found.cause, found.op) == ("converging", "code", "division_by_zero", "div")
    assert (found.source, found.module) == ("return x / spread", "0")
    assert found.explanation.startswith(
        "the trial itself converges, but in eval mode the held-out loss is not finite: "
    )


CELL = """
def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    {side}[13, 0] = float("nan")
    return x[:40], y[:40], x[40:], y[40:]


def build():
    return nn.Linear(3, 1)
"""


@pytest.mark.parametrize("side", ["x", "y"])
def test_a_cell_of_the_data(side, write_study):
    found = diagnose(write_study(CELL.format(side=side), more(lr=0.1))).diagnosis
    assert (found.verdict, found.root, found.cause, found.phase) == ("nan", "data", "data_nonfinite", "data")
    assert (found.op, found.file, found.fixes) == ("", "", ())
    assert f"{side}_train" in found.explanation
    assert "row 13" in found.explanation
    assert found.advice.startswith("drop or fill those rows")


def test_a_cell_that_spread_to_all_rows(write_study):
    code = CELL.format(side="y").replace("    return x[:40]", "    y = y - y.mean()\n    return x[:40]")
    found = diagnose(write_study(code, more(lr=0.1))).diagnosis
    assert (found.root, found.cause) == ("data", "data_nonfinite")
    assert "40 such values in 40 rows" in found.explanation
    assert found.advice.startswith("no row is spared: look for a statistic")


@pytest.mark.parametrize("side", ["x", "y"])
def test_rows_that_only_their_reading_breaks(side, write_study):
    """No row was seen to be bad when the data were looked at: a Dataset whose augmentation breaks one, say."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    (x if side == "x" else y)[13, 0] = math.nan
    rows = TensorRows(x, y)
    task = Task(rows, rows, lambda: nn.Linear(3, 1), LOSSES["mse"], "mse", takes_norm=False, takes=())
    recipe = Recipe.of({"lr": 0.1, "batch_size": 8})
    nothing = lambda _: pytest.fail("no recipe was to be tried")  # noqa: E731
    found = diagnose_trial(Patient(write_study("", more()), task, recipe, 0, torch.device("cpu"), nothing))
    assert (found.root, found.cause, found.phase) == ("data", "data_nonfinite", "data")
    assert f"came in with {side}" in found.explanation
    assert found.step == next(i for i, rows in enumerate(batches(40), 1) if 13 in rows)


def batches(rows):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, rows, (8,), generator=generator).tolist() for _ in range(60)]


@pytest.mark.parametrize("name", ["log of zero", "rate too high"])
def test_both_engines_give_the_same_diagnosis(name, write_study):
    code, recipe, batch_size, _ = TRIALS[name]
    found = [
        diagnose(write_study(code, more(batch_size, engine, **recipe))).record() for engine in ("sequential", "fused")
    ]
    for record in found:
        for fix in record["fixes"]:
            del fix["skill"]  # engines differ by rounding
    assert found[0].pop("threshold", "")[:12] == found[1].pop("threshold", "")[:12]
    assert found[0] == found[1]


def test_a_diagnosis_is_the_same_each_time_and_leaves_the_users_random_numbers(write_study):
    config = write_study(LOG, more(4, lr=0.02))
    state = torch.get_rng_state()
    assert diagnose(config).record() == diagnose(config).record()
    assert torch.equal(torch.get_rng_state(), state)


def answer(*arguments):
    code, out, err = cli("diagnose", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_set_changes_the_recipe(write_study, tmp_path):
    write_study("", more(lr=0.1))
    config = str(tmp_path / "config.yaml")
    healthy = answer(config)
    assert (healthy["verdict"], healthy["cause"], healthy["fixes"]) == ("converging", "", [])
    broken = answer(config, "--set", "lr=10", "--set", "width=6", "--seed", "3")
    assert (broken["cause"], broken["seed"]) == ("exploding_parameters", 3)
    assert broken["recipe"] == healthy["recipe"] | {"lr": 10.0, "width": 6}
    assert broken["blamed"] == {"lr": 10.0}
    assert broken["threshold"].startswith("fails for lr >= ")


def test_save_writes_a_config_that_shows_the_same_again(write_study, tmp_path, monkeypatch):
    write_study("", more(lr=0.1))
    saved = tmp_path / "elsewhere" / "saved.yaml"
    saved.parent.mkdir()
    changes = ("--set", "lr=10", "--set", "batch_size=6", "--set", "width=6", "--seed", "3", "--save", str(saved))
    first = answer(str(tmp_path / "config.yaml"), *changes)
    monkeypatch.chdir(saved.parent)
    assert answer("saved.yaml") == first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "widht=3"), 2, r"--set: unknown axis 'widht'"),
        (("--set", "widht=3"), 2, r"did you mean 'width'"),
        (("--set", "learning_rate=3"), 2, r"did you mean 'lr'"),
        (("--set", "lr=fast"), 2, "--set.lr: not a value of lr"),
        (("--set", "lr"), 2, r"axis=value, as in lr=0.3"),
        (("--trial", "0"), 2, "no run there"),
    ],
)
def test_what_is_wrong_with_the_arguments(arguments, code, message, write_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study("", more(lr=0.1))
    status, out, err = cli("diagnose", "config.yaml", *arguments)
    assert (status, out) == (code, "")
    assert err.startswith("recipefuzz: error: ")
    assert message in err
    assert "Traceback" not in err


def test_code_that_raises_is_told_with_its_line(write_study, tmp_path):
    code = "\n\nclass build(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 1)\n\n    def forward(self, x):\n        return super().forward(x)[:, 5:].view(7)\n"
    write_study(code, more(lr=0.1))
    status, out, err = cli("diagnose", str(tmp_path / "config.yaml"))
    assert (status, out) == (2, "")
    assert "case.py" in err


RAISING = """
from torch.distributions import Normal


def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    x[7] = 0
    return x[:40], x[:40, :1], x[40:], x[40:, :1]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        shift = {shift}
        return Normal(self.linear(x), 1.0).mean + shift


def build():
    return Model()
"""
RAISES = {  # where it began, and whether it raised in that very step
    "in the next step": ("self.linear(x).detach() * 0 + (self.linear(x) * x[:, :1]).square().sqrt()", "sqrt_gradient_at_zero", False),
    "in the same step": ("Normal((x[:, :1] / x[:, :1]) * self.linear(x), 1.0).mean", "division_by_zero", True),
}  # fmt: skip


@pytest.mark.parametrize(("shift", "cause", "same"), RAISES.values(), ids=RAISES)
def test_code_that_raises_on_a_value_that_is_not_finite(shift, cause, same, write_study):
    """Distributions check their parameters: the value that they were given is the failure, not the exception."""
    found = diagnose(write_study(RAISING.format(shift=shift), more(8, lr=0.1))).diagnosis
    assert (found.verdict, found.root, found.cause) == ("nan", "code", cause)
    assert found.source.startswith("shift = ")
    assert found.step == next(i for i, rows in enumerate(batches(40), 1) if 7 in rows)
    assert ("; then the code raised ValueError: Expected parameter loc" in found.explanation) is same


def test_code_that_raises_beside_infinities_that_are_meant_is_told_as_it_is(write_study, tmp_path):
    shift = "x.masked_fill(torch.arange(3) == 2, -math.inf).softmax(1)[:, :1] + (1 / 0 if (x[:, 0] == 0).any() else 0)"
    write_study("import math\n" + RAISING.format(shift=shift), more(8, lr=0.1))
    status, out, err = cli("diagnose", str(tmp_path / "config.yaml"))
    assert (status, out) == (3, "")
    assert "the trial raised ZeroDivisionError" in err


def test_what_people_read(write_study, tmp_path):
    write_study(LOG, more(4, lr=0.02))
    status, out, _ = cli("diagnose", str(tmp_path / "config.yaml"))
    lines = [line.rstrip() for line in out.splitlines()]
    place = next(i for i, line in enumerate((tmp_path / "case.py").read_text().splitlines(), 1) if "torch.log" in line)
    assert status == 0
    assert lines[0] == "nan at step 15: log_of_zero, a bug in the code"
    assert lines[1] == f" where  case.py:{place}, in the forward, module parts.size"
    assert lines[2] == " line   return torch.log(x[:, :1].abs())"
    assert any("no recipe fixes it; in the code: keep the argument above" in line for line in lines)
    assert lines[-1] == " recipe lr 0.02, batch_size 4, seed 0"


def shown(found, threshold=""):
    console = Console(width=100, **PLAIN)
    with console.capture() as capture:
        console.print(diagnosed(found, Recipe.of({"lr": 0.3, "clip_norm": 5}).values(), 2, threshold))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


FIXES = (
    Fix("lr 0.3 -> 0.1", {"lr": 0.1}, "converging", 0.912, 3, 3),
    Fix("clip_norm 5 -> 1", {"clip_norm": 1.0}, "converging", 0.5, 3, 3),
    Fix("norm null -> layer", {"norm": "layer"}, "converging", None, 3, 2),
    Fix("warmup_steps 0 -> 6", {"warmup_steps": 6}, "nan"),
)
EXPLODED = Diagnosis(
    "nan", "recipe", "exploding_parameters", "backward", "mm", "blocks.0", step=7, explanation="it grew",
    chain=("mm in blocks.0", "add at a.py:3", "sum"), fixes=FIXES,
)  # fmt: skip


def test_the_text_of_a_bad_recipe():
    assert shown(EXPLODED, "fails for lr >= 0.2 (converges at 0.19)") == (
        "nan at step 7: exploding_parameters, the recipe\n"
        " where  blocks.0, in the backward, module blocks.0\n"
        " what   it grew\n"
        " way    mm in blocks.0 > add > sum\n"
        " from   fails for lr >= 0.2 (converges at 0.19)\n"
        " fix    lr 0.3 -> 0.1 (3 of 3 seeds converge, skill 0.91)\n"
        " or     clip_norm 5 -> 1 (3 of 3 seeds converge, skill 0.50)\n"
        " tried  1 of 4 changes that were run don't help\n"
        " recipe lr 0.3, clip_norm 5, seed 2"
    )


def test_the_text_of_a_healthy_trial():
    text = shown(Diagnosis("converging", explanation="skill 0.96 after 60 steps"))
    assert text.splitlines()[:2] == ["converging: nothing to mend", " what   skill 0.96 after 60 steps"]
    assert "fix" not in text


def test_the_text_where_nothing_helps():
    unmended = Diagnosis("nan", "recipe", "exploding_parameters", fixes=FIXES[2:])
    assert "none of 2 changes of the recipe that were run converges on every seed" in shown(unmended)
    assert "the nearest: norm null -> layer (2 of 3 seeds converge)" in " ".join(shown(unmended).split())
    finite = Fix("lr 0.3 -> 0.1", {"lr": 0.1}, "stalled")
    assert "1 stay finite, the smallest: lr 0.3 -> 0.1" in " ".join(
        shown(replace(unmended, fixes=(FIXES[3], finite))).split()
    )
    assert unmended.fix is None
    assert EXPLODED.fix is FIXES[0]


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        ("a b c", "a > b > c"),
        ("a a b", "a x 2 > b"),
        ("m a m a m a f", "(m > a) x 3 > f"),
        ("z s e e s e e f", "z > (s > e x 2) x 2 > f"),
        ("a b a", "a > b > a"),
    ],
)
def test_what_a_loop_repeats_is_told_once(chain, text):
    found = replace(EXPLODED, chain=tuple(f"{op} at case.py:3" for op in chain.split()))
    assert f" way    {text}\n" in shown(found)


RUN = np.linspace(0, 1, 60)


@pytest.mark.parametrize(
    ("losses", "levels"),
    [
        (9 * np.exp(-5 * RUN), True),
        (-9 * RUN, False),
        (-9 * RUN**2, False),
        (-9 * RUN**2 + np.sin(7e3 * RUN), False),
        (-9 * np.log1p(9 * RUN), True),
        (9 * RUN, True),
        (RUN[:1], False),
    ],
)
def test_a_loss_levels_off(losses, levels):
    assert levels_off(losses) is levels


@pytest.mark.parametrize(("sign", "lr", "root", "cause"), [(1, 0.01, "", ""), (-1, 0.00005, "code", "unknown")])
def test_a_loss_without_a_minimum_over_constants(sign, lr, root, cause, write_study):
    """A flow's likelihood has a minimum that no constant shows; with the wrong sign it has none at all."""
    code = """
class build(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        z = x * self.log_scale.exp()
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + self.log_scale.sum()


def load():
    x = 4 * torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    return x[:40], x[:40], x[40:], x[40:]


def loss(output, target):
    return -SIGN * output.mean()
""".replace("SIGN", str(sign))
    found = diagnose(write_study(code, more(8, lr=lr), loss="case:loss")).diagnosis
    assert (found.verdict, found.root, found.cause) == ("not judged", root, cause)


# what is tried


def test_the_ladder_for_a_failure_begins_with_the_smallest_changes():
    recipe = Recipe.of({"lr": 0.3})
    found = remedies.for_failure(recipe, Applies(norm=False, inputs=False, targets=False), 100)
    values = [dict(r.values) for r in found]
    assert [v["lr"] for v in values if "lr" in v] == [0.3 / 3, 0.3 / 10, 0.3 / 30, 0.3 / 100]
    assert [v["clip_norm"] for v in values if "clip_norm" in v] == [15, 10, 5, 1]
    assert [v["init_scale"] for v in values if "init_scale" in v] == pytest.approx([1 / 3, 1 / 10, 1 / 100])
    assert {"warmup_steps": 10} in values
    assert all(len(v) == 1 for v in values)
    assert not any({"norm", "input_norm", "target_norm", "precision"} & v.keys() for v in values)


def test_what_is_tried_depends_on_recipe_and_task():
    everything = Applies(norm=True, inputs=True, targets=True)
    values = {"clip_norm": 10, "norm": "layer", "input_norm": "minmax", "precision": "fp16", "warmup_steps": 10}
    found = [dict(r.values) for r in remedies.for_failure(Recipe.of(values), everything, 100)]
    assert [v["clip_norm"] for v in found if "clip_norm" in v] == [5, 1]  # tighter ones only
    assert [v["norm"] for v in found if "norm" in v] == ["batch"]
    assert {"precision": "fp32"} in found
    assert {"target_norm": "standardize"} in found
    assert not any("input_norm" in v or "warmup_steps" in v or "weight_decay" in v for v in found)


def test_weight_decay_that_blows_the_weights_up(write_study):
    """Each step takes three times the weights from them, whatever the gradient is."""
    found = diagnose(write_study("", more(lr=0.3, weight_decay=10.0))).diagnosis
    assert (found.verdict, found.root, found.cause) == ("nan", "recipe", "exploding_parameters")
    assert found.fix is not None
    assert found.fix.values == {"weight_decay": 0.0}


def test_changes_that_barely_learn_come_after_the_others_that_work():
    fixes = [
        Fix("clip", {}, Label.CONVERGING, 0.31, 3, 3),
        Fix("lr", {}, Label.CONVERGING, 0.9, 3, 3),
        Fix("init", {}, Label.CONVERGING, 0.5, 3, 3),
        Fix("lucky", {}, Label.CONVERGING, 0.99, 3, 2),
        Fix("unknown", {}, Label.CONVERGING, None, 3, 3),
        Fix("norm", {}, Label.NAN),
    ]
    assert [f.change for f in remedies.barely_last(fixes)] == ["lr", "init", "unknown", "clip", "lucky", "norm"]
    assert remedies.barely_last(()) == ()


def test_pairs_scale_only_what_can_be_scaled():
    recipe = Recipe.of({"lr": 1.0})
    assert all(len(r.values) >= 2 for r in remedies.together(recipe, Applies(norm=True, inputs=True, targets=True)))
    classes = remedies.together(recipe, Applies(norm=True, inputs=True, targets=False))
    assert {"input_norm": "standardize", "lr": 0.1} in [dict(r.values) for r in classes]
    tokens = remedies.together(recipe, Applies(norm=True, inputs=False, targets=False))
    assert not any("input_norm" in r.values for r in tokens)


def test_a_change_in_words():
    recipe = Recipe.of({"lr": 0.3, "width": 8})
    remedy = Remedy({"lr": 0.1, "clip_norm": 5.0, "width": 4}, 1)
    assert remedy.change(recipe) == "lr 0.3 -> 0.1, clip_norm null -> 5, width 8 -> 4"


def runner(converges, log):
    """Pretends to train: a job converges where `converges(recipe, seed)` says so; None is an error."""

    def run(jobs):
        log.append([(job.recipe.lr, job.seed) for job in jobs])
        for job in reversed(jobs):  # in any order
            good = converges(job.recipe, job.seed)
            label = Label.CONVERGING if good else Label.NAN
            yield Outcome(job, Trace(), None if good is None else Verdict(label, "", "", {}))

    return run


LADDER = [Remedy({"lr": lr}, size) for size, lr in enumerate((0.3, 0.2, 0.1, 0.05), start=1)]


def test_changes_that_work_on_every_seed_come_first_the_smallest_of_them_before_the_others():
    log = []
    good = {0.2: {0, 1}, 0.1: {0, 1, 2}, 0.05: {0, 1, 2}}
    fixes = remedies.tried(Recipe(), 0, LADDER[::-1], runner(lambda r, seed: seed in good.get(r.lr, ()), log))
    assert [(f.values["lr"], f.converged, f.seeds, f.works) for f in fixes] == [
        (0.1, 3, 3, True),
        (0.05, 3, 3, True),
        (0.2, 2, 3, False),
        (0.3, 0, 1, False),
    ]
    assert [seed for _, seed in log[0]] == [0] * 4
    assert log[1] == [(lr, seed) for lr in (0.2, 0.1, 0.05) for seed in (1, 2)]


def test_a_change_that_can_not_be_run_is_left_out():
    fixes = remedies.tried(Recipe(), 5, LADDER, runner(lambda r, _: None if r.lr == 0.2 else r.lr < 0.2, []))
    assert [f.values["lr"] for f in fixes] == [0.1, 0.05, 0.3]
    assert fixes[0].seeds == 3


@pytest.mark.parametrize(("skill", "kept"), [(1e6, ["lr"]), (1.5, ["lr", "target_norm"])])
def test_a_loss_that_falls_for_ever_on_scaled_targets_is_no_fix(monkeypatch, skill, kept):
    """Of counts that have become negative a Poisson likelihood does; a Gaussian one may gain much."""
    monkeypatch.setattr(remedies, "skill_at_end", lambda *_: skill)
    changes = [LADDER[0], Remedy({"target_norm": "standardize"}, 2)]
    fixes = remedies.tried(Recipe(), 0, changes, runner(lambda *_: True, []))
    assert [name for f in fixes for name in f.values] == kept


def test_further_seeds_are_run_of_the_smallest_that_work():
    many = [Remedy({"lr": 1.0 / size}, size) for size in range(1, 12)]
    fixes = remedies.tried(Recipe(), 0, many, runner(lambda *_: True, []))
    assert [f.seeds for f in fixes] == [3] * remedies.CONFIRMED + [1] * (11 - remedies.CONFIRMED)
    assert not fixes[-1].works  # one run may be luck


def test_the_change_that_is_asked_for_is_confirmed_however_large_it_is():
    """A rate's ladder is long: six smaller changes of other axes must not keep it from being run on further seeds."""
    many = [Remedy({"init_scale": 1.0 / size}, size) for size in range(1, 12)] + [Remedy({"lr": 1.0}, 12)]
    fixes = remedies.tried(Recipe(), 0, many, runner(lambda *_: True, []), lambda r: "lr" in r.values)
    assert [dict(f.values) for f in fixes if f.works][-1] == {"lr": 1.0}
    assert sum(f.works for f in fixes) == remedies.CONFIRMED


# the smallest failing difference

SAFE = Recipe.of({"lr": 0.01})


def asked(rule, log=None):
    def fails(recipes):
        if log is not None:
            log.append(recipes)
        return [rule(r) for r in recipes]

    return fails


@pytest.mark.parametrize("threshold", [0.0123, 0.2, 0.999])
def test_a_threshold_is_bracketed(threshold):
    log = []
    failing = SAFE.but(lr=1.0, clip_norm=5, norm="layer", warmup_steps=3)
    found = shrink(failing, SAFE, asked(lambda r: r.lr >= threshold, log))
    assert (found.blamed, found.safe, found.axis) == ({"lr": 1.0}, {"lr": 0.01}, "lr")
    assert found.converges_at < threshold <= found.fails_at
    assert found.fails_at / found.converges_at == pytest.approx(100 ** (1 / 64))
    assert len(log) == 1 + ROUNDS


def test_a_threshold_from_below():
    found = shrink(SAFE.but(lr=1e-6), SAFE, asked(lambda r: r.lr <= 1e-4))
    assert found.fails_at <= 1e-4 < found.converges_at
    assert str(found) == f"fails for lr <= {found.fails_at:.3g} (converges at {found.converges_at:.3g})"


def test_a_threshold_of_whole_numbers():
    found = shrink(SAFE.but(batch_size=4), SAFE, asked(lambda r: r.batch_size <= 13))
    assert (found.fails_at, found.converges_at) == (13, 14)


def test_a_threshold_from_zero():
    found = shrink(SAFE.but(warmup_steps=80), SAFE, asked(lambda r: r.warmup_steps > 33))
    assert (found.converges_at, found.fails_at) == (33, 34) or (
        found.converges_at <= 33 < found.fails_at <= found.converges_at + 2
    )


def test_two_values_that_are_needed_together():
    failing = SAFE.but(lr=1.0, init_scale=3.0, optimizer="adam", norm="batch")
    found = shrink(failing, SAFE, asked(lambda r: r.lr >= 0.5 and r.optimizer == "adam"))
    assert found.blamed == {"lr": 1.0, "optimizer": "adam"}
    assert found.converges_at < 0.5 <= found.fails_at
    assert str(found).endswith(" when optimizer = adam")
    assert shrink(failing, SAFE, asked(lambda r: r == failing)).blamed.keys() == {
        "lr",
        "init_scale",
        "optimizer",
        "norm",
    }


def test_a_choice_has_no_threshold():
    log = []
    found = shrink(SAFE.but(norm="batch", lr=1.0), SAFE, asked(lambda r: r.norm == "batch", log))
    assert found == Shrunk({"norm": "batch"}, {"norm": None})
    assert str(found) == "fails for norm = batch"
    assert len(log) == 1


def test_null_is_no_end_of_a_bracket():
    found = shrink(SAFE.but(clip_norm=None), SAFE.but(clip_norm=5.0), asked(lambda r: r.clip_norm is None))
    assert str(found) == "fails for clip_norm = null"


def test_nothing_to_shrink():
    assert shrink(SAFE, SAFE, asked(lambda _: pytest.fail("nothing was to be run"))) is None


# what a search keeps


SPACE = {"lr": {"low": 0.01, "high": 1000, "log": True}}


@pytest.fixture
def study(write_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {
        "study": "small",
        "space": SPACE,
        "trial": {"steps": 60, "batch_size": 8},
        "search": {"trials": 8, "sampler": "random", "confirm": {"top": 1, "seeds": 2}},
        "run": {"workers": 0, "engine": "sequential"},  # `auto` picks by timing, and engines round otherwise
    }
    return write_study("", yaml.dump(parts))


def test_a_search_explains_its_failures_and_keeps_what_it_found(study, monkeypatch):
    result = recipefuzz.search(study)
    failing = result.trials[result.trials.verdict == "nan"]
    assert len(failing) > 1
    kept = json.loads((result.folder / "diagnoses.json").read_text())
    assert {int(number) for number in kept} == set(result.diagnoses)
    table = pd.read_csv(result.folder / "failures.csv")
    assert list(table) == [*FAILURE_COLUMNS, *DIAGNOSIS_COLUMNS, "fix"]
    exploded = table[table.cause == "exploding_parameters"].iloc[0]
    assert exploded.trials == len(failing)  # whatever their traces showed, one cause
    own = result.diagnoses[int(exploded.example_trial)]
    assert (exploded.root, exploded.phase, exploded.op, exploded.fix) == (own.root, own.phase, own.op, own.fix.change)
    assert pd.isna(exploded.line)
    assert own.fix.values.keys() == {"lr"}

    # --trial replays the stored trial itself
    row = failing[failing.trial == exploded.example_trial].iloc[0]
    told = answer("small", "--trial", str(row.trial))
    assert (told["recipe"]["lr"], told["step"], told["cause"]) == (row.lr, row.first_bad, "exploding_parameters")
    assert told["op"] == own.op
    assert told["blamed"] == {"lr": row.lr}
    assert answer("small", "--trial", str(row.trial), "--set", "lr=0.05")["verdict"] == "converging"
    status, _, err = cli("diagnose", "small", "--trial", "99")
    assert status == 2
    assert "a trial from 0 to 7" in err

    # a resumed search does not ask again
    with monkeypatch.context() as patch:
        patch.setattr(searched, "diagnose_stored", lambda *_: pytest.fail("it is known"))
        again = recipefuzz.search(study)
        assert again.diagnoses == result.diagnoses

    # a damaged file is as good as none
    for rubbish in ("{", "[]", '{"0": {}}', '{"x": 1}', ""):
        (result.folder / "diagnoses.json").write_text(rubbish)
        assert RunFolder(result.folder).diagnoses() == {}
    assert cli("report", str(result.folder))[0] == 0
    assert "root" in pd.read_csv(result.folder / "failures.csv")
    assert told_of(recipefuzz.search(study).diagnoses) == told_of(result.diagnoses)


def told_of(diagnoses: dict[int, Diagnosis]) -> dict[int, object]:
    """All but the skills of runs that blew up, which rounding decides."""
    return {
        number: (d.cause, d.root, d.phase, d.op, d.step, d.fix, [(f.change, f.verdict) for f in d.fixes])
        for number, d in diagnoses.items()
    }


def test_no_failure_is_explained_where_none_is_wanted(study):
    result = recipefuzz.search(study.model_copy(update={"search": study.search.model_copy(update={"diagnose": 0})}))
    assert (result.trials.verdict == "nan").any()
    assert result.diagnoses == {}
    assert not (result.folder / "diagnoses.json").exists()
    assert pd.read_csv(result.folder / "failures.csv").root.isna().all()


def failed(number, cause, verdict="nan", **values):
    return TrialResult(
        number, Phase.SEARCH, 0, Recipe.of({"lr": 0.1 * (number + 1), **values}).values(), verdict, cause
    )


AXES = Space((("lr", Range(0.01, 10.0, log=True)), ("norm", Choice(("none", "batch")))))


def test_buckets_are_joined_where_their_diagnoses_agree():
    results = [failed(i, "exploding_parameters" if i < 4 else "unknown") for i in range(7)]
    bug = Diagnosis("nan", "code", "log_of_zero", "loss", "log", file="/a/model.py", line=3, advice="clamp it")
    found = buckets(results, AXES, {2: bug, 5: bug})
    assert [(b.trials, b.cause, b.place, b.example.trial) for b in found] == [(7, "log_of_zero", "model.py:3", 2)]
    assert str(found[0]) == "7 trials like trial 2: log_of_zero at model.py:3"
    row = failures_frame(found).iloc[0]
    assert (row.root, row.op, row.line, row.fix) == ("code", "log", 3, "clamp it")


def test_buckets_stay_apart_at_other_places_and_without_a_diagnosis():
    results = [failed(i, cause) for i, cause in enumerate(["a", "a", "a", "b", "b", "c"])]
    made = {1: Diagnosis("nan", "code", "log_of_zero", file="/a/model.py", line=3)}
    made[4] = Diagnosis("nan", "code", "log_of_zero", file="/a/model.py", line=8)
    found = buckets(results, AXES, made)
    assert [(b.trials, b.cause, b.place) for b in found] == [
        (3, "log_of_zero", "model.py:3"),
        (2, "log_of_zero", "model.py:8"),
        (1, "c", ""),
    ]
    frame = failures_frame(found)
    assert frame.line.tolist()[:2] == [3, 8]
    assert frame.iloc[2][list(DIAGNOSIS_COLUMNS)].isna().all()
    assert [(b.trials, b.cause) for b in buckets(results, AXES)] == [(3, "a"), (2, "b"), (1, "c")]


def test_saved_configs_are_configs(write_study, tmp_path):
    found = diagnose(write_study("", more(lr=0.1)))
    text = found.as_config()
    parts = yaml.safe_load(text)
    assert (parts["space"], parts["recipe"]["lr"], parts["trial"]["batch_size"]) == ({}, 0.1, 8)
    assert Path(parts["base"]) == tmp_path
