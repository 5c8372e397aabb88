"""Preflight checks of data, initial loss, parameters and determinism: planted faults, and their healthy twins."""

from __future__ import annotations

import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from recipefuzz.checks import data, determinism, initial_loss, parameters
from recipefuzz.diagnose.patient import Patient
from recipefuzz.finding import Level, worst
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.rows import non_finite
from recipefuzz.targets.task import DatasetRows, Task, TensorRows

CONFIG = SimpleNamespace(trial=SimpleNamespace(steps=20, extend=0))
CHECKS = (data, initial_loss, parameters, determinism)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, X_TEST = drawn(200, 6), drawn(60, 6, seed=1)
Y, Y_TEST = (x[:, :1] - x[:, 1:2] for x in (X, X_TEST))
LABELS, LABELS_TEST = ((x[:, 0] > 0.4).long() + (x[:, 0] > -0.4).long() for x in (X, X_TEST))


def net(*last, out=3):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, out), *last)


def rows(x, y):
    return TensorRows(x, y)


def patient(build=net, loss="cross_entropy", train=None, test=None, **recipe):
    y, y_test = (LABELS, LABELS_TEST) if loss == "cross_entropy" or callable(loss) else (Y, Y_TEST)
    train, test = train or rows(X, y), test or rows(X_TEST, y_test)
    kind = loss if isinstance(loss, str) else "custom"
    bad = non_finite(train, "train") + non_finite(test, "test")
    task = Task(train, test, build, LOSSES.get(kind, loss), kind, False, frozenset(), bad)
    return Patient(CONFIG, task, Recipe.of({"lr": 0.1} | recipe), 0, torch.device("cpu"), lambda _: [])


def regression(*last, **more):
    return patient(lambda: net(*last, out=1), "mse", **more)


def with_data(x=X, y=LABELS, x_test=X_TEST, y_test=LABELS_TEST, loss="cross_entropy", **recipe):
    out = 1 if loss != "cross_entropy" else 10
    return patient(lambda: net(out=out), loss, rows(x, y), rows(x_test, y_test), **recipe)


def put(x, index, value):
    changed = x.clone()
    changed[index] = value
    return changed


def only(found):
    assert len(found) == 1, found
    return found[0]


@contextmanager
def untouched(*tensors):
    before, state = [t.clone() for t in tensors], torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)
    for t, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.NAME)
@pytest.mark.parametrize("healthy", [patient(), regression()], ids=["labels", "numbers"])
def test_healthy_tasks_pass_and_nothing_is_touched(check, healthy):
    with untouched(X, Y, X_TEST, LABELS):
        found = check.check(healthy)
        assert found == check.check(healthy)
    assert only(found).level is Level.PASS, found
    assert not found[0].todo


BUILTIN = [
    ("digits", "mlp", "cross_entropy", {}),
    ("digits", "cnn", "cross_entropy", {}),
    ("wine", "mlp", "cross_entropy", {"input_norm": "standardize"}),
    ("breast_cancer", "gru", "cross_entropy", {"input_norm": "standardize"}),
    ("breast_cancer", "mlp", "bce", {"input_norm": "minmax"}),
    ("diabetes", "mlp", "mse", {"input_norm": "standardize", "target_norm": "standardize"}),
    ("text", "rnn", "cross_entropy", {}),
    ("text", "transformer", "cross_entropy", {}),
    ("adding", "lstm", "mse", {}),
    ("adding", "gru", "mse", {}),
]


