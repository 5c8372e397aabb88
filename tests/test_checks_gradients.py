"""The checks of gradients, of ten rows by heart, of the relation: planted bugs are named, healthy twins are not."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

from recipefuzz.checks import gradients, overfit, relation
from recipefuzz.checks.recital import recital
from recipefuzz.diagnose.held_out import follows
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.slopes import DOUBLE, SINGLE, slope
from recipefuzz.diagnosing import as_patient
from recipefuzz.finding import Level
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import Task, TensorRows

CPU = torch.device("cpu")
X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] - X[:, 1:2]


@pytest.fixture
def patient_of(write_study):
    def make(build, x=X, y=Y, loss="mse", **values):
        config = write_study(more="recipe: {lr: 0.1}\n")
        rows = TensorRows(x[:100], y[:100]), TensorRows(x[100:], y[100:])
        function, kind = (LOSSES[loss], loss) if isinstance(loss, str) else (loss, "custom")
        task = Task(*rows, build, function, kind, takes_norm=False, takes=None)
        return Patient(config, task, Recipe.of({"batch_size": 16, **values}), 0, CPU, run=lambda _: [])

    return make


def scaled_backward(factor):
    """A smooth custom Function whose gradient is `factor` times what it should be."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x + x**3 / 10

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (1 + 0.3 * x**2) * factor

    return Cube


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.call = function.apply  # bound before anything is watched, as users do

    def forward(self, x):
        return self.call(x)


def stack(*inner):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *inner, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def found(patient):
    (finding,) = gradients.check(patient)
    return finding


# the wrong part is named, and by how much


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.01, "is 1.00 % too large"),
        (0.99, "is 1.00 % too small"),
        (3.0, "is 3 times too large"),
        (-1.0, "has the wrong sign"),
        (-2.0, "has the wrong sign and 2 times the size"),
        (0.0, "is missing"),
    ],
)
def test_a_wrong_custom_backward_is_named_with_its_size(patient_of, factor, words):
    finding = found(patient_of(lambda: stack(Apply(scaled_backward(factor)))))
    assert finding.level is Level.FAIL
    assert finding.seen.startswith("custom Function Cube in module 2 (Apply)")
    assert f"in module 2 (Apply): its gradient with respect to its input {words}" in finding.seen
    assert ";" not in finding.seen, "modules before it only get its wrong gradient"
    assert "backward()" in finding.todo
    assert any(line.startswith("0 ") and line.endswith("wrong") for line in finding.lines)


def test_its_healthy_twin_passes(patient_of):
    finding = found(patient_of(lambda: stack(Apply(scaled_backward(1.0)))))
    assert finding.level is Level.PASS
    assert "3 parameter groups and 1 custom Functions" in finding.seen
    assert "float64" in finding.seen


def test_a_custom_function_that_no_parameter_lies_before_is_checked_too(patient_of):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 1)

        def forward(self, x):
            return Mul.apply(self.a.weight, x).sum(1, keepdim=True) + self.a.bias

    class Mul(torch.autograd.Function):
        @staticmethod
        def forward(weight, x):
            return weight * x

        @staticmethod
        def setup_context(ctx, inputs, output):  # noqa: ARG004
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            _, x = ctx.saved_tensors
            return (grad * x).sum(0, keepdim=True) * 1.01, None

    finding = found(patient_of(Net))
    assert finding.level is Level.FAIL
    assert "custom Function Mul in the model's own forward (Net): its gradient" in finding.seen
    assert "1.00 % too large" in finding.seen


def test_a_custom_loss_with_a_wrong_sign(patient_of):
    class Negative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output, target):
            ctx.save_for_backward(output, target)
            return ((output - target) ** 2).mean()

        @staticmethod
        def backward(ctx, grad):
            output, target = ctx.saved_tensors
            return -2 * (output - target) / output.numel() * grad, None

    finding = found(patient_of(stack, loss=lambda o, t: Negative.apply(o, t)))
    assert finding.seen == (
        "custom Function Negative in the loss: its gradient with respect to its input has the wrong sign"
    )


def test_the_forward_is_left_as_it_was(patient_of):
    function = scaled_backward(1.0)
    before = function.__dict__["forward"]
    found(patient_of(lambda: stack(Apply(function))))
    assert function.__dict__["forward"] is before


class Cut(nn.Module):
    """Two branches, one of which can be cut off from the backward pass."""

    def __init__(self, cut):
        super().__init__()
        self.a, self.b, self.cut = nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), cut

    def forward(self, x):
        branch = self.b(x)
        return self.a(x) + (branch.detach() if self.cut else branch)


