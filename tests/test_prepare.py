"""What each value of a recipe does, against a plain PyTorch loop written here, from the words of the README alone."""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from recipefuzz.engines import loss_scaling, prepare
from recipefuzz.engines.dropout import seed_dropout
from recipefuzz.engines.job import Job
from recipefuzz.engines.loss_scaling import LossScaler
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.recipe import Recipe
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.task import DatasetRows, Task, TensorRows
from recipefuzz.trace import COLUMNS
from recipefuzz.verdict import Budget

CPU = torch.device("cpu")
STEPS = 12
X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
Y = (X[:, 0] * X[:, 1] > 1).long() + (X[:, 2] > 1).long()


@pytest.fixture(autouse=True)
def not_judged(monkeypatch):
    """Trials run their whole budget, except that nothing comes after a value that is not finite."""
    monkeypatch.setattr("recipefuzz.engines.sequential.judge", lambda trace, *_, **__: trace.first_bad)


def normalization(norm, width):
    return {
        "none": list,
        "batch": lambda: [nn.BatchNorm1d(width)],
        "layer": lambda: [nn.LayerNorm(width)],
        "group": lambda: [nn.GroupNorm(4, width)],
        "rms": lambda: [nn.RMSNorm(width, 1e-5)],
    }[norm]()


def mlp(norm="none", width=8):
    hidden = [nn.Linear(6, width), *normalization(norm, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, width), *normalization(norm, width), nn.ReLU(), nn.Linear(width, 3))


def task_of(build: Callable[..., nn.Module] = mlp, x=X, y=Y, loss="cross_entropy", *, takes_norm=False):
    rows = TensorRows(x, y)
    return Task(rows, rows, build, LOSSES[loss], loss, takes_norm=takes_norm, takes=None)


def trained(task: Task, seed=0, steps=STEPS, **values):
    outcome = SequentialEngine(task, Budget(steps, 0), CPU).train(Job(0, recipe(**values), seed))
    assert outcome.error == ""
    return outcome.trace


def recipe(**values):
    return Recipe.of({"lr": 0.05, "batch_size": 16, **values})


class Plain:
    """One trial by the README of shared/truth: what is recorded of it, and the model afterwards."""

    def __init__(self, build, x, y, loss, *, seed=0, steps=STEPS, init_scale=1.0, clip_norm=None, clip_value=None,
                 batch_size=16, warmup=0, dtype=None, optimizer="sgd", lr=0.05, weight_decay=None):  # fmt: skip
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.model = build()
        seed_dropout(self.model, seed)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.dim() >= 2:
                    p *= init_scale
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        kind = {"sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[optimizer]
        options = {"momentum": 0.9} if optimizer == "momentum" else {}
        options |= {} if weight_decay is None else {"weight_decay": weight_decay}
        optimizer = getattr(torch.optim, kind)(self.parameters, lr=lr, **options)
        order = torch.Generator().manual_seed(seed)
        self.model.train()
        self.loss, self.grad_norm, self.update_norm, self.param_norm = [], [], [], []
        for step in range(1, steps + 1):
            rows = torch.randint(0, len(x), (batch_size,), generator=order)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, step / warmup) if warmup else lr
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                value = loss(self.model(x[rows]), y[rows])
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm or torch.inf)
            if clip_value is not None:
                torch.nn.utils.clip_grad_value_(self.parameters, clip_value)
            before = self.flat()
            optimizer.step()
            self.loss.append(float(value.detach()))
            self.grad_norm.append(float(norm))
            self.param_norm.append(float(before.norm()))
            self.update_norm.append(float((self.flat() - before).norm()))
        torch.set_rng_state(state)

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])


def assert_same(trace, plain: Plain, rel=2e-5):
    assert trace.steps == len(plain.loss)
    for column in ("loss", "grad_norm", "update_norm", "param_norm"):
        np.testing.assert_allclose(getattr(trace, column), getattr(plain, column), rtol=rel, atol=1e-6, err_msg=column)


def ce(output, target):
    return functional.cross_entropy(output, target)


