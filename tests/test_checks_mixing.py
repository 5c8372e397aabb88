"""Rows that mix, inputs that are ignored: planted, and their healthy twins."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from recipefuzz.checks import batch_independence, input_dependence
from recipefuzz.config import parse_config
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnosing import as_patient
from recipefuzz.finding import Level
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import Task, TensorRows

CPU = torch.device("cpu")
CONFIG = parse_config({"target": {"data": "digits", "model": "mlp"}})
X = torch.randn(80, 4, 6, generator=torch.Generator().manual_seed(0))
LABELS = (X.sum((1, 2)) > 0).long()
PER_POSITION = (X.sum(2) > 0).long()
TOKENS = torch.randint(0, 7, (80, 4), generator=torch.Generator().manual_seed(1))


def patient(build, x=X, y=LABELS, loss="cross_entropy", **recipe):
    rows = TensorRows(x, y)
    kind = loss if isinstance(loss, str) else "custom"
    task = Task(rows, rows, build, LOSSES[loss] if isinstance(loss, str) else loss, kind, False, frozenset())
    return Patient(CONFIG, task, Recipe.of({"lr": 0.01} | recipe), 0, CPU, lambda _: [])


def seen_in(check, *args, **kwargs):
    (finding,) = check.check(patient(*args, **kwargs))
    return finding


class Net(nn.Module):
    """Embeds tokens if it is given some, mixes positions, and gives two logits a row; `between` is done in between."""

    def __init__(self, between=lambda h: h, after=lambda out: out):
        super().__init__()
        self.embed, self.first = nn.Embedding(7, 6), nn.Linear(6, 8)
        self.core, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)
        self.between, self.after = between, after

    def forward(self, x):
        h = x if x.is_floating_point() else self.embed(x)
        h = self.between(torch.tanh(self.first(h)))
        return self.after(self.head(self.core(h)[0][:, -1]))


class Softmax(nn.Module):
    def forward(self, h):
        return h.softmax(0)


class Centred(nn.Module):
    def forward(self, h):
        return h - h.mean(0, keepdim=True)


def mixed_by_view(h):
    return h.transpose(0, 1).reshape(h.shape)  # (T, B, C) read as (B, T, C)


@pytest.mark.parametrize("x", [X, TOKENS], ids=["numbers", "tokens"])
def test_a_view_that_mixes_the_batch_is_named_where_it_is_done(x):
    found = seen_in(batch_independence, lambda: Net(mixed_by_view), x)
    assert found.level is Level.FAIL
    assert found.seen.startswith(
        "rows first mix in the forward of the model itself (Net), in what it gives to core (GRU)"
    )
    assert seen_in(batch_independence, Net, x).level is Level.PASS


def test_a_recurrent_layer_that_takes_the_batch_for_time():
    class Wrong(Net):
        def __init__(self):
            super().__init__()
            self.core = nn.GRU(8, 8)

    found = seen_in(batch_independence, Wrong)
    assert (found.level, found.evidence["module"]) == (Level.FAIL, "core")
    assert found.seen.startswith("rows first mix in core (GRU): ")


@pytest.mark.parametrize("module", [Centred, Softmax])
def test_the_module_that_mixes_is_named(module):
    class Net(nn.Sequential):
        pass

    found = seen_in(
        batch_independence, lambda: Net(nn.Flatten(), nn.Linear(24, 8), module(), nn.ReLU(), nn.Linear(8, 2))
    )
    assert (found.level, found.evidence["module"]) == (Level.FAIL, "2")
    assert f"rows first mix in 2 ({module.__name__})" in found.seen


def test_code_between_modules_is_the_forward_of_the_module_around_it():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).softmax(0))

    found = seen_in(batch_independence, lambda: nn.Sequential(nn.Flatten(), Inner()))
    assert found.seen.startswith("rows first mix in the forward of 1, in what it gives to 1.b (Linear)")


@pytest.mark.parametrize(("function", "kind"), [(torch.softmax, "softmax"), (torch.log_softmax, "log_softmax")])
def test_a_softmax_over_the_rows_is_called_one(function, kind):
    found = seen_in(batch_independence, lambda: Net(after=lambda out: function(out, 0)))
    assert found.level is Level.FAIL
    assert f"the output is a {kind} over dimension 0, which holds the rows; rows first mix in the model" in found.seen
    assert "the dimension that holds the classes" in found.todo


def test_a_softmax_over_positions_within_a_row():
    def build(axis):
        class Positions(nn.Linear):
            def forward(self, x):
                return super().forward(x).log_softmax(axis)

        return lambda: Positions(6, 2)

    found = seen_in(batch_independence, build(1), y=PER_POSITION)
    assert found.seen == "the output is a log_softmax over dimension 1, which holds positions"
    assert found.level is Level.FAIL
    assert seen_in(batch_independence, build(2), y=PER_POSITION).level is Level.PASS


def test_rows_that_come_out_in_another_order():
    found = seen_in(batch_independence, lambda: Net(after=lambda out: out.flip(0)))
    assert found.level is Level.FAIL
    assert found.seen.startswith("rows are out of order in the model itself (Net)")


def test_batch_norm_is_excused_and_one_without_statistics_is_a_warning():
    def build(**options):
        return lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(24, **options), nn.Linear(24, 2))

    assert seen_in(batch_independence, build()).level is Level.PASS
    found = seen_in(batch_independence, build(track_running_stats=False))
    assert (found.level, found.evidence) == (Level.WARN, {})
    assert found.seen.startswith("1 (BatchNorm1d) keeps no running statistics")


def test_a_penalty_of_the_whole_batch_beside_the_output_is_no_mixing():
    class WithPenalty(Net):
        def forward(self, x):
            output = super().forward(x)
            return output, output.square().mean()

    found = seen_in(batch_independence, WithPenalty, loss=lambda out, y: LOSSES["cross_entropy"](out[0], y) + out[1])
    assert found.level is Level.PASS


def test_layouts_with_the_rows_elsewhere_are_healthy():
    class TimeFirst(Net):
        def __init__(self):
            super().__init__()
            self.core, self.attention = nn.GRU(8, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            h = self.first(x).transpose(0, 1)
            h = self.core(h)[0]
            h = self.attention(h, h, h)[0]
            return self.head(h.flatten(0, 1)).view(*h.shape[:2], 2)[-1]

    assert seen_in(batch_independence, TimeFirst).level is Level.PASS


def test_too_few_rows_to_mix():
    assert batch_independence.check(patient(Net, X[:2], LABELS[:2])) == []
    assert seen_in(batch_independence, Net, X[:4], LABELS[:4]).evidence["rows"] == 2


# input dependence


class Ignoring(nn.Module):
    """Reads its input, and goes on with something else."""

    def __init__(self, instead):
        super().__init__()
        self.first, self.act, self.instead = nn.Linear(24, 8), nn.Tanh(), instead
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.instead(self.act(self.first(x.flatten(1)))))


class Zero(nn.Module):
    def forward(self, h):
        return h * 0


@pytest.mark.parametrize("instead", [Zero, nn.Identity])
def test_a_module_that_loses_the_input_is_named(instead):
    found = seen_in(input_dependence, lambda: Ignoring(instead()))
    if instead is nn.Identity:
        assert found.level is Level.PASS
        return
    assert (found.level, found.evidence) == (Level.FAIL, {"module": "instead"})
    assert found.seen == "the output is the same when the inputs of 10 rows are exchanged: lost in instead (Zero)"


@pytest.mark.parametrize(
    "instead", [torch.zeros_like, torch.randn_like, lambda h: h.mean(0, keepdim=True).expand_as(h)]
)
def test_input_that_is_overwritten_between_modules(instead):
    found = seen_in(input_dependence, lambda: Ignoring(instead))
    assert found.level is Level.FAIL
    assert found.seen.endswith("lost in the model itself (Ignoring)")


def test_tokens_that_are_not_read():
    class Blind(Net):
        def forward(self, x):
            return super().forward(torch.zeros_like(x))

    assert seen_in(input_dependence, Blind, TOKENS).level is Level.FAIL
    assert seen_in(input_dependence, Net, TOKENS).level is Level.PASS


def test_a_head_that_starts_at_zero_is_healthy():
    def build():
        model = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2))
        nn.init.zeros_(model[3].weight)
        nn.init.zeros_(model[3].bias)
        return model

    assert seen_in(input_dependence, build).level is Level.PASS


def test_targets_without_a_relation_to_the_inputs_are_the_datas_fault_and_not_the_models():
    labels = torch.randint(0, 2, (80,), generator=torch.Generator().manual_seed(2))
    found = seen_in(input_dependence, Net, y=labels)
    assert found.level is Level.PASS
    assert found.evidence["p"] <= 0.05
    assert len(found.evidence["shuffled"]) == 99


def test_a_loss_of_the_output_alone_tells_nothing_of_pairs():
    found = seen_in(input_dependence, Net, loss=lambda out, _y: (out.square().sum(1) - 1).square().mean())
    assert found.level is Level.PASS
    assert "does not depend on which row gets which target" in found.seen


def test_too_few_rows_to_pair():
    assert input_dependence.check(patient(Net, X[:5], LABELS[:5])) == []


# healthy models

HEALTHY = [
    ("digits", "mlp", "cross_entropy", {}),
    ("digits", "cnn", "cross_entropy", {}),
    ("wine", "mlp", "cross_entropy", {"activation": "tanh"}),
    ("breast_cancer", "mlp", "cross_entropy", {}),
    ("diabetes", "mlp", "mse", {}),
    *[("text", model, "cross_entropy", {"width": 16}) for model in ("rnn", "gru", "lstm", "transformer")],
    *[("adding", model, "mse", {"width": 16}) for model in ("rnn", "gru", "lstm", "transformer")],
]
SMALL = {"text": {"length": 16, "size": 20_000}, "adding": {"length": 10, "rows": 200}}


NORMS = ("batch", "layer", "group", "rms")
ALL = [pytest.param(*case, norm, marks=pytest.mark.slow) for case in HEALTHY for norm in NORMS]
FEW = [(*case, norm) for case, norm in zip(HEALTHY[1::3], NORMS, strict=True)]


@pytest.mark.parametrize(
    ("data", "model", "loss", "model_args", "norm"), [*((*c, "none") for c in HEALTHY), *FEW, *ALL]
)
def test_no_alarm_on_built_in_models(data, model, loss, model_args, norm):
    target = {"data": data, "model": model, "loss": loss, "data_args": SMALL.get(data, {})}
    config = parse_config({"target": target | {"model_args": model_args | {"dropout": 0.2}}, "recipe": {"norm": norm}})
    with as_patient(config, resolve(config), config.default_recipe(), 0) as healthy:
        found = [*batch_independence.check(healthy), *input_dependence.check(healthy)]
    assert [f.level for f in found] == [Level.PASS, Level.PASS], found


@pytest.mark.parametrize("check", [batch_independence, input_dependence])
def test_findings_are_deterministic_and_leave_the_users_random_numbers_alone(check):
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = X.clone()
    first, again = seen_in(check, Net).record(), seen_in(check, Net).record()
    assert first == again
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(weights, X)