def test_a_detached_branch(patient_of):
    finding = found(patient_of(lambda: Cut(cut=True)))
    assert finding.level is Level.FAIL
    assert "the model's own forward (Cut): its gradient with respect to the parameters of b." in finding.seen
    assert "is missing (0, and the derivative is" in finding.seen
    assert ".detach()" in finding.todo
    assert [line.split()[0] for line in finding.lines if line.endswith("wrong")] == ["b.0", "b.2"]
    assert found(patient_of(lambda: Cut(cut=False))).level is Level.PASS


class Inner(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.lin, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        out = self.lin(x)
        return out + {"none": x, "detach": x.detach(), "data": x.data}[self.how]


@pytest.mark.parametrize("how", ["detach", "data"])
def test_a_detach_within_one_module_is_named_there_and_not_upstream(patient_of, how):
    finding = found(patient_of(lambda: stack(Inner(how))))
    assert finding.seen.startswith("module 2 (Inner): its gradient with respect to its input ")
    assert ";" not in finding.seen
    assert found(patient_of(lambda: stack(Inner("none")))).level is Level.PASS


def test_a_hook_that_changes_gradients(patient_of):
    def build():
        model = stack()
        model[2].register_full_backward_hook(lambda _m, grads, _o: tuple(g * 1.05 for g in grads))
        return model

    finding = found(patient_of(build))
    assert finding.seen.startswith("module 2 (Linear): its gradient with respect to its input is 5.00 % too large")
    assert "hooks" in finding.todo


def test_two_wrong_modules_are_both_named(patient_of):
    finding = found(patient_of(lambda: stack(Apply(scaled_backward(1.01)), Inner("detach"))))
    assert "module 2 (Apply)" in finding.seen
    assert "module 3 (Inner)" in finding.seen


def test_a_straight_through_estimator_is_told_and_is_no_failure(patient_of):
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.sign()

        @staticmethod
        def backward(_ctx, grad):
            return grad

    finding = found(patient_of(lambda: stack(Apply(Sign))))
    assert finding.level is Level.WARN
    assert "straight-through" in finding.seen


def test_of_a_deep_model_what_was_compared_is_said(patient_of, monkeypatch):
    """A sample of the groups; a custom Function is compared wherever it stands."""
    monkeypatch.setattr(gradients, "MOST", 4)

    def deep(factor):
        return stack(*(nn.Linear(8, 8) for _ in range(7)), Apply(scaled_backward(factor)))

    seen = found(patient_of(lambda: deep(1.0))).seen
    assert "in 4 of 10 parameter groups, spread over the model, and 1 custom Functions" in seen
    assert "module 9 (Apply)" in found(patient_of(lambda: deep(1.01))).seen
    assert "in 3 parameter groups (" in found(patient_of(stack)).seen


# no false alarms


class Hard(nn.Module):
    """Part of it in float32, whatever it gets."""

    def forward(self, x):
        return x.float().softmax(-1).to(x.dtype)


class Only32(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return x @ (self.weight.float() * torch.ones(8, 8, dtype=torch.float32)).to(torch.float32)


class Pools(nn.Module):
    """Kinks everywhere: ties, sorts, thresholds."""

    def forward(self, x):
        half = x.reshape(len(x), 4, 2).amax(-1).relu()
        return torch.cat([half, x.abs().sort(-1)[0][:, 4:].clamp(0.1, 0.5)], 1)


class Inplace(nn.Module):
    def forward(self, x):
        return x.mul_(2).relu_()


@pytest.mark.parametrize(
    ("part", "mode"),
    [
        (Hard, "fewer bits"),
        (Only32, "float32 only"),
        (Pools, "float64"),
        (lambda: nn.Dropout(0.5), "float64"),
        (lambda: nn.AlphaDropout(0.5), "float64"),
        (lambda: nn.BatchNorm1d(8), "float64"),
        (lambda: nn.Sequential(nn.Linear(8, 8), Inplace()), "float64"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)), "float64"),
        (lambda: nn.PReLU(), "float64"),
        (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "float64"),
    ],
)
def test_healthy_models_that_are_hard_to_differentiate(patient_of, part, mode):
    finding = found(patient_of(lambda: stack(part())))
    assert finding.level is Level.PASS, finding.seen
    assert mode in finding.seen