# --- every axis


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("weight_decay", [None, 0.02])
@pytest.mark.parametrize("init_scale", [1.0, 2.5])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_a_trial_is_the_plain_loop(optimizer, norm, clip_norm, init_scale, weight_decay, warmup):
    given = {"optimizer": optimizer, "clip_norm": clip_norm, "init_scale": init_scale, "weight_decay": weight_decay}
    trace = trained(task_of(takes_norm=True), norm=norm, warmup_steps=warmup, **given)
    assert_same(trace, Plain(lambda: mlp(norm), X, Y, ce, warmup=warmup, **given))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("batch_size", [1, 16, 200])
def test_seeds_and_batch_sizes(seed, batch_size):
    trace = trained(task_of(), seed, batch_size=batch_size)
    assert_same(trace, Plain(mlp, X, Y, ce, seed=seed, batch_size=batch_size))


def test_batches_and_weights_are_the_plain_loops():
    order, generator = prepare.BatchOrder(90, 16, 7), torch.Generator().manual_seed(7)
    drawn = torch.cat([order.draw(3, CPU), order.draw(5, CPU)])
    assert torch.equal(drawn, torch.stack([torch.randint(0, 90, (16,), generator=generator) for _ in range(8)]))
    torch.manual_seed(3)
    expected = mlp()
    torch.manual_seed(3)
    model = prepare.build_model(task_of(), recipe(), CPU)
    assert model.training
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("clip_norm", "clip_value"), [(None, 0.01), (0.3, 0.02), (0.3, 10.0), (1e-3, None)])
def test_clipping_by_norm_is_before_clipping_by_value(clip_norm, clip_value):
    trace = trained(task_of(), clip_norm=clip_norm, clip_value=clip_value)
    assert_same(trace, Plain(mlp, X, Y, ce, clip_norm=clip_norm, clip_value=clip_value))


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [(0, [1, 1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1, 1]), (2, [0.5, 1, 1, 1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1, 1])],
)
def test_warmup_rises_linearly_and_stays(warmup, rates):
    assert [prepare.learning_rate(recipe(lr=3, warmup_steps=warmup), step) / 3 for step in range(6)] == rates


def test_weight_decay_of_null_is_the_optimizers_own():
    parameter = [nn.Parameter(torch.ones(2, 2))]
    decays = {
        (kind, decay): prepare.build_optimizer(parameter, recipe(optimizer=kind, weight_decay=decay)).defaults[
            "weight_decay"
        ]
        for kind, decay in itertools.product(prepare.OPTIMIZERS, (None, 0.0, 0.5))
    }
    assert decays[("adamw", None)] == 0.01
    assert {decays[(kind, None)] for kind in prepare.OPTIMIZERS if kind != "adamw"} == {0}
    assert {decays[(kind, 0.0)] for kind in prepare.OPTIMIZERS} == {0}
    assert {decays[(kind, 0.5)] for kind in prepare.OPTIMIZERS} == {0.5}


@pytest.mark.parametrize("input_norm", ["none", "standardize", "minmax"])
@pytest.mark.parametrize("target_norm", ["none", "standardize", "minmax"])
def test_scaling(input_norm, target_norm):
    def by_hand(v, how):
        if how == "none":
            return v
        low, high = v.min(0).values, v.max(0).values
        return (v - v.mean(0)) / v.std(0, correction=0) if how == "standardize" else (v - low) / (high - low)

    y = X[:, :2] ** 2
    trace = trained(
        task_of(lambda: nn.Linear(6, 2), y=y, loss="mse"), lr=1e-3, input_norm=input_norm, target_norm=target_norm
    )
    x, y = by_hand(X, input_norm), by_hand(y, target_norm)
    plain = Plain(lambda: nn.Linear(6, 2), x, y, functional.mse_loss, lr=1e-3)
    assert_same(trace, plain)
    with torch.no_grad():
        assert trace.heldout[-1] == (STEPS, pytest.approx(float(functional.mse_loss(plain.model(x), y)), rel=1e-4))


def test_other_axes_go_to_the_factory():
    trace = trained(task_of(takes_norm=True), width=5, norm="rms")
    assert_same(trace, Plain(lambda: mlp("rms", 5), X, Y, ce))


class Lazily(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], Y[i]