@pytest.mark.parametrize(("name", "model", "loss", "recipe"), BUILTIN, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_no_false_alarm_on_built_in_models(write_study, name, model, loss, recipe, norm):
    from recipefuzz.targets.resolve import resolve

    arguments = "  model_args: {dropout: 0.3}\n" + (
        "  data_args: {length: 12, size: 20000}\n" if name == "text" else ""
    )
    config = write_study(more=arguments, data=name, model=model, loss=loss)
    own = Recipe.of({"lr": 0.1, "norm": norm} | recipe)
    healthy = Patient(config, resolve(config), own, 0, torch.device("cpu"), lambda _: [])
    found = [f for check in CHECKS for f in check.check(healthy)]
    assert worst(found) is Level.PASS, [f for f in found if f.level is not Level.PASS]


# data

ONES = torch.ones(200, dtype=torch.long)
TOKENS = torch.randint(0, 50, (200, 9), generator=torch.Generator().manual_seed(0))
DATA_FAULTS = {
    "nan row": (with_data(put(X, (7, 2), float("nan"))), Level.FAIL, "x_train .* row 7, column 2 .*1 such value "),
    "nan held out": (with_data(x_test=put(X_TEST, 3, float("inf"))), Level.FAIL, "x_test .* row 3"),
    "constant": (with_data(put(X, (slice(None), 4), 0.5)), Level.WARN, "1 of 6 .* column 4 is 0.5"),
    "equal": (with_data(put(X, (slice(None), 4), X[:, 1])), Level.WARN, "equal in all rows: 1 = 4"),
    "scale": (with_data(X * torch.tensor([1, 1, 1, 5e3, 1, 1])), Level.WARN, "raw inputs: up to .*column 3"),
    "tiny": (with_data(X * 1e-5), Level.WARN, "inputs no larger than"),
    "targets": (with_data(y=Y * 400, y_test=Y_TEST * 400, loss="mse"), Level.WARN, "raw targets"),
    "off by one": (with_data(y=LABELS + 1, y_test=LABELS_TEST + 1), Level.WARN, "labels begin at 1"),
    "untaught": (with_data(x=X[LABELS < 2], y=LABELS[LABELS < 2]), Level.FAIL, "training set lacks class 2"),
    "untested": (with_data(x_test=X_TEST[:50], y_test=LABELS_TEST[:50] * 0), Level.WARN, "held-out set lacks class 1"),
    "balance": (with_data(y=put(ONES, slice(0, 9), 0), y_test=ONES[:60]), Level.WARN, "class 1 makes up 95.5%"),
    "leak": (with_data(x_test=X[:60], y_test=LABELS[:60]), Level.FAIL, "60 of 60 held-out rows are training rows"),
    "not shifted": (
        with_data(TOKENS[:150], TOKENS[:150], TOKENS[150:], TOKENS[150:]),
        Level.WARN,
        "target is its own input",
    ),
    "float64": (with_data(X.double(), x_test=X_TEST), Level.WARN, "x_train is float64"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_faults_of_the_data_are_named(fault):
    case, level, seen = DATA_FAULTS[fault]
    found = data.check(case)
    named = [f for f in found if f.level is level and re.search(seen, f.seen)]
    assert named, found
    assert all(f.todo for f in found)


@pytest.mark.parametrize(
    "well",
    [
        with_data(X * 1e4, x_test=X_TEST * 1e4, input_norm="standardize"),
        with_data(y=Y * 400, y_test=Y_TEST * 400, loss="mse", target_norm="standardize"),
        with_data(X.clamp_min(0) * (torch.arange(6) > 0), x_test=X_TEST.clamp_min(0)),  # a blank column
        with_data(X, x_test=put(X_TEST, 0, X[0]), y_test=put(LABELS_TEST, 0, (LABELS[0] + 1) % 3)),  # other targets
        with_data(TOKENS[:150, :-1], TOKENS[:150, 1:], TOKENS[150:, :-1], TOKENS[150:, 1:]),
    ],
    ids=["scaled inputs", "scaled targets", "blank", "equal inputs", "next tokens"],
)
def test_what_is_scaled_or_usual_passes(well):
    assert only(data.check(well)).level is Level.PASS


def test_nan_that_the_loss_leaves_out_is_told_as_harmless():
    def loss(output, y):
        return (output - y)[y.isfinite()].square().mean()

    y = put(Y, 5, float("nan"))
    masked = patient(lambda: net(out=1), loss, rows(X, y), rows(X_TEST, Y_TEST))
    found = only(data.check(masked))
    assert found.level is Level.PASS
    assert "row 5" in found.seen
    assert "no harm" in found.seen


def test_rows_that_repeat_by_themselves_are_a_warning():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
    y = x.sum(1).long()
    case = patient(lambda: nn.Linear(2, 3), train=rows(x, y), test=rows(x[:40], y[:40]))
    found = [f for f in data.check(case) if "held-out rows" in f.seen]
    assert only(found).level is Level.WARN
    assert "repeat" in found[0].todo


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.read = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read += 1
        return self.x[index], self.y[index]


def test_of_a_dataset_some_rows_are_read_and_a_leak_is_found():
    x = drawn(5000, 3, 4, 4)
    train, test = Pairs(x, x[:, 0, 0, 0]), Pairs(x[:500], x[:500, 0, 0, 0])
    case = patient(lambda: nn.Linear(1, 1), "mse", DatasetRows(train), DatasetRows(test))
    object.__setattr__(case.task, "non_finite", ())
    train.read = 0
    found = only(data.check(case))
    assert train.read <= 1000
    assert found.level is Level.FAIL
    assert "held-out rows" in found.seen


# initial loss


def wrapped(loss):
    return lambda output, y: loss(output, y)


BCE = {"train": rows(X, (Y > 0).float()), "test": rows(X_TEST, (Y_TEST > 0).float())}
LOSS_FAULTS = {
    "double softmax": (patient(lambda: net(nn.Softmax(1))), "double softmax"),
    "own double softmax": (patient(lambda: net(nn.Softmax(1)), wrapped(functional.cross_entropy)), "double softmax"),
    "sigmoid": (patient(lambda: net(nn.Sigmoid())), "as of a sigmoid"),
    "double sigmoid": (patient(lambda: net(nn.Sigmoid(), out=1), "bce", **BCE), "double sigmoid"),
    "sign": (patient(loss=lambda o, y: -functional.cross_entropy(o, y)), "wrong sign"),
    "no log-softmax": (patient(lambda: net(), lambda o, y: -functional.nll_loss(o, y)), "wrong sign"),
    "sign of numbers": (
        patient(lambda: net(out=1), lambda o, y: -((o - y) ** 2).mean(), rows(X, Y), rows(X_TEST, Y_TEST)),
        "wrong sign",
    ),
    "broadcast": (
        patient(lambda: net(out=1), lambda o, y: ((o - y) ** 2).mean(), rows(X, Y[:, 0]), rows(X_TEST, Y_TEST[:, 0])),
        "broadcasts",
    ),
}


@pytest.mark.parametrize("fault", LOSS_FAULTS)
def test_losses_that_do_not_fit_the_output_are_named(fault):
    case, seen = LOSS_FAULTS[fault]
    found = only(initial_loss.check(case))
    assert found.level is Level.FAIL
    assert seen in found.seen
    assert found.todo


@pytest.mark.parametrize(
    "well",
    [
        patient(lambda: net(nn.LogSoftmax(1))),
        patient(lambda: net(nn.LogSoftmax(1)), wrapped(functional.nll_loss)),
        patient(lambda: net(nn.Softmax(1)), lambda o, y: functional.nll_loss((o + 1e-9).log(), y)),
        patient(lambda: net(nn.Softmax(1)), wrapped(functional.nll_loss)),  # -p: odd, and trains all the same
        patient(loss=wrapped(functional.cross_entropy)),
        patient(lambda: net(out=1), "bce", **BCE),
        patient(lambda: net(nn.Sigmoid(), out=1), wrapped(functional.binary_cross_entropy), **BCE),
        patient(lambda: net(nn.ReLU(), out=1), "mse", rows(X, Y.abs()), rows(X_TEST, Y_TEST.abs())),
    ],
    ids=["log-softmax", "nll", "log of softmax", "-p", "own", "bce", "own bce", "relu"],
)
def test_losses_that_fit_the_output_pass(well):
    assert only(initial_loss.check(well)).level is Level.PASS


def test_large_weights_are_far_off_and_the_change_that_was_tried_is_said():
    found = only(initial_loss.check(patient(init_scale=30.0)))
    assert found.level is Level.WARN
    assert "times that" in found.seen
    assert "init_scale: 1" in found.todo


def test_raw_inputs_are_far_off_and_the_change_that_was_tried_is_said():
    found = only(initial_loss.check(patient(lambda: nn.Linear(6, 3), train=rows(X * 1e3, LABELS))))
    assert found.level is Level.WARN
    assert "input_norm: standardize" in found.todo


def test_targets_far_from_zero_want_target_norm():
    found = only(initial_loss.check(with_data(y=Y + 50, y_test=Y_TEST + 50, loss="mse")))
    assert found.level is Level.WARN
    assert "target_norm: standardize" in found.todo


def test_a_loss_that_is_not_finite_fails():
    found = only(initial_loss.check(regression(nn.Threshold(1e9, float("nan")))))
    assert found.level is Level.FAIL
    assert "nan" in found.seen


def test_a_model_that_knows_the_answers_is_told():
    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.a * (x[:, :1] - x[:, 1:2])

    assert "knows the answers" in only(initial_loss.check(patient(Knows, "mse"))).seen


# parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) + self.b(x)))


class Unused(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))


class Detached(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x) + self.b(x).detach()))


