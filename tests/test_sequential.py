"""The reference engine: what it records, what it survives, and that it never asks the device a question."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAKE_GPU
from torch import Tensor, nn
from torch.distributions import Normal, StudentT
from torch.nn import functional
from torch.utils.data import Dataset

from recipefuzz.config import load_config
from recipefuzz.engines import recorder
from recipefuzz.engines.dropout import seed_dropout
from recipefuzz.engines.job import Job, run
from recipefuzz.engines.raising import LAST
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import DatasetRows, Task, TensorRows
from recipefuzz.trace import COLUMNS, Trace
from recipefuzz.verdict import Budget

CPU = torch.device("cpu")
X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :2] * X[:, 2:4] + 0.5
TRUTH = Path(__file__).parents[2] / "shared" / "truth" / "digits-mlp"


@pytest.fixture(autouse=True)
def not_judged(monkeypatch):
    """Trials run their whole budget, except that nothing comes after a value that is not finite."""
    monkeypatch.setattr("recipefuzz.engines.sequential.judge", lambda trace, *_, **__: trace.first_bad)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def task_of(build=mlp, loss=LOSSES["mse"], kind="mse", train=None, test=None):
    rows = TensorRows(X, Y)
    return Task(train or rows, test or rows, build, loss, kind, takes_norm=False, takes=None)


def recipe(**values):
    return Recipe.of({"lr": 0.05, "batch_size": 16, **values})


def outcome_of(task, steps=24, seed=0, **values):
    return SequentialEngine(task, Budget(steps, 0), CPU).train(Job(0, recipe(**values), seed))


def trace_of(task, steps=24, seed=0, **values):
    outcome = outcome_of(task, steps, seed, **values)
    assert outcome.error == ""
    return outcome.trace


def bits(trace):
    return [getattr(trace, column).tobytes() for column in COLUMNS], trace.first_bad


# --- on the pretend accelerator, in a process of its own: the backend can't be unregistered

ON_FAKE_GPU = (
    FAKE_GPU
    + r"""
import itertools, json, sys
from recipefuzz.engines import prepare
from recipefuzz.engines.loss_scaling import LossScaler
from recipefuzz.engines.sequential import Stepper, _chunk
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import Constant
from recipefuzz.targets.builtin.models import MODELS
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.task import Task, TensorRows
from recipefuzz.trace import COLUMNS

SHAPES = {"mlp": (64, 16), "rnn": (64, 5, 3), "cnn": (64, 1, 8, 8), "transformer": (64, 5, 3)}


def attempt(name="mlp", loss=LOSSES["cross_entropy"], spoil=lambda model: None, on=device, custom=False, **values):
    shape, reads = SHAPES[name], []
    model = MODELS[name](torch.zeros(shape), 3, norm="batch", dropout=0.1)
    read = torch.Tensor.numpy
    torch.Tensor.numpy = lambda self: reads.append(self.shape) or np.zeros(self.shape)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            rows = TensorRows(torch.empty(shape, device=device), torch.empty(shape[0], dtype=torch.long, device=on))
            model = moved(model)
            spoil(model)
            task = Task(rows, rows, None, loss, "cross_entropy", takes_norm=True, takes=None)
            constant = Constant(1.0, torch.empty(64, device=device))
            if custom:
                constant = Constant(1.0, output=torch.empty(1, 3, device=device))
            recipe = Recipe.of({"lr": 0.1, "warmup_steps": 2, **values})
            stepper = Stepper(model, loss, recipe, device)
            batches = torch.empty(2, 8, dtype=torch.long, device=device)
            _chunk(task, stepper, rows, batches, constant)
            places = {str(p.device) for p in model.parameters()}
            places |= {str(t.device) for s in stepper._optimizer.state.values() for k, t in s.items()
                       if isinstance(t, torch.Tensor) and k != "step"}
        assert reads == [(2, len(COLUMNS) + 1)], reads
        assert places == {"fakegpu:0"}, places
        return "done"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.Tensor.numpy = read


def item_in_the_loss(output, target):
    loss = LOSSES["cross_entropy"](output, target)
    loss.item()
    return loss


def question_in_the_loss(output, target):
    loss = LOSSES["cross_entropy"](output, target)
    return loss if loss > 0 else -loss