@pytest.mark.parametrize("input_norm", ["none", "standardize"])
def test_a_dataset_trains_as_its_tensors_do(input_norm):
    whole, rows = task_of(), DatasetRows(Lazily())
    lazily = Task(rows, rows, mlp, whole.loss, whole.loss_kind, takes_norm=False, takes=None)
    np.testing.assert_allclose(
        trained(lazily, input_norm=input_norm).loss, trained(whole, input_norm=input_norm).loss, rtol=1e-5
    )


# --- initialization


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.core = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.LSTM(4, 4)
        self.norm, self.head, self.plain = nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Bilinear(2, 2, 3)
        self.scalar, self.vector, self.cube = (nn.Parameter(torch.ones(s)) for s in ((), (3,), (2, 2, 2)))
        self.register_buffer("table", torch.ones(3, 3))


def test_init_scale_is_for_parameters_of_two_or_more_dimensions():
    torch.manual_seed(0)
    plain = Everything()
    torch.manual_seed(0)
    scaled = prepare.build_model(task_of(Everything), recipe(init_scale=3.0), CPU)
    names = set()
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(after, before * 3 if before.dim() >= 2 else before), name
        names |= {name} if before.dim() >= 2 else set()
    assert names == {
        "embedding.weight", "conv.weight", "core.weight_ih_l0", "core.weight_hh_l0", "head.weight", "plain.weight", "cube",
    }  # fmt: skip
    assert torch.equal(scaled.table, plain.table)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 7)
        self.head = nn.Linear(7, 7)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_tied_weights_are_scaled_once_and_stay_tied():
    ids = torch.arange(90) % 7
    task = task_of(Tied, ids, (ids + 1) % 7)
    model = prepare.build_model(task, recipe(init_scale=3.0), CPU)
    assert model.head.weight is model.embedding.weight
    assert_same(trained(task, init_scale=3.0), Plain(Tied, ids, (ids + 1) % 7, ce, init_scale=3.0))


@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_frozen_parameters_are_scaled_and_do_not_move(weight_decay):
    def build():
        model = mlp()
        model[0].requires_grad_(False)
        built.append(model)
        return model

    built = []
    trace = trained(task_of(build), init_scale=2.0, optimizer="adamw", weight_decay=weight_decay)
    assert_same(trace, Plain(build, X, Y, ce, init_scale=2.0, optimizer="adamw", weight_decay=weight_decay))
    torch.manual_seed(0)
    assert torch.equal(built[0][0].weight, mlp()[0].weight * 2)


def test_parameters_without_a_gradient_are_no_trouble():
    def build():
        model = mlp()
        model.unused = nn.Parameter(torch.ones(3, 3))
        model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)), x)
        return model

    for kind in prepare.OPTIMIZERS:
        assert_same(trained(task_of(build), optimizer=kind), Plain(build, X, Y, ce, optimizer=kind))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_embeddings_of_sparse_gradients_train_as_dense_ones_do(kind, optimizer):
    """Adam and the gradient's norm take no sparse ones."""

    def build(sparse=False):
        return nn.Sequential(kind(7, 5, sparse=sparse), nn.Flatten(), nn.Linear(30 if kind is nn.Embedding else 5, 3))

    ids, given = (X * 3).long() % 7, {"optimizer": optimizer, "clip_norm": 0.5}
    trace = trained(task_of(lambda: build(sparse=True), x=ids), **given)
    assert_same(trace, Plain(build, ids, Y, ce, **given))


# --- normalization layers of models that don't take `norm`


def built_with(first, second):
    return lambda: nn.Sequential(
        nn.Linear(6, 8), first(8), nn.ReLU(), nn.Linear(8, 8), second(8), nn.ReLU(), nn.Linear(8, 3)
    )


REPLACEMENTS = {
    None: (nn.BatchNorm1d, nn.LayerNorm),
    "none": (lambda _: nn.Identity(), lambda _: nn.Identity()),
    "batch": (nn.BatchNorm1d, nn.BatchNorm1d),
    "layer": (nn.LayerNorm, nn.LayerNorm),
    "group": (lambda f: nn.GroupNorm(4, f), lambda f: nn.GroupNorm(4, f)),
    "rms": (lambda f: nn.RMSNorm(f, 1e-5), lambda f: nn.RMSNorm(f, 1e-5)),
}