class Listed(Net):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 8)]

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) + self.b(x) + self.layers[0](x)))


class Plain(Net):
    def __init__(self):
        super().__init__()
        self.gain = torch.ones(3, requires_grad=True)

    def forward(self, x):
        return super().forward(x) * self.gain


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.b.requires_grad_(False)


class Zeros(Net):
    def __init__(self):
        super().__init__()
        for p in self.parameters():
            nn.init.zeros_(p)


class Gated(Net):
    """A branch that starts at zero, as in LoRA: healthy."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) + self.gate * self.b(x)))


class Penalized(Net):
    """An input and a tensor made in forward() that want gradients: healthy."""

    def forward(self, x):
        x = x.requires_grad_()
        return super().forward(x) + 0 * torch.zeros(3, requires_grad=True)


class StuckInEval(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(x))

    def train(self, mode=True):
        super().train(mode)
        self.drop.eval()
        return self


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output, y):
        return functional.cross_entropy(output * self.weight, y)


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


PARAMETER_FAULTS = {
    "unused": (patient(Unused), Level.WARN, "never used: b.weight, b.bias"),
    "detached": (patient(Detached), Level.FAIL, "no gradient reaches b.weight, b.bias"),
    "list": (patient(Listed), Level.FAIL, "does not train layers[0].weight, layers[0].bias"),
    "attribute": (patient(Plain), Level.FAIL, "does not train gain"),
    "loss": (patient(loss=OwnWeight()), Level.FAIL, "does not train loss.weight"),
    "frozen": (patient(Frozen), Level.WARN, "frozen (2 of 6 have requires_grad False): b.weight, b.bias"),
    "zeros": (patient(Zeros), Level.FAIL, "a gradient of exactly zero in 4 steps: a.weight, b.weight, head.weight"),
    "left in eval": (patient(lambda: normed().eval()), Level.WARN, "the factory leaves the model in eval mode"),
    "stuck in eval": (patient(StuckInEval), Level.WARN, "in eval mode while the model trains: drop"),
    "tiny batch": (patient(normed, batch_size=2), Level.WARN, "batch norm (1) takes its statistics from batches of 2"),
}


@pytest.mark.parametrize("fault", PARAMETER_FAULTS)
def test_parameters_that_do_not_learn_are_named(fault):
    case, level, seen = PARAMETER_FAULTS[fault]
    found = only(parameters.check(case))
    assert found.level is level
    assert seen in found.seen
    assert found.todo


@pytest.mark.parametrize("build", [Net, Gated, Penalized, normed])
def test_parameters_that_learn_pass(build):
    assert only(parameters.check(patient(build))).level is Level.PASS


def test_layers_that_depend_on_the_mode_are_told():
    found = only(parameters.check(patient(lambda: nn.Sequential(nn.Dropout(0.2), normed()))))
    assert "training and eval mode differ by 0 (dropout) and 1.1 (batch norm)" in found.seen


# determinism

RESTLESS = np.random.default_rng()  # which nothing seeds


class Noise(nn.Module):
    def forward(self, x):
        return x + float(RESTLESS.normal())


class Augmented(Pairs):
    def __getitem__(self, index):
        return self.x[index] + float(RESTLESS.normal()), self.y[index]


class Redrawn(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        nn.init.constant_(self.weight, RESTLESS.normal())


def restless_loss(output, y):
    return functional.cross_entropy(output, y) * (1 + 1e-3 * float(RESTLESS.random()))


class RestlessGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return grad * float(RESTLESS.random())


class Backward(nn.Module):
    def forward(self, x):
        return RestlessGradient.apply(x)


UNSTEADY = {
    "weights": (patient(Redrawn), "the initial weights (parameter weight)"),
    "batch": (patient(train=DatasetRows(Augmented(X, LABELS))), "the inputs of step 1"),
    "forward": (patient(lambda: net(Noise())), "the output of 3 in step 1"),
    "loss": (patient(loss=restless_loss), "the loss of step 1"),
    "backward": (patient(lambda: net(Backward())), "the gradient of 0.weight in step 1"),
}


@pytest.mark.parametrize("fault", UNSTEADY)
def test_what_differs_first_is_named(fault):
    case, first = UNSTEADY[fault]
    found = only(determinism.check(case))
    assert found.level is Level.FAIL
    assert found.seen.endswith(f"differ, first in {first}")
    assert found.todo


def test_seeded_randomness_is_no_difference():
    case = patient(lambda: nn.Sequential(nn.Dropout(0.5), net()), train=DatasetRows(Pairs(X, LABELS)))
    assert only(determinism.check(case)).level is Level.PASS