def scalar_on_the_cpu(output, target):
    return LOSSES["cross_entropy"](output, target) + (output * torch.ones(3)).sum()


def buffer_on_the_cpu(model):
    norm = next(m for m in model.modules() if hasattr(m, "running_mean"))
    norm.running_mean = torch.zeros(norm.running_mean.shape)


def parameter_on_the_cpu(model):
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.bias = nn.Parameter(torch.zeros(first.bias.shape))


def item_in_the_engine():
    clip = prepare.clip_gradients

    def clip_and_ask(parameters, recipe):
        norm = clip(parameters, recipe)
        return norm if norm.item() > 0 else norm

    prepare.clip_gradients = clip_and_ask
    try:
        return attempt()
    finally:
        prepare.clip_gradients = clip


def flag_read_in_the_engine():
    step = LossScaler.step

    def step_if_clean(self, optimizer, parameters, overflow):
        if not overflow:
            step(self, optimizer, parameters, overflow)

    LossScaler.step = step_if_clean
    try:
        return attempt(precision="fp16")
    finally:
        LossScaler.step = step


OPTIONS = {"fp32": {}, "fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"}, "clip_norm": {"clip_norm": 1.0},
           "clip_value": {"clip_value": 0.1}, "fp16 clip_norm": {"precision": "fp16", "clip_norm": 1.0}}
results = {f"{name} {option}": attempt(name, **values) for name in SHAPES for option, values in OPTIONS.items()}
for optimizer, option in itertools.product(prepare.OPTIMIZERS, ("fp32", "fp16")):
    results[f"{optimizer} {option}"] = attempt(optimizer=optimizer, weight_decay=0.1, **OPTIONS[option])