@pytest.mark.parametrize("norm", REPLACEMENTS)
def test_layers_are_replaced_where_the_factory_takes_no_norm(norm):
    trace = trained(task_of(built_with(nn.BatchNorm1d, nn.LayerNorm)), norm=norm, init_scale=0.5)
    assert_same(trace, Plain(built_with(*REPLACEMENTS[norm]), X, Y, ce, init_scale=0.5))


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "rms"])
def test_nothing_to_replace_is_an_error(norm):
    message = rf"norm = '{norm}': the model factory takes no `norm` argument, and the model has no normalization layers"
    with pytest.raises(ValueError, match=message):
        prepare.build_model(task_of(), recipe(norm=norm), CPU)
    outcome = SequentialEngine(task_of(), Budget(STEPS, 0), CPU).train(Job(0, recipe(norm=norm), 0))
    assert outcome.error.startswith(f"ValueError: norm = '{norm}'")
    assert outcome.verdict is None


@pytest.mark.parametrize("norm", [None, "none"])
def test_nothing_to_replace_and_nothing_wanted(norm):
    assert_same(trained(task_of(), norm=norm), Plain(mlp, X, Y, ce))


@pytest.mark.parametrize("made", [None, 3, [nn.Linear(6, 3)]])
def test_a_factory_that_makes_no_module(made):
    with pytest.raises(
        ValueError, match=r"the model factory returned (None \(is a `return` missing\?\)|a \w+), not a torch"
    ):
        prepare.build_model(task_of(lambda: made), recipe(), CPU)


# --- all sorts of models


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


def seen(model):
    with torch.no_grad():
        model(X[:2])
    return model


@pytest.mark.parametrize("norm", [None, "layer"])
def test_lazy_layers_are_built_before_they_are_scaled(norm):
    def by_hand():
        model = seen(lazy())
        if norm:
            model[1] = nn.LayerNorm(8)
        return model

    trace = trained(task_of(lazy), norm=norm, init_scale=0.5, optimizer="adam")
    assert_same(trace, Plain(by_hand, X, Y, ce, init_scale=0.5, optimizer="adam"))


class Recurrent(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core, self.head = core(2, 5, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.core(x.view(-1, 3, 2))[0][:, -1])


def dropout():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout1d(),
        nn.LazyLinear(3),
    )


def attention():
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.1, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))


MODELS = {
    "dropout": dropout,
    "convolution": lambda: seen(convolution()),
    "rnn": lambda: Recurrent(nn.RNN),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": attention,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), nn.Softplus()),
}


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_models_with_randomness_and_state(build, optimizer):
    """Random numbers of the model's own go on from its initialization, evaluations in between or not."""
    trace = trained(task_of(build), optimizer=optimizer, init_scale=0.8, clip_norm=1.0)
    assert_same(trace, Plain(build, X, Y, ce, optimizer=optimizer, init_scale=0.8, clip_norm=1.0))


# --- precision


@pytest.mark.parametrize("build", [mlp, dropout, MODELS["lstm"]])
def test_bf16_is_autocast(build):
    trace = trained(task_of(build), precision="bf16", clip_norm=1.0, optimizer="adam")
    plain = Plain(build, X, Y, ce, dtype=torch.bfloat16, clip_norm=1.0, optimizer="adam")
    assert_same(trace, plain)
    assert abs(trace.loss - trained(task_of(build), clip_norm=1.0, optimizer="adam").loss).max() > 1e-5