@pytest.mark.parametrize("part", [Hard, Only32])
def test_one_percent_shows_in_float32_too(patient_of, part):
    finding = found(patient_of(lambda: stack(part(), Apply(scaled_backward(1.02)))))
    assert finding.level is Level.FAIL
    assert "module 3 (Apply): its gradient with respect to its input is 2.0" in finding.seen


def test_rows_of_zeros_and_zero_weights_are_no_alarm(patient_of):
    def build():
        model = stack()
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[0].bias)
        return model

    assert found(patient_of(build, x=X * 0)).level is Level.PASS


def test_state_from_call_to_call_is_told(patient_of):
    class Count(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    finding = found(patient_of(lambda: stack(Count())))
    assert finding.level is Level.WARN
    assert "two forward passes" in finding.seen


class Follower(nn.Module):
    """In training, a buffer follows the weights, without a gradient."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean.copy_(self.lin.weight.detach().mean(0))
        return self.lin(x) + self.mean.tanh()


def test_a_module_that_writes_a_buffer_from_its_weights_in_training_alone_is_told(patient_of):
    finding = found(patient_of(lambda: stack(Follower())))
    assert finding.level is Level.WARN
    assert finding.seen.startswith("module 2 (Follower): its gradient with respect to the parameters of 2.lin")
    assert "only in training mode" in finding.seen


def test_a_loss_that_is_not_finite_is_told(patient_of):
    finding = found(patient_of(stack, loss=lambda o, t: (o - t).square().mean() * math.inf))
    assert (finding.level, "can't be compared" in finding.seen) == (Level.WARN, True)


def test_generators_default_type_and_buffers_are_left_as_they_were(patient_of):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = found(patient_of(lambda: stack(nn.BatchNorm1d(8), nn.AlphaDropout(0.2))))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32
    assert found(patient_of(lambda: stack(nn.BatchNorm1d(8), nn.AlphaDropout(0.2)))) == first


BUILT_IN = [("digits", "mlp"), ("digits", "cnn"), ("wine", "mlp"), ("breast_cancer", "mlp"), ("diabetes", "mlp")]
BUILT_IN += list(product(["text", "adding"], ["rnn", "gru", "lstm", "transformer"]))
NORMS = ["none", "batch", "layer", "group", "rms"]
MSE = ("diabetes", "adding")


@pytest.mark.parametrize(("data", "model"), BUILT_IN)
def test_built_in_models_pass(write_study, data, model):
    for norm, dropout in zip(NORMS, [0.0, 0.2, 0.0, 0.2, 0.0], strict=True):
        config = write_study(
            data=data,
            model=model,
            loss="mse" if data in MSE else "cross_entropy",
            more=f"  model_args: {{dropout: {dropout}}}\nrecipe: {{norm: {norm}}}\n",
        )
        with as_patient(config, resolve(config), config.default_recipe(), 0) as patient:
            finding = found(patient)
        assert finding.level is Level.PASS, (norm, finding.seen)


# slopes by differences


@pytest.mark.parametrize("precision", [DOUBLE, SINGLE])
@pytest.mark.parametrize(("function", "true"), [(math.exp, 1.0), (lambda t: math.sin(3 * t) + 5, 3.0)])
def test_slopes_lie_within_their_error(function, true, precision):
    found = slope(function, 0.1, precision)
    assert abs(found.value - true) <= found.error
    assert found.error < precision.tolerance * true


def test_a_kink_makes_the_error_large():
    assert slope(lambda t: max(t, 0.0), 1.0, DOUBLE).error >= 0.5
    assert slope(lambda t: max(t, 0.0) + 0 * t + (0.3 if t > 0 else 0), 1.0, DOUBLE).error > 1


def test_a_step_function_is_flat():
    assert slope(lambda t: float(t > 2), 1.0, DOUBLE).flat


# ten rows by heart, and whether targets follow


def built_in(write_study, data, model, more=""):
    loss = "mse" if data in MSE else "cross_entropy"
    return write_study(data=data, model=model, loss=loss, more=more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model"), [("digits", "mlp"), ("wine", "mlp"), ("diabetes", "mlp"), ("adding", "gru"), ("text", "rnn")]
)
def test_built_in_models_learn_ten_rows(write_study, data, model):
    config = built_in(write_study, data, model)
    with as_patient(config, resolve(config), config.default_recipe(), 0) as patient:
        (finding,) = overfit.check(patient)
    assert finding.level is Level.PASS, finding.seen
    curve, head, *rows = finding.lines
    assert curve.startswith("loss ")
    assert head.split()[:3] == ["row", "target", "predicted"]
    assert len(rows) == 10
    if data == "digits":
        assert [line.split()[1] for line in rows] == [line.split()[2] for line in rows]


def test_code_that_can_not_learn_ten_rows_fails_with_its_table(patient_of, monkeypatch):
    monkeypatch.setattr("recipefuzz.diagnose.overfit.STEPS", 40)
    (finding,) = overfit.check(patient_of(lambda: nn.Sequential(stack(), nn.Hardtanh(-20, -10))))
    assert finding.level is Level.FAIL
    assert "under any of 8 recipes" in finding.seen
    assert "suspect the code or the labels" in finding.todo
    assert finding.evidence["cause"] == "cannot_overfit"
    assert len(finding.lines) == 12


def test_where_time_is_short_nothing_is_claimed(patient_of, monkeypatch):
    monkeypatch.setattr(overfit, "SECONDS", 0.0)
    (finding,) = overfit.check(patient_of(lambda: nn.Sequential(stack(), nn.Hardtanh(-20, -10))))
    assert (finding.level, finding.evidence["cause"]) == (Level.PASS, "")
    assert finding.seen.startswith("not decided in 0 s of computing: best skill")


def test_shuffled_labels_are_learned_by_heart_and_do_not_follow(patient_of, monkeypatch):
    monkeypatch.setattr("recipefuzz.diagnose.overfit.STEPS", 100)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(4))
    patient = patient_of(stack, y=Y[order], optimizer="adam", lr=0.01)
    assert overfit.check(patient)[0].level is Level.PASS
    (finding,) = relation.check(patient)
    assert finding.level is Level.WARN
    assert "labels can be learned by heart at best: they don't follow from the inputs" in finding.seen
    assert relation.check(patient_of(stack))[0].level is Level.PASS


@pytest.mark.parametrize("data", ["digits", "wine", "breast_cancer", "diabetes", "text", "adding"])
def test_targets_of_built_in_data_follow_and_shuffled_ones_do_not(write_study, data):
    model = {"text": "rnn", "adding": "rnn"}.get(data, "mlp")
    rows = resolve(built_in(write_study, data, model)).train
    shuffled = rows.y[torch.randperm(len(rows.y), generator=torch.Generator().manual_seed(1))]
    assert follows(rows) > 2 * relation.CLEAR
    assert follows(TensorRows(rows.x, shuffled)) < relation.CLEAR


def test_a_relation_that_simple_learners_miss_is_shown_by_the_model(patient_of, monkeypatch):
    monkeypatch.setattr("recipefuzz.checks.relation.follows", lambda _: 0.5)
    (finding,) = relation.check(patient_of(stack, optimizer="adam", lr=0.01))
    assert (finding.level, "the model predicts held-out rows" in finding.seen) == (Level.PASS, True)


def test_rows_that_are_not_finite_or_few_are_left_out():
    x = X.clone()
    x[3, 2] = math.nan
    assert follows(TensorRows(x, Y)) > relation.CLEAR
    assert math.isnan(follows(TensorRows(X[:50], Y[:50])))
    assert follows(TensorRows(X * 0, Y)) < relation.CLEAR


LOGITS = torch.tensor([[9.0, 0.0], [0.0, 9.0]])


@pytest.mark.parametrize(
    ("output", "y", "kind", "table"),
    [
        (LOGITS, torch.tensor([0, 0]), "cross_entropy", ["1    0       0          1.000", "2    0       1          1.000"]),
        (LOGITS, torch.tensor([0, 0]), "custom", ["1    0       0", "2    0       1"]),
        (LOGITS, torch.tensor([[0.5, 1], [2, 3]]), "mse", ["1    0.5 1   9 0", "2    2 3     0 9"]),
        (LOGITS[:, :1], torch.tensor([1, 0]), "bce", ["1    1       0.9999", "2    0       0.5"]),
        (LOGITS.expand(1, 2, 2), torch.tensor([[0, -100]]), "cross_entropy", ["1    0 -     0 1        1 of 1"]),
        (torch.zeros(1, 20), torch.zeros(1, 20), "mse", ["1    " + 2 * "0 0 0 0 0 0 0 0 ...  "]),
        ((LOGITS,), torch.tensor([0, 0]), "custom", []),
    ],
)  # fmt: skip
def test_recital(output, y, kind, table):
    assert [line.rstrip() for line in recital(output, y, kind)[1:]] == [line.rstrip() for line in table]