results["custom loss"] = attempt(custom=True)
results["item in the loss"] = attempt(loss=item_in_the_loss)
results["question in the loss"] = attempt(loss=question_in_the_loss)
results["item in the engine"] = item_in_the_engine()
results["flag read in the engine"] = flag_read_in_the_engine()
results["scalar on the cpu"] = attempt(loss=scalar_on_the_cpu)
results["target on the cpu"] = attempt(on=torch.device("cpu"))
results["buffer on the cpu"] = attempt(spoil=buffer_on_the_cpu)
results["parameter on the cpu"] = attempt(spoil=parameter_on_the_cpu)
results["registered"] = torch._C._get_privateuse1_backend_name()
json.dump(results, sys.stdout)
"""
)


@pytest.fixture(scope="session")
def on_fake_gpu(tmp_path_factory):
    script = tmp_path_factory.mktemp("fakegpu") / "on_fake_gpu.py"
    script.write_text(ON_FAKE_GPU)
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


OPTIONS = ["fp32", "fp16", "bf16", "clip_norm", "clip_value", "fp16 clip_norm"]
TRAINS = [f"{model} {option}" for model in ("mlp", "rnn", "cnn", "transformer") for option in OPTIONS]
TRAINS += [
    f"{optimizer} {option}"
    for optimizer in ("sgd", "momentum", "adam", "adamw", "rmsprop")
    for option in ("fp32", "fp16")
]
TRAINS += ["custom loss"]


@pytest.mark.parametrize("what", TRAINS)
def test_steps_run_on_the_accelerator_with_one_read_a_chunk(on_fake_gpu, what):
    assert on_fake_gpu[what] == "done"


@pytest.mark.parametrize(
    "what", ["item in the loss", "question in the loss", "item in the engine", "flag read in the engine"]
)
def test_a_question_to_the_accelerator_would_raise(on_fake_gpu, what):
    assert re.match(r"DataDependentOutputException: aten\.(_local_scalar_dense|is_nonzero|item)", on_fake_gpu[what])


@pytest.mark.parametrize(
    "what", ["scalar on the cpu", "target on the cpu", "buffer on the cpu", "parameter on the cpu"]
)
def test_a_mix_of_devices_would_raise(on_fake_gpu, what):
    assert re.search(r"fakegpu.*cpu|cpu.*fakegpu", on_fake_gpu[what])
    assert not on_fake_gpu[what].startswith("AssertionError")


def test_the_accelerator_was_registered_in_that_process_alone(on_fake_gpu):
    assert on_fake_gpu["registered"] == "fakegpu"
    assert torch._C._get_privateuse1_backend_name() != "fakegpu"


# --- the first value that is not finite


class Planted:
    """A mean squared error that plants a fault at its k-th training step (evaluations ask for no gradient)."""

    def __init__(self, fault, k):
        self.fault, self.k, self.calls = fault, k, 0

    def __call__(self, output, target):
        loss = ((output - target) ** 2).mean()
        if not output.requires_grad:
            return loss
        self.calls += 1
        return self.fault(loss, output) if self.calls == self.k else loss


def scaled_gradient(factor):
    def plant(loss, output):
        output.register_hook(lambda g: g * factor)
        return loss

    return plant


def one_gradient(value):
    def plant(loss, output):
        output.register_hook(lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 3, value, g))
        return loss

    return plant


FAULTS = {
    "nan loss": (lambda loss, _: loss * math.nan, 0),
    "inf loss": (lambda loss, _: loss + math.inf, 0),
    "minus inf loss": (lambda loss, _: loss - math.inf, 0),
    "nan gradient": (scaled_gradient(math.nan), 0),
    "one nan in the gradient": (one_gradient(math.nan), 0),
    "inf gradient": (one_gradient(math.inf), 0),
    "overflowing update": (scaled_gradient(1e38), 1),  # parameters of 1e37 are finite, the next loss is not
}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 12, 23, 24])
@pytest.mark.parametrize(("fault", "later"), FAULTS.values(), ids=FAULTS)
def test_first_bad_is_the_step_of_the_fault(fault, later, k, optimizer):
    planted = Planted(fault, k)
    trace = trace_of(task_of(lambda: nn.Linear(6, 2), planted), optimizer=optimizer)
    clean = trace_of(task_of(lambda: nn.Linear(6, 2)), optimizer=optimizer)
    if k + later > 24:
        assert trace.first_bad is None
        return
    first = k + later
    assert trace.first_bad == trace.steps == first
    assert trace.steps_run == planted.calls == next(c for c in Budget(24, 0).checkpoints() if c >= first)
    assert np.array_equal(trace.loss[: k - 1], clean.loss[: k - 1])
    assert all(np.isfinite(getattr(trace, column)[: k - 1]).all() for column in COLUMNS)
    assert all(step < first for step, _ in trace.heldout)
    assert [pair for pair in trace.heldout if pair[0] < k] == [pair for pair in clean.heldout if pair[0] < k]


class Checked(nn.Linear):
    """Raises on what is not finite, as distributions and decompositions do."""

    def forward(self, x):
        output = super().forward(x)
        if not output.isfinite().all():
            raise ValueError("invalid values")
        return output


@pytest.mark.parametrize("k", [1, 2, 7, 23, 24])
def test_what_is_raised_after_a_bad_step_is_that_steps_doing(k):
    faulty = Planted(FAULTS["nan loss"][0], k), Planted(FAULTS["nan loss"][0], k)
    trace = trace_of(task_of(lambda: Checked(6, 2), faulty[0]))
    unchecked = trace_of(task_of(lambda: nn.Linear(6, 2), faulty[1]))
    assert trace.first_bad == k
    assert bits(trace) == bits(unchecked)
    assert trace.steps_run == faulty[0].calls


def enough(*_):
    raise ValueError("enough")


ON_BAD_VALUES = {
    "a mean of nan": lambda loss, output: Normal(output * math.nan, 1.0).log_prob(output).mean() + loss,
    "one of three parameters": lambda loss, output: StudentT(output.exp(), output * math.nan, 1.0).mean.sum() + loss,
    "a decomposition": lambda loss, output: torch.linalg.eigh(output.T @ output * math.nan)[0].sum() + loss,
    "of infinities": lambda loss, output: torch.linalg.eigh(output.T @ output * math.inf)[0].sum() + loss,
}
ON_OTHERS = {
    "a condition": enough,
    "the size of a parameter": lambda loss, output: Normal(output, -output.exp()).mean.sum() + loss,
    "long after a nan": lambda loss, output: enough(loss * math.nan, *(output.exp() for _ in range(LAST))),
    "after a mask": lambda loss, output: enough(
        loss, output.masked_fill(torch.tensor([True, False]), -math.inf).softmax(1)
    ),
}


@pytest.mark.parametrize("k", [1, 5, 24])
@pytest.mark.parametrize("raising", ON_BAD_VALUES.values(), ids=ON_BAD_VALUES)
def test_what_is_raised_on_a_bad_value_makes_a_bad_step(raising, k):
    def again(output, target):  # a step that raised is made once more
        planted.calls -= planted.calls >= k
        return planted(output, target)

    planted = Planted(raising, k)
    trace = trace_of(task_of(lambda: nn.Linear(6, 2), again))
    assert trace.first_bad == trace.steps == k
    assert math.isnan(trace.loss[-1])
    assert np.isfinite(trace.loss[:-1]).all()


@pytest.mark.parametrize("raising", ON_OTHERS.values(), ids=ON_OTHERS)
def test_what_is_raised_on_something_else_is_an_error(raising):
    def again(output, target):
        planted.calls -= planted.calls >= 5
        return planted(output, target)

    planted = Planted(raising, 5)
    assert outcome_of(task_of(lambda: nn.Linear(6, 2), again)).error.startswith("ValueError: ")


@pytest.mark.parametrize("k", [1, 4, 9])
def test_first_bad_of_a_parameter_that_breaks_by_itself(k):
    """The loss and the gradient of the step are finite, and the flag is the parameter's."""

    def build():
        built.append(nn.Linear(6, 2))
        return built[-1]

    def plant(loss, _):
        built[-1].bias.register_hook(lambda g: torch.full_like(g, math.inf))
        return loss

    built = []
    trace = trace_of(task_of(build, Planted(plant, k)))
    assert trace.first_bad == k
    assert np.isfinite(trace.loss).all()