# factor on the loss: 1e3 overflows at first and settles, 1e-3 lets the scale grow, 1e6 overflows often
SCALES = [(1.0, 3), (1e3, 3), (1e-3, 2), (1e6, 2), (1e3, 1)]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("factor", "interval"), SCALES)
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_loss_scaling_is_torchs_grad_scaler(monkeypatch, kind, factor, interval, clip_norm):
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", interval)
    given = recipe(optimizer=kind, clip_norm=clip_norm, lr=0.05 / factor if kind in ("sgd", "momentum") else 0.01)
    torch.manual_seed(0)
    ours = mlp()
    theirs = copy.deepcopy(ours)
    scaler, reference = LossScaler(CPU), torch.amp.GradScaler("cpu", growth_interval=interval)
    optimizers = [prepare.build_optimizer(list(m.parameters()), given) for m in (ours, theirs)]
    generator, overflows, scales = torch.Generator().manual_seed(0), 0, []
    for _ in range(14):
        rows = torch.randint(0, 90, (16,), generator=generator)
        losses = []
        for model in (ours, theirs):
            with torch.autocast("cpu", dtype=torch.float16):
                losses.append(ce(model(X[rows]), Y[rows]) * factor)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(losses[0]).backward()
        overflow = scaler.unscale(list(ours.parameters()))
        norm = prepare.clip_gradients(list(ours.parameters()), given)
        scaler.step(optimizers[0], list(ours.parameters()), overflow)
        reference.scale(losses[1]).backward()
        reference.unscale_(optimizers[1])
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or torch.inf)
        reference.step(optimizers[1])
        reference.update()
        assert torch.equal(*losses)
        assert float(scaler._scale) == reference.get_scale()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
        if not overflow:
            torch.testing.assert_close(norm, expected)
        overflows += int(overflow)
        scales.append(reference.get_scale())
    assert overflows > 0 or factor <= 1
    assert max(scales) > 65536 or factor >= 1e3


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_an_overflow_leaves_parameters_and_state_as_they_were(kind):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    parameters = list(model.parameters())
    optimizer = prepare.build_optimizer(parameters, recipe(optimizer=kind))
    scaler = LossScaler(CPU)

    def step(bad):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        parameters[0].grad[0, 0] = float("nan") if bad else 1.0
        scaler.step(optimizer, parameters, scaler.unscale(parameters))
        optimizer.zero_grad()

    def everything():
        state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return [t.clone() for t in [*parameters, *state]]

    step(False)
    before = everything()
    step(True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(False)
    assert not torch.equal(before[0], parameters[0])


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_an_overflow_that_is_not_the_scales_is_nan(kind, value, clip_norm):
    """The scale falls from 2**16 to 1 in 16 steps; parameters and state stay, as GradScaler leaves them."""
    given = recipe(optimizer=kind, clip_norm=clip_norm)
    parameters = list(nn.Linear(3, 2).parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer, scaler, norms = prepare.build_optimizer(parameters, given), LossScaler(CPU), []
    for _ in range(20):
        for p in parameters:
            p.grad = torch.full_like(p, value)
        overflow = scaler.unscale(parameters)
        norms.append(float(prepare.clip_gradients(parameters, given)))
        scaler.step(optimizer, parameters, overflow)
    assert norms[:16] == [0] * 16
    assert np.isnan(norms[16:]).all()
    assert float(scaler._scale) == 2.0**-4
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    assert not any(v.any() for v in state)
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert not scaler.unscale(parameters)
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 16.0))


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cpu", "fp16", {}), ("mps", "fp16", {}), ("cuda", "fp16", {"capturable": True}), ("cuda", "fp32", {}),
     ("xpu", "fp16", {"capturable": True}), ("mps", "fp32", {})],
)  # fmt: skip
def test_the_step_counter_is_on_the_device_where_torch_can_have_it_there(monkeypatch, device, precision, expected):
    monkeypatch.setitem(prepare.OPTIMIZERS, "adam", (lambda _, **settings: settings, {}))
    settings = prepare.build_optimizer(
        [SimpleNamespace(device=torch.device(device))], recipe(optimizer="adam", precision=precision)
    )
    assert settings == {"lr": 0.05} | expected


def test_the_scale_does_not_grow_to_infinity(monkeypatch):
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 1)
    parameter = nn.Parameter(torch.zeros(2))
    scaler = LossScaler(CPU)
    for _ in range(130):
        scaler._update(torch.tensor(False))
    assert scaler._scale.isfinite()
    assert scaler.scale((parameter * 0).sum()).isfinite()


def test_fp16_trials_use_it():
    trace = trained(task_of(), precision="fp16", optimizer="momentum")
    assert trace.first_bad is None
    np.testing.assert_allclose(trace.loss, trained(task_of(), optimizer="momentum").loss, rtol=0.02)
    assert abs(trace.loss - trained(task_of(), optimizer="momentum").loss).max() > 1e-6


# --- a trial is a pure function of its recipe and seed