@pytest.mark.parametrize(
    ("factor", "values"),
    [
        (1e25, {"clip_norm": 1.0}),  # finite gradients, whose squares have no finite sum: an empty step
        (math.inf, {"clip_value": 0.1}),  # clipped to finite values
        (1e38, {"precision": "fp16"}),  # the scaled gradient overflows: the step is taken back
        (math.nan, {"precision": "fp16"}),
    ],
)
def test_a_gradient_that_does_no_harm_is_not_bad(factor, values):
    def build():
        model = nn.Linear(6, 2)
        for p in model.parameters():
            p.register_hook(lambda g: (g.abs() + 1) * factor if planted.calls == 5 else g)
        return model

    planted = Planted(lambda loss, _: loss, 5)
    trace = trace_of(task_of(build, planted), **values)
    assert trace.first_bad is None
    assert trace.steps == 24


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("values", [{}, {"clip_norm": 1.0}, {"optimizer": "adam"}])
def test_first_bad_of_fp16_is_when_the_scale_is_no_longer_to_blame(factor, values):
    """The step is taken back while the scale falls from 2**16 to 1, once a step: bad is the one after those 16."""

    def build():
        model = nn.Linear(6, 2)
        model.weight.register_hook(lambda g: (g.abs() + 1) * factor if planted.calls >= 5 else g)
        return model

    planted = Planted(lambda loss, _: loss, 5)
    small = TensorRows(X / 100, Y / 100)  # nothing else overflows
    trace = trace_of(task_of(build, planted, train=small, test=small), steps=40, precision="fp16", **values)
    assert trace.first_bad == 5 + 16


def test_an_early_death_is_paid_for_up_to_its_checkpoint():
    trace = trace_of(task_of(), steps=400, lr=1e30)
    assert trace.first_bad <= 3
    assert trace.steps_run == Budget(400, 0).checkpoints()[0]
    assert trace.heldout == ()


# --- records