class Drawing(Dataset):
    """Rows that draw from all three generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + torch.rand(6) * 0.1 + float(np.random.rand()) * 0.1 + random.random() * 0.1, Y[i]


def drawing_task():
    def build():
        np.random.rand(3)
        return nn.Sequential(*dropout(), nn.Softplus(beta=1 + random.random()))

    rows = DatasetRows(Drawing())
    return Task(rows, rows, build, LOSSES["cross_entropy"], "cross_entropy", takes_norm=False, takes=None)


def bits(trace):
    return [getattr(trace, column).tobytes() for column in COLUMNS], trace.heldout, trace.first_bad


@pytest.mark.parametrize("values", [{}, {"norm": "rms"}, {"input_norm": "minmax", "precision": "fp16"}, {"lr": 1e30}])
def test_the_users_random_numbers_go_on_as_if_there_had_been_no_trial(values):
    def after(run):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        run()
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    engine = SequentialEngine(drawing_task(), Budget(STEPS, 0), CPU)
    outcomes = []
    with_a_trial = after(lambda: outcomes.append(engine.train(Job(0, recipe(**values), 1))))
    assert with_a_trial == after(lambda: None)
    assert not outcomes[0].error


def test_a_trial_that_raises_puts_the_random_numbers_back():
    def raising(*_):
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError("now")

    task = Task(TensorRows(X, Y), TensorRows(X, Y), mlp, raising, "cross_entropy", takes_norm=False, takes=None)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    outcome = SequentialEngine(task, Budget(STEPS, 0), CPU).train(Job(0, recipe(), 1))
    assert outcome.error.startswith("RuntimeError: now")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_the_same_trial_twice_and_after_others():
    engine = SequentialEngine(drawing_task(), Budget(STEPS, 0), CPU)
    job = Job(0, recipe(optimizer="adam", precision="bf16"), 3)
    first = engine.train(job)
    others = [engine.train(Job(1, recipe(lr=lr, optimizer="adam", input_norm="standardize"), 4)) for lr in (0.1, 1e9)]
    torch.rand(7), np.random.rand(7), random.random()
    assert bits(engine.train(job).trace) == bits(first.trace)
    assert bits(others[0].trace) != bits(first.trace)
    assert bits(engine.train(Job(0, job.recipe, 4)).trace) != bits(first.trace)
    assert bits(SequentialEngine(drawing_task(), Budget(STEPS, 0), CPU).train(job).trace) == bits(first.trace)


USERS_CODE = """
import random
import numpy as np
from torch.utils.data import Dataset
class Drawing(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x, y, *_ = first()
        return x[i] + torch.rand(3) + float(np.random.rand()) + random.random(), y[i]
first = load
def load(): return Drawing(), Drawing()
def build(width=4): return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(), nn.Linear(width, 1))
"""
IN_A_PROCESS = """
import json, sys, torch
from recipefuzz.config import load_config
from recipefuzz.engines import sequential
from recipefuzz.engines.job import Job
from recipefuzz.targets.resolve import resolve
from recipefuzz.verdict import Budget
torch.set_num_threads(1)
sequential.judge = lambda trace, *_, **__: trace.first_bad
config = load_config(sys.argv[1])
engine = sequential.SequentialEngine(resolve(config), Budget(24, 0), torch.device("cpu"))
trace = engine.train(Job(0, config.default_recipe(), 5)).trace
print(json.dumps([trace.loss.tobytes().hex(), trace.update_norm.tobytes().hex(), trace.heldout]))
"""


def test_the_same_trial_in_a_fresh_process(write_study):
    config = write_study(
        USERS_CODE, "recipe: {optimizer: adam, norm: layer, clip_norm: 1, init_scale: 2}\n", loss="case:loss"
    )
    engine = SequentialEngine(resolve(config), Budget(24, 0), CPU)
    engine.train(Job(0, config.default_recipe().but(lr=0.3), 6))
    trace = engine.train(Job(1, config.default_recipe(), 5)).trace
    command = [sys.executable, "-c", IN_A_PROCESS, str(config.folder / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=config.folder)
    loss_bits, update_bits, heldout = json.loads(done.stdout)
    assert (loss_bits, update_bits) == (trace.loss.tobytes().hex(), trace.update_norm.tobytes().hex())
    assert [tuple(pair) for pair in heldout] == list(trace.heldout)