def test_records_are_the_norms_that_they_are_called():
    weight, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    records = recorder.Recorder([bias, weight])
    for change in (1.0, -0.5):
        with torch.no_grad():
            weight += change
            bias += 2 * change
        records.add(torch.tensor(7.0), torch.tensor(3.0))
    rows = records.take()
    change = [(6 + 4 * 4) ** 0.5, 0.5 * (6 + 4 * 4) ** 0.5]
    assert rows[:, :2].tolist() == [[7.0, 3.0]] * 2
    assert rows[:, 2].tolist() == pytest.approx(change)
    assert rows[:, 3].tolist() == pytest.approx([6**0.5, 0.5 * 6**0.5])
    assert rows[:, 4].tolist() == pytest.approx([6**0.5, 24**0.5])
    assert rows[:, 5].tolist() == pytest.approx([10**0.5, (24 + 36) ** 0.5])
    assert rows[:, 6].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("weight", "loss", "gradient", "bad"),
    [
        (1e30, 1.0, 1.0, False),  # finite, though its square is not
        (1.0, 1.0, math.inf, False),  # a sum of squares that overflowed
        (math.inf, 1.0, 1.0, True),
        (math.nan, 1.0, 1.0, True),
        (1.0, math.inf, 1.0, True),
        (1.0, 1.0, math.nan, True),
    ],
)
def test_a_step_is_bad_where_something_is_not_finite(weight, loss, gradient, bad):
    parameter = torch.nn.Parameter(torch.zeros(1000, 2))
    records = recorder.Recorder([parameter])
    with torch.no_grad():
        parameter[123, 1] = weight
    records.add(torch.tensor(loss), torch.tensor(gradient))
    assert bool(records.take()[0, 6]) is bad


def chunk_of(rows, bad=()):
    values = np.random.default_rng(0).random((rows, len(COLUMNS) + 1))
    values[:, -1] = [float(i in bad) for i in range(rows)]
    return values


@pytest.mark.parametrize("bad", [(), (0,), (4,), (9,), (4, 7)])
@pytest.mark.parametrize("parts", [(10,), (1, 9), (5, 5), (3, 3, 4), (1,) * 10])
def test_a_trace_is_the_same_however_it_was_extended(parts, bad):
    chunk, trace, start = chunk_of(10, bad), Trace(), 0
    for part in parts:
        trace = trace.extended(chunk[start : start + part])
        start += part
        if trace.first_bad is not None:
            break
    end = bad[0] + 1 if bad else 10
    assert (trace.first_bad, trace.steps, trace.steps_run) == (bad[0] + 1 if bad else None, end, start)
    for i, column in enumerate(COLUMNS):
        assert np.array_equal(getattr(trace, column), chunk[:end, i])


def test_traces_can_not_be_written():
    trace = Trace().extended(chunk_of(3)).evaluated(0.5)
    assert trace.heldout == ((3, 0.5),)
    with pytest.raises(ValueError, match="read-only"):
        trace.loss[0] = 1
    assert trace.update_ratio.shape == (3,)
    assert Trace().curve(4) == []
    assert trace.curve(1) == [pytest.approx(trace.loss.mean(), rel=1e-3)]


def test_the_constant_is_judged_on_the_trials_own_batches():
    trace = trace_of(task_of())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 90, (16,), generator=generator) for _ in range(24)]
    expected = [float(functional.mse_loss(Y.mean(0).expand(16, 2), Y[b])) for b in batches]
    np.testing.assert_allclose(trace.constant, expected, rtol=1e-5)
    custom = trace_of(task_of(loss=functional.mse_loss, kind="custom"))
    np.testing.assert_allclose(custom.constant, expected, rtol=1e-3)
    assert np.array_equal(custom.loss, trace.loss)


def test_a_loss_that_draws_random_numbers_draws_the_same_for_the_constant_or_not():
    """The constant's loss is asked for between the steps, and must not move the model's own random numbers."""

    def noisy(output, target):
        return ((output - target + torch.rand(())) ** 2).mean()

    trace = trace_of(task_of(loss=noisy, kind="custom"))
    torch.manual_seed(0)
    model, order = mlp(), torch.Generator().manual_seed(0)
    seed_dropout(model, 0)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(24):
        rows = torch.randint(0, 90, (16,), generator=order)
        optimizer.zero_grad()
        loss = noisy(model(X[rows]), Y[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(trace.loss, losses, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "custom"])
def test_a_loss_of_one_element(kind):
    trace = trace_of(task_of(loss=lambda o, y: functional.mse_loss(o, y)[None], kind=kind))
    assert np.array_equal(trace.loss, trace_of(task_of()).loss)
    assert trace.heldout == trace_of(task_of()).heldout


# --- evaluations


class Shuffled(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + torch.rand(6), Y[i]


@pytest.mark.parametrize("test", [TensorRows(X, Y), DatasetRows(Shuffled())])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_do_not_disturb_the_training(monkeypatch, test, precision):
    task = task_of(test=test)
    traces = {}
    for often in (True, False):
        monkeypatch.setattr(Budget, "evaluates_at", lambda _, __, often=often: often)
        traces[often] = trace_of(task, optimizer="adam", precision=precision)
    assert bits(traces[True]) == bits(traces[False])
    assert [step for step, _ in traces[True].heldout] == list(Budget(24, 0).checkpoints())
    assert traces[False].heldout == ()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [30, 512, 700, 5000])
def test_held_out_loss_is_in_eval_mode_and_fp32(rows, precision):
    def build():
        built.append(mlp())
        return built[-1]

    built = []
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    y = torch.linspace(0, 5, rows)[:, None].expand(rows, 2)
    trace = trace_of(task_of(build, test=TensorRows(x, y)), precision=precision, target_norm="standardize")
    assert built[-1].training
    used = torch.linspace(0, rows - 1, 2048).round().long() if rows > 2048 else torch.arange(rows)
    scaled = (y - Y.mean(0)) / Y.std(0, correction=0)
    with torch.no_grad():
        expected = functional.mse_loss(built[-1].eval()(x[used]), scaled[used])
    assert trace.heldout[-1] == (24, pytest.approx(float(expected), rel=1e-5))
    assert [step for step, _ in trace.heldout] == [
        c for c in Budget(24, 0).checkpoints() if Budget(24, 0).evaluates_at(c)
    ]
    assert len(trace.heldout) == 4


# --- denormal numbers


def flushes():
    return bool(torch.tensor(1e-38) / 1e3 == 0)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("users", [False, True])
def test_denormals_are_flushed_during_a_trial_only(users, raises):
    def loss(output, target):
        during.append(flushes())
        if raises:
            raise RuntimeError("now")
        return functional.mse_loss(output, target)

    during = []
    try:
        if not torch.set_flush_denormal(users):
            pytest.skip("this processor can't flush denormal numbers")
        outcome = outcome_of(task_of(loss=loss))
        assert flushes() == users
    finally:
        torch.set_flush_denormal(False)
    assert bool(outcome.error) == raises
    assert during
    assert all(during)


# --- errors are outcomes

RAISING = {
    "model": ("def build():\n    return nn.Linear(3, absent)", "NameError: name 'absent' is not defined (case.py:20)"),
    "forward": (
        "class build(nn.Linear):\n    def __init__(self): super().__init__(3, 1)\n    def forward(self, x): return x @ x",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x3 and 8x3) (case.py:21)",
    ),
    "loss": ("def loss(o, y):\n    return {}['key']", "KeyError: 'key' (case.py:20)"),
    "no message": ("def loss(o, y):\n    raise ValueError", "ValueError (case.py:20)"),
    "several lines": ("def loss(o, y):\n    raise ValueError('first\\nsecond')", "ValueError: first (case.py:20)"),
    "assertion": ("def loss(o, y):\n    assert len(o) == 3", "AssertionError (case.py:20)"),
    "exit": ("def loss(o, y):\n    sys.exit('enough')\nimport sys", "SystemExit: enough (case.py:20)"),
    "memory": ("def loss(o, y):\n    raise MemoryError", "out of memory: MemoryError (case.py:20)"),
    "memory with a message": ("def loss(o, y):\n    raise MemoryError('1 TB')", "out of memory: MemoryError: 1 TB (case.py:20)"),
    "accelerator's memory": (
        "def loss(o, y):\n    raise torch.OutOfMemoryError('2 GB')", "out of memory: OutOfMemoryError: 2 GB (case.py:20)",
    ),
    "cpu's memory": ("def loss(o, y):\n    return torch.empty(2**56)", "out of memory: RuntimeError: "),
    "deep": ("def deep(o):\n    return deep(o)\ndef loss(o, y): return deep(o)", "RecursionError: maximum recursion depth exceeded"),
    "backward": (
        "class Bad(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x): return x * 1\n    @staticmethod\n    def backward(ctx, g): return g.absent\ndef loss(o, y): return Bad.apply(o).mean()",
        "AttributeError: 'Tensor' object has no attribute 'absent' (case.py:23)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "error"), RAISING.values(), ids=RAISING)
def test_what_the_users_code_raises_is_the_outcome(write_study, code, error):
    task = resolve(write_study(code))
    task = Task(task.train, task.test, task.build, sys.modules["case"].loss, "mse", takes_norm=False, takes=None)
    outcome = outcome_of(task, batch_size=8)
    assert outcome.error.startswith(error)
    assert len(outcome.error.splitlines()) == 1
    assert outcome.verdict is None
    assert outcome.trace.steps == 0
    assert outcome.job.key == 0


def test_a_trial_runs_on_one_thread_whatever_the_users_setting():
    """Sums are rounded by their order: a trial in this process has the bits of one in the pool's processes."""

    def loss(output, target):
        during.append(torch.get_num_threads())
        return functional.mse_loss(output, target)

    during = []
    try:
        torch.set_num_threads(3)
        outcome_of(task_of(loss=loss, kind="custom"))
        outcome_of(task_of(loss=lambda *_: 1 / 0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert set(during) == {1}


def test_an_engine_goes_on_after_an_error():
    """A loss may raise at any step of any trial; the others are as if it had not."""

    def loss(output, target):
        calls.append(1)
        if len(calls) in (10, 40):
            raise RuntimeError("now and then")
        return functional.mse_loss(output, target)

    calls = []
    engine = SequentialEngine(task_of(loss=loss), Budget(24, 0), CPU)
    outcomes = [engine.train(Job(i, recipe(), 0)) for i in range(4)]
    assert [bool(o.error) for o in outcomes] == [True, False, True, False] or sum(bool(o.error) for o in outcomes) == 2
    good = [o for o in outcomes if not o.error]
    assert {str(bits(o.trace)) for o in good} == {str(bits(trace_of(task_of())))}


def test_a_bad_scaling_is_an_outcome():
    rows = TensorRows(torch.arange(90), Y)
    outcome = outcome_of(task_of(train=rows, test=rows), input_norm="minmax")
    assert outcome.error.startswith("ValueError: input_norm: minmax needs floating-point values")


# --- the engine's interface


def test_jobs_are_trained_in_order():
    engine = SequentialEngine(task_of(), Budget(8, 0), CPU)
    jobs = [Job(key, recipe(lr=lr), seed) for key, lr, seed in ((7, 0.1, 0), (3, 0.2, 0), (5, 0.1, 1))]
    outcomes = list(run(engine, jobs))
    assert [o.job for o in outcomes] == jobs
    assert len({o.trace.loss.tobytes() for o in outcomes}) == 3
    assert all(o.seconds > 0 for o in outcomes)
    assert [o.baseline for o in outcomes] == pytest.approx([float(Y.var(0, correction=0).mean())] * 3, rel=1e-5)
    assert engine.collect() == []
    engine.submit(jobs[0])
    engine.close()
    assert engine.collect() == []


# --- the truth set's own loop


@pytest.mark.skipif(not TRUTH.is_dir(), reason=f"the truth set is not here: {TRUTH}")
@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.05, "init_scale": 1.5, "norm": "batch", "clip_norm": None, "optimizer": "momentum"},
        {"lr": 0.002, "init_scale": 0.5, "norm": "layer", "clip_norm": 1.0, "optimizer": "adam"},
        {"lr": 0.1, "init_scale": 3.0, "norm": "none", "clip_norm": 5.0, "optimizer": "sgd"},
    ],
)
def test_a_truth_task_is_trained_as_its_readme_says(values):
    task = resolve(load_config(TRUTH / "config.yaml"))
    trace = trace_of(task, steps=100, seed=2, batch_size=64, **values)
    case = sys.modules["case"]
    x, y, *_ = case.load()
    torch.manual_seed(2)
    model = case.build(norm=values["norm"])
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p *= values["init_scale"]
    kind, options = {"sgd": ("SGD", {}), "momentum": ("SGD", {"momentum": 0.9}), "adam": ("Adam", {})}[
        values["optimizer"]
    ]
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=values["lr"], **options)
    order, losses = torch.Generator().manual_seed(2), []
    for _ in range(100):
        rows = torch.randint(0, len(x), (64,), generator=order)
        optimizer.zero_grad()
        loss: Tensor = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        if values["clip_norm"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), values["clip_norm"])
        optimizer.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(trace.loss, losses, rtol=1e-5)
    assert losses[-1] < 0.8 * losses[0]
