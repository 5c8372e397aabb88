"""The fused engine: the sequential engine's numbers, whoever the neighbours are, and a way out where it can't be used."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAKE_GPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from recipefuzz.engines import fused, plan, pool, sequential
from recipefuzz.engines.ahead import Ahead, of_recipes
from recipefuzz.engines.capture import CannotCaptureError
from recipefuzz.engines.fused import FusedEngine
from recipefuzz.engines.job import Job, once, run
from recipefuzz.engines.lanes import Lanes
from recipefuzz.engines.memory import SHARE, STATES, free_memory, lanes_that_fit
from recipefuzz.engines.not_fusable import NotFusableError
from recipefuzz.engines.plan import planned
from recipefuzz.engines.pool import PoolEngine
from recipefuzz.engines.probe import probed
from recipefuzz.engines.program import Program, Start
from recipefuzz.engines.select import open_engine
from recipefuzz.engines.sequential import SequentialEngine
from recipefuzz.errors import InputError
from recipefuzz.recipe import NORMS, Recipe
from recipefuzz.targets.builtin.models import MODELS
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.resolve import resolve
from recipefuzz.targets.seeding import seeded
from recipefuzz.targets.task import DatasetRows, Task, TensorRows
from recipefuzz.trace import COLUMNS
from recipefuzz.verdict import Budget, Label

CPU = torch.device("cpu")
SHORT = Budget(6, 0)
AHEAD = Ahead()
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = torch.randn(40, 6, generator=GENERATOR)
IMAGES = torch.randn(40, 1, 6, 6, generator=GENERATOR)
SEQUENCES = torch.randn(40, 5, 3, generator=GENERATOR)
TOKENS = torch.randint(0, 7, (40, 5), generator=GENERATOR)
LABELS = torch.randint(0, 3, (40,), generator=GENERATOR)
NUMBERS = torch.randn(40, 2, generator=GENERATOR)


def task_of(build, x=VECTORS, y=LABELS, loss="cross_entropy", *, takes_norm=False, takes=None):
    kind, function = (loss, LOSSES[loss]) if isinstance(loss, str) else ("custom", loss)
    rows = TensorRows(x, y)
    return Task(rows, TensorRows(x[:20], y[:20]), build, function, kind, takes_norm=takes_norm, takes=takes)


def recipe(**values):
    return Recipe.of({"lr": 0.05, "batch_size": 8, **values})


def jobs_of(*recipes, seed=0):
    return [Job(key, recipe(**values), seed + key % 3) for key, values in enumerate(recipes)]


@pytest.fixture(autouse=True)
def lanes_for_few(monkeypatch):
    """Lanes for a structure of one job, too: what else would be trained alone."""
    monkeypatch.setattr(fused, "FEW", 1)


@pytest.fixture
def not_judged(monkeypatch):
    """Trials run their whole budget, except that nothing comes after a value that is not finite."""

    def judge(trace, _, budget, **__):
        return trace.first_bad or (trace.steps_run >= budget.limit or None)

    monkeypatch.setattr(fused, "judge", judge)
    monkeypatch.setattr(sequential, "judge", judge)


class Alone(SequentialEngine):
    """Keeps the keys of what it trained."""

    def __init__(self, task, budget):
        super().__init__(task, budget, CPU)
        self.trained = []

    def train(self, job):
        self.trained.append(job.key)
        return super().train(job)


def engine_of(task, budget=SHORT, lanes=8):
    return FusedEngine(task, budget, CPU, Alone(task, budget), lanes)


def in_lanes(task, jobs, budget=SHORT, lanes=8):
    """Outcomes of the fused engine, by key; nothing may have been trained otherwise."""
    engine = engine_of(task, budget, lanes)
    outcomes = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    assert (engine.reasons, engine._alone.trained) == ({}, [])
    return outcomes


def one_by_one(task, jobs, budget=SHORT):
    return {outcome.job.key: outcome for outcome in run(SequentialEngine(task, budget, CPU), jobs)}


def assert_alike(found, expected, rtol=1e-3, but=()):
    """All columns to a tolerance relative to the column's largest value too: sums of the two are rounded otherwise."""
    assert sorted(found) == sorted(expected)
    for key, outcome in found.items():
        mine, theirs = outcome.trace, expected[key].trace
        assert (outcome.error, outcome.job) == (expected[key].error, expected[key].job)
        assert (mine.first_bad, mine.steps_run, mine.steps) == (theirs.first_bad, theirs.steps_run, theirs.steps)
        for column in COLUMNS:
            a, b = getattr(mine, column), getattr(theirs, column)
            assert np.array_equal(np.isfinite(a), np.isfinite(b)), (key, column)
            largest = np.abs(b[np.isfinite(b)]).max(initial=0)
            tolerance = 0.3 if column in but else rtol
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest, err_msg=f"{key} {column}")
        assert [step for step, _ in mine.heldout] == [step for step, _ in theirs.heldout]
        tolerance = 0.01 if but else rtol
        np.testing.assert_allclose([v for _, v in mine.heldout], [v for _, v in theirs.heldout], rtol=tolerance)


# --- the same numbers: models x norms x optimizers x clips x decay x warm-up

SHAPES = {"mlp": VECTORS, "cnn": IMAGES, **dict.fromkeys(["rnn", "gru", "lstm", "transformer"], SEQUENCES)}
BUILT_IN = [
    ("mlp", {}),
    ("cnn", {}),
    ("rnn", {}),
    ("rnn", {"depth": 2, "activation": "relu"}),
    ("gru", {}),
    ("gru", {"depth": 2}),
    ("lstm", {}),
    ("lstm", {"depth": 2}),
    ("transformer", {"depth": 1, "heads": 3}),
]
OPTIMIZERS = [("sgd", "momentum"), ("adam", "adamw"), ("rmsprop", "rmsprop")]
RATES = {"sgd": 0.05, "momentum": 0.02, "adam": 0.003, "adamw": 0.003, "rmsprop": 0.001}
# with a norm after it, a bias has no gradient but rounding errors, of which adaptive optimizers make steps of full size
ADAPTIVE_NOISE = ("update_norm", "param_norm", "weight_change")


def built_in(name, options):
    """Of 9 units: in groups of 3, since those of 2 are normalized to -1 and 1, with jumps between that rounding decides."""

    def build(norm="none"):
        return MODELS[name](SHAPES[name], 3, norm=norm, width=9, **options)

    return task_of(build, SHAPES[name], takes_norm=True)


def neighbours(optimizers, **values):
    """Four recipes of one structure: all kinds of clips, decays, warm-ups, scales, and two seeds."""
    first, second = ({"optimizer": o, "lr": RATES[o], **values} for o in optimizers)
    return jobs_of(
        first,
        {**second, "clip_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 3},
        {**first, "clip_value": 0.02, "init_scale": 1.3, "weight_decay": 0.0},
        {**second, "clip_norm": 0.3, "clip_value": 0.05, "lr": first["lr"] / 3, "warmup_steps": 20, "init_scale": 0.5},
    )


@pytest.mark.parametrize(
    ("model", "norm", "optimizers"),
    [(m, n, OPTIMIZERS[(i + j) % 3]) for (i, m), (j, n) in itertools.product(enumerate(BUILT_IN), enumerate(NORMS))],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
@pytest.mark.usefixtures("not_judged")
def test_lanes_are_trained_as_one_by_one(model, norm, optimizers):
    task, jobs = built_in(*model), neighbours(optimizers, norm=norm)
    noisy = norm != "none" and optimizers[0] != "sgd"
    assert_alike(in_lanes(task, jobs), one_by_one(task, jobs), but=ADAPTIVE_NOISE if noisy else ())


class Bidirectional(nn.Module):
    def __init__(self, kind, depth, bias):
        super().__init__()
        self.core = kind(3, 4, depth, bias=bias, bidirectional=True)  # steps first
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.core(x.transpose(0, 1))[0].mean(0))


class LastStates(nn.Module):
    """Reads the last states of an LSTM, and starts it from a state of its own."""

    def __init__(self):
        super().__init__()
        self.core, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(8, 3)
        self.start = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x):
        start = self.start.expand(1, len(x), 4).contiguous()
        _, (hidden, cells) = self.core(x, (start, 0.5 * start))
        return self.head(torch.cat([hidden[-1], cells[-1]], dim=1))


class Attending(nn.Module):
    def __init__(self, *, need_weights=False, masked=False):
        super().__init__()
        self.entry, self.head = nn.Linear(3, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.need_weights, self.masked = need_weights, masked

    def forward(self, x):
        x = self.entry(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.masked else None
        return self.head(self.attention(x, x, x, need_weights=self.need_weights, attn_mask=mask)[0].mean(1))


def encoder():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 6), layer, nn.Flatten(), nn.Linear(30, 3))


class Tied(nn.Module):
    """Token ids in and out by one matrix; a bias that is used twice."""

    def __init__(self):
        super().__init__()
        self.entry, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.entry.weight

    def forward(self, x):
        return self.head(self.mix(torch.tanh(self.mix(self.entry(x)))))


class Frozen(nn.Sequential):
    """A first layer that is not trained, but that init_scale is for."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self[0].requires_grad_(False)


class Unused(nn.Module):
    """Parameters without a gradient: torch.optim leaves them alone, weight decay or not."""

    def __init__(self):
        super().__init__()
        self.spare, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(3))
        self.layers = small(3)

    def forward(self, x):
        return self.layers(x)


class Mixed(nn.Module):
    """In-place operations, views, a buffer that it writes, a constant of its own."""

    def __init__(self):
        super().__init__()
        self.entry, self.head = nn.Linear(6, 8), nn.Linear(9, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.signs = torch.tensor([1.0, -1.0] * 4)

    def forward(self, x):
        hidden = self.entry(x).mul_(self.signs).relu_()
        if self.training:
            self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        hidden = hidden - self.mean
        return self.head(torch.cat([hidden, hidden.new_zeros(len(x), 1) + torch.arange(1.0)], dim=1))


class Weighted(nn.Module):
    """A loss module with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 3.0]))

    def forward(self, output, target):
        return (self.weights * (output - target).abs()).mean()


def huber(output, target):
    return functional.huber_loss(output, target, delta=0.5) + 0.01 * output.logsumexp(1).mean()


def small(outputs=2):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def token_model(name, *, per_position):
    return lambda: MODELS[name](TOKENS, 7, vocab=7, per_position=per_position, width=8)


PARTLY_LABELLED = torch.where(torch.rand(40, 5, generator=GENERATOR) < 0.3, -100, TOKENS)
USERS = {
    "bidirectional lstm": lambda: task_of(lambda: Bidirectional(nn.LSTM, 1, bias=True), SEQUENCES),
    "bidirectional stacked gru without biases": lambda: task_of(
        lambda: Bidirectional(nn.GRU, 2, bias=False), SEQUENCES
    ),
    "bidirectional rnn": lambda: task_of(lambda: Bidirectional(nn.RNN, 1, bias=True), SEQUENCES),
    "last states of an lstm": lambda: task_of(LastStates, SEQUENCES),
    "attention": lambda: task_of(Attending, SEQUENCES),
    "attention, weights wanted": lambda: task_of(lambda: Attending(need_weights=True), SEQUENCES),
    "masked attention": lambda: task_of(lambda: Attending(masked=True), SEQUENCES),
    "encoder layer": lambda: task_of(encoder, SEQUENCES),
    "tied weights, targets by position": lambda: task_of(Tied, TOKENS, TOKENS.flip(1)),
    "tokens": lambda: task_of(token_model("gru", per_position=False), TOKENS, TOKENS[:, 0]),
    "tokens, targets by position": lambda: task_of(token_model("transformer", per_position=True), TOKENS, TOKENS),
    "some positions without a label": lambda: task_of(token_model("lstm", per_position=True), TOKENS, PARTLY_LABELLED),
    "frozen": lambda: task_of(Frozen),
    "unused": lambda: task_of(Unused),
    "buffers, in-place, views": lambda: task_of(Mixed),
    "mse": lambda: task_of(small, y=NUMBERS, loss="mse"),
    "mse of (N, 1) and (N,)": lambda: task_of(lambda: small(1), y=NUMBERS[:, 0], loss="mse"),
    "bce": lambda: task_of(small, y=(NUMBERS > 0).long(), loss="bce"),
    "class probabilities": lambda: task_of(lambda: small(3), y=torch.eye(3)[LABELS] * 0.7 + 0.1),
    "a loss function": lambda: task_of(small, y=NUMBERS, loss=huber),
    "a loss module": lambda: task_of(small, y=NUMBERS, loss=Weighted()),
    "label smoothing": lambda: task_of(lambda: small(3), loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "class weights": lambda: task_of(lambda: small(3), loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]))),
    "dropout": lambda: task_of(lambda: MODELS["mlp"](VECTORS, 3, width=8, dropout=0.3)),
}


@pytest.mark.parametrize(
    ("make", "optimizers"), list(zip(USERS.values(), itertools.cycle(OPTIMIZERS[:2]), strict=False)), ids=USERS
)
@pytest.mark.usefixtures("not_judged")
def test_users_models_and_losses_are_trained_as_one_by_one(make, optimizers):
    task, jobs = make(), neighbours(optimizers)
    # of attention's keys, too, the bias has no gradient
    noisy = optimizers[0] != "sgd" and any(isinstance(m, nn.MultiheadAttention) for m in task.build().modules())
    assert_alike(in_lanes(task, jobs), one_by_one(task, jobs), but=ADAPTIVE_NOISE if noisy else ())


@pytest.mark.parametrize("optimizers", OPTIMIZERS, ids=lambda o: o[0])
@pytest.mark.parametrize(("precision", "rtol"), [("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("size", [1.0, 200.0], ids=["usual", "first steps overflow in fp16"])
@pytest.mark.usefixtures("not_judged")
def test_half_precision(precision, rtol, optimizers, size):
    task = task_of(small, y=NUMBERS * size, loss="mse")
    jobs = neighbours(optimizers, precision=precision, lr=0.003)
    expected = one_by_one(task, jobs, Budget(12, 0))
    assert_alike(in_lanes(task, jobs, Budget(12, 0)), expected, rtol)
    steps_taken_back = int((expected[0].trace.update_norm == 0).sum())
    assert (steps_taken_back > 0) == (precision == "fp16" and size > 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(6, 2), VECTORS),
        (lambda: nn.Conv1d(3, 2, 3), SEQUENCES.mT),
        (lambda: nn.Conv2d(1, 2, 3), IMAGES),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_autocast_casts_in_lanes_what_it_casts_alone(layer, x, precision):
    seen = []

    def loss(output, target):
        seen.append(output.dtype)
        return (output.float().flatten(1).mean(1) - target).square().mean()

    task = task_of(layer, x, NUMBERS[:, 0], loss)
    probed(task, recipe(precision=precision), task.train, CPU)
    assert set(seen) == {fused.prepare.AUTOCAST[precision]}


@pytest.mark.usefixtures("not_judged")
def test_input_and_target_scaling_and_batch_sizes():
    task = task_of(small, VECTORS * 3 + 1, NUMBERS * 5 - 2, "mse")
    scalings = [{"input_norm": "standardize"}, {"target_norm": "minmax"}, {"batch_size": 3}, {"batch_size": 50}]
    jobs = jobs_of(*scalings, {"input_norm": "minmax", "target_norm": "standardize", "batch_size": 1})
    assert_alike(in_lanes(task, jobs), one_by_one(task, jobs))


@pytest.mark.usefixtures("not_judged")
def test_runs_that_break_end_at_the_same_step():
    task = task_of(small, y=NUMBERS, loss="mse")
    rates = [0.1, 1e4, 1e30, 300.0, 1e12, 1e38]
    jobs = jobs_of(*({"lr": lr, "optimizer": o} for lr in rates for o in ("sgd", "momentum")))
    found, expected = in_lanes(task, jobs, Budget(16, 0)), one_by_one(task, jobs, Budget(16, 0))
    firsts = [found[job.key].trace.first_bad for job in jobs]
    assert firsts == [expected[job.key].trace.first_bad for job in jobs]
    assert firsts[:2] == [None, None]
    assert len(set(firsts)) > 3


# --- whoever the neighbours are

INDEPENDENT = {
    "mlp, batch norm, sgd": (("mlp", {}), {"norm": "batch"}, ("sgd", "momentum")),
    "cnn, group norm, adam": (("cnn", {}), {"norm": "group"}, ("adam", "adamw")),
    "lstm, rmsprop": (("lstm", {"depth": 2}), {}, ("rmsprop",)),
    "transformer, fp16, sgd": (("transformer", {"heads": 3}), {"precision": "fp16"}, ("sgd", "momentum")),
}
PROGRAMS = {}  # probed once, and used by all examples


def program_of(name):
    if name not in PROGRAMS:
        model, values, optimizers = INDEPENDENT[name]
        task = built_in(*model)
        first = recipe(optimizer=optimizers[0], **values)
        starts = []
        for seed in range(3):
            with seeded(seed):
                starts.append(Start.of(fused.prepare.build_model(task, first, CPU)))
        PROGRAMS[name] = task, probed(task, first, task.train, CPU), starts
    return PROGRAMS[name]


def lanes_of(name, jobs=()):
    task, program, starts = program_of(name)
    lanes = Lanes(program, task.train)
    lanes.replace([], jobs, [starts[job.seed] for job in jobs])
    return lanes


def order_of(job, start, stop):
    return fused.prepare.BatchOrder(40, 8, job.seed).draw(stop, CPU)[start:stop]


def jobs_for(name):
    _, values, optimizers = INDEPENDENT[name]
    return st.builds(
        lambda seed, **v: Job(seed, recipe(**values, **v), seed),
        st.integers(0, 2),
        optimizer=st.sampled_from(optimizers),
        lr=st.sampled_from([1e-3, 0.05, 1e4, 1e30]),
        init_scale=st.sampled_from([0.5, 1.0, 1e20]),
        clip_norm=st.sampled_from([None, 0.5]),
        clip_value=st.sampled_from([None, 0.01]),
        weight_decay=st.sampled_from([None, 0.1, 1e10]),
        warmup_steps=st.sampled_from([0, 4]),
    )


@pytest.mark.parametrize("name", INDEPENDENT)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_lane_is_the_same_whoever_comes_and_goes_beside_it(name, data):
    _, _, starts = program_of(name)
    _, values, optimizers = INDEPENDENT[name]
    own = Job(99, recipe(**values, optimizer=optimizers[-1], lr=0.01, clip_norm=1.0, weight_decay=0.01), 1)
    alone = lanes_of(name, [own])
    for steps in (2, 1, 3):
        alone.run(steps, order_of)

    before, after = (data.draw(st.lists(jobs_for(name), max_size=3)) for _ in range(2))
    lanes = lanes_of(name, [*before, own, *after])
    mine = next(lane for lane in lanes.lanes if lane.job is own)
    for steps in (2, 1, 3):
        lanes.run(steps, order_of)
        others = data.draw(st.permutations([i for i, lane in enumerate(lanes.lanes) if lane is not mine]))
        place = next(i for i, lane in enumerate(lanes.lanes) if lane is mine)
        keep = others[: data.draw(st.integers(0, len(others)))]
        keep.insert(data.draw(st.integers(0, len(keep))), place)
        new = data.draw(st.lists(jobs_for(name), max_size=2))
        lanes.replace(keep, new, [starts[job.seed] for job in new])
    np.testing.assert_allclose(mine.take(), alone.lanes[0].take(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_neighbour_that_breaks_disturbs_nobody(count):
    name = "mlp, batch norm, sgd"
    job, broken = Job(0, recipe(norm="batch"), 0), Job(1, recipe(norm="batch", lr=1e30, init_scale=1e30), 1)
    alone = lanes_of(name, [job])
    alone.run(6, order_of)
    expected = alone.lanes[0].take()
    assert np.isfinite(expected).all()
    for place in range(count):
        lanes = lanes_of(name, [job if i == place else broken for i in range(count)])
        lanes.run(6, order_of)
        for i, lane in enumerate(lanes.lanes):
            if i == place:
                np.testing.assert_allclose(lane.take(), expected, rtol=1e-6, atol=1e-7)
            else:
                assert not np.isfinite(lane.take()).all()


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 16])
def test_outcomes_do_not_depend_on_the_number_of_lanes(lanes):
    """With true verdicts: lanes leave at different checkpoints, and others take their places."""
    task = task_of(small, y=VECTORS[:, :2] * 2, loss="mse")
    rates = [0.1, 1e30, 1e-6, 0.3, 1e3, 0.02, 0.1, 1e-5, 1e8, 0.2, 0.05]
    jobs = jobs_of(*({"lr": lr, "warmup_steps": 2 * (i % 2)} for i, lr in enumerate(rates)))
    budget = Budget(24, 2)
    found, expected = in_lanes(task, jobs, budget, lanes), in_lanes(task, jobs, budget, 5)
    assert_alike(found, expected, rtol=1e-5)
    assert [found[j.key].verdict.label for j in jobs] == [expected[j.key].verdict.label for j in jobs]
    assert {o.verdict.label for o in found.values()} == set(Label)


@pytest.mark.usefixtures("not_judged")
def test_jobs_may_come_while_others_are_under_way():
    task, jobs = built_in("mlp", {}), neighbours(("sgd", "momentum"), norm="layer")
    engine, found = engine_of(task, lanes=2), {}
    waiting = iter(jobs)
    engine.submit(next(waiting))
    while engine.load:
        found |= {outcome.job.key: outcome for outcome in engine.advance()}
        if (job := next(waiting, None)) is not None:
            engine.submit(job)
    assert_alike(found, one_by_one(task, jobs))


@pytest.mark.usefixtures("not_judged")
def test_a_structure_of_few_jobs_is_trained_alone(monkeypatch):
    monkeypatch.setattr(fused, "FEW", 3)
    task = built_in("mlp", {})
    jobs = jobs_of(*({"norm": norm} for norm in ("layer", "rms", "layer", "none", "layer", "rms")))
    engine = engine_of(task)
    found = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    assert_alike(found, one_by_one(task, jobs))
    assert (sorted(engine._alone.trained), engine.reasons) == ([1, 3, 5], {})


# --- verdicts


def test_verdicts_are_those_of_the_sequential_engine():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    task = task_of(small, x, x[:, :2] * 2 - x[:, 2:4], "mse")
    draw = random.Random(0)
    jobs = []
    for key in range(60):
        values = {
            "lr": 10 ** draw.uniform(-5, 3),
            "init_scale": 10 ** draw.uniform(-1.5, 1),
            "optimizer": draw.choice(["sgd", "momentum", "adam", "adamw", "rmsprop"]),
            "clip_norm": draw.choice([None, 0.1, 1.0]),
            "clip_value": draw.choice([None, 0.01]),
            "weight_decay": draw.choice([None, 0.01, 0.3]),
            "warmup_steps": draw.choice([0, 10]),
            "batch_size": 16,
        }
        jobs.append(Job(key, recipe(**values), draw.randrange(3), whole=draw.random() < 0.3))
    budget = Budget(40, 2)
    found, expected = in_lanes(task, jobs, budget, lanes=16), one_by_one(task, jobs, budget)
    labels = {job.key: (found[job.key].verdict.label, expected[job.key].verdict.label) for job in jobs}
    assert {key: pair for key, pair in labels.items() if pair[0] != pair[1]} == {}
    assert {label for label, _ in labels.values()} == set(Label)
    whole = [found[j.key] for j in jobs if j.whole and found[j.key].verdict.label is Label.CONVERGING]
    assert whole
    assert all(outcome.trace.steps >= budget.steps for outcome in whole)
    assert any(o.trace.steps < budget.steps for o in found.values() if o.verdict.label is Label.CONVERGING)
    for job in jobs:
        assert found[job.key].baseline == expected[job.key].baseline
        np.testing.assert_allclose(
            found[job.key].trace.constant[:8], expected[job.key].trace.constant[:8], rtol=1e-6, err_msg=str(job)
        )


# --- what is launched


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_operations_of_a_step_do_not_grow_with_the_lanes(name):
    _, values, optimizers = INDEPENDENT[name]
    drawn = {steps: order_of(Job(0, recipe(), 0), 0, steps) for steps in (2, 5)}

    def operations(count, steps):
        options = [{"clip_norm": 1.0}, {"clip_value": 0.1}, {"weight_decay": 0.1}, {"warmup_steps": 9}]
        jobs = [Job(i, recipe(**values, optimizer=optimizers[-1], **options[i % 4]), i % 3) for i in range(count)]
        lanes = lanes_of(name, jobs)
        with Counted() as counted:
            lanes.run(steps, lambda *_: drawn[steps])
        return counted.calls

    def operations_of_a_step(count):
        return (operations(count, 5) - operations(count, 2)) / 3  # without what a chunk does once

    assert operations_of_a_step(4) > 10
    assert operations_of_a_step(4) == operations_of_a_step(5) == operations_of_a_step(16)


ON_FAKE_GPU = (
    FAKE_GPU
    + r"""
import json, sys
from recipefuzz.engines.job import Job
from recipefuzz.engines.lanes import Lanes
from recipefuzz.engines.program import Program, Start
from recipefuzz.recipe import Recipe
from recipefuzz.targets.builtin.models import MODELS
from recipefuzz.targets.losses import LOSSES
from recipefuzz.targets.task import Task, TensorRows

tensor = torch.tensor
# a constant is copied in earnest, under FakeTensorMode too, for which this device has no memory
torch.tensor = lambda data, *, dtype=None, device="cpu": torch.empty(np.shape(data), dtype=tensor(data, dtype=dtype).dtype, device=device)
SHAPES = {"mlp": (64, 16), "cnn": (64, 1, 8, 8), "transformer": (64, 3, 3)} | dict.fromkeys(("rnn", "gru", "lstm"), (64, 3, 3))


def attempt(name="mlp", loss=LOSSES["cross_entropy"], on=device, captured=False, **values):
    shape, reads = SHAPES[name], []
    model = MODELS[name](torch.zeros(shape), 3, norm=values.get("norm", "none"))
    read = torch.Tensor.numpy
    torch.Tensor.numpy = lambda self: reads.append(self.shape) or np.zeros(self.shape)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            rows = TensorRows(torch.empty(shape, device=device), torch.empty(shape[0], dtype=torch.long, device=on))
            model = moved(model)
            task = Task(rows, rows, None, loss, "cross_entropy", takes_norm=True, takes=None)
            recipe = Recipe.of({"lr": 0.1, "warmup_steps": 2, "batch_size": 8, **values})
            program, start = Program(task, recipe, model, device), Start.of(model)
            if captured:
                x, y = rows.take(torch.empty(3, 8, dtype=torch.long, device=device))
                frozen = [t.repeat(3, *[1] * t.dim()) for t, _ in start.frozen]
                scale = torch.ones(3, device=device) if recipe.precision == "fp16" else None
                program.capture(start.flat.repeat(3, 1), frozen, x, y, scale)
            lanes = Lanes(program, rows)
            jobs = [Job(i, recipe.but(clip_norm=[1.0, None][i % 2], clip_value=[None, 1.0][i % 2]), 0) for i in range(5)]
            lanes.replace([], jobs, [start] * 5)
            lanes.run(2, lambda job, start, stop: torch.empty(2, 8, dtype=torch.long))
            lanes.replace([4, 1], jobs[:1], [start])
            lanes.run(3, lambda job, start, stop: torch.empty(3, 8, dtype=torch.long))
            tensors = [lanes._flat, lanes._spare, *lanes._frozen, *lanes._update.tensors()]
        assert reads == [(2, 7, 5), (3, 7, 3)], reads
        assert {str(t.device) for t in tensors} == {"fakegpu:0"}
        return "done"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.Tensor.numpy = read


def item_in_the_loss(output, target):
    loss = LOSSES["cross_entropy"](output, target)
    loss.item()
    return loss


def scalar_on_the_cpu(output, target):
    return LOSSES["cross_entropy"](output, target) + (output * torch.ones(3)).sum()


def item_in_the_engine():
    step = Lanes._unscale
    Lanes._unscale = lambda self, gradient: step(self, gradient) if gradient.sum() != 0 else None
    try:
        return attempt(precision="fp16")
    finally:
        Lanes._unscale = step


results = {f"{name}, captured": attempt(name, captured=True) for name in SHAPES}
results["mlp, not"] = attempt()
for norm in ("batch", "layer", "group", "rms"):
    results[f"{norm} norm"] = attempt(norm=norm, captured=True)
for optimizer in ("momentum", "adamw", "rmsprop"):
    for precision in ("fp32", "fp16"):
        values = {"optimizer": optimizer, "precision": precision, "weight_decay": 0.1}
        results[f"{optimizer} {precision}"] = attempt(captured=True, **values)
results["sgd bf16"] = attempt(captured=True, precision="bf16")
results["item in the loss"] = attempt(loss=item_in_the_loss)
results["item in the engine"] = item_in_the_engine()
results["scalar on the cpu"] = attempt(loss=scalar_on_the_cpu)
results["target on the cpu"] = attempt(on=torch.device("cpu"))
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


TRAINS = [*(f"{model}, captured" for model in SHAPES), "mlp, not", "sgd bf16"]
TRAINS += [f"{norm} norm" for norm in ("batch", "layer", "group", "rms")]
TRAINS += [
    f"{optimizer} {precision}" for optimizer in ("momentum", "adamw", "rmsprop") for precision in ("fp32", "fp16")
]


@pytest.mark.parametrize("what", TRAINS)
def test_steps_run_on_the_accelerator_with_one_read_a_chunk(on_fake_gpu, what):
    assert on_fake_gpu[what] == "done"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        # vmap sees the first of them before the accelerator is asked
        ("item in the loss", r"RuntimeError: vmap: It looks like you're calling \.item\(\) on a Tensor"),
        ("item in the engine", r"DataDependentOutputException: aten\.(_local_scalar_dense|is_nonzero|item)"),
        ("scalar on the cpu", r"fakegpu.*cpu|cpu.*fakegpu"),
        ("target on the cpu", r"fakegpu.*cpu|cpu.*fakegpu"),
    ],
)
def test_a_question_to_the_accelerator_or_a_mix_of_devices_would_raise(on_fake_gpu, what, error):
    assert re.search(error, on_fake_gpu[what])


@pytest.mark.usefixtures("not_judged")
def test_what_can_not_be_recorded_is_trained_all_the_same(monkeypatch):
    def refuse(*_):
        raise CannotCaptureError("as said")

    monkeypatch.setattr(Program, "capture", refuse)
    task, jobs = built_in("mlp", {}), neighbours(("sgd", "momentum"), norm="batch")
    assert_alike(in_lanes(task, jobs), one_by_one(task, jobs))


# --- what can't be fused


class Branching(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out if x.sum() > 0 else -out


class Reading(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.0 + x.abs().max().item())


class Counting(nn.Linear):
    """Computes something else each time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.rand(x.shape))


class Dropping(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, self.training)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.full((len(x),), 5), batch_first=True)
        return self.core(packed)[1][0][-1]


class Projected(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.core = nn.LSTM(3, 6, batch_first=True, **options)

    def forward(self, x):
        return self.core(x)[0][:, -1]


class SeveralDtypes(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) * self.scale.float()


UNFUSABLE = {
    "branches": (lambda: task_of(lambda: Branching(6, 3)), "data-dependent control flow"),
    "reads": (lambda: task_of(lambda: Reading(6, 3)), r"\.item\(\) on a Tensor"),
    "counts": (lambda: task_of(lambda: Counting(6, 3)), "computes something else than alone: does it keep a state in Python"),
    "draws": (lambda: task_of(lambda: Noisy(6, 3)), "random"),
    "drops": (lambda: task_of(lambda: Dropping(6, 3)), "random"),
    "packs": (lambda: task_of(Packed, SEQUENCES), "packed sequences|pack_padded"),
    "projects": (lambda: task_of(lambda: Projected(proj_size=3), SEQUENCES), r"projections \(proj_size\) has no lane-wise form"),
    "drops between layers": (lambda: task_of(lambda: Projected(num_layers=2, dropout=0.5), SEQUENCES), "dropout between the layers"),
    "dtypes": (lambda: task_of(SeveralDtypes), "its parameters have several dtypes: torch.float"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("make", "message"), UNFUSABLE.values(), ids=UNFUSABLE)
@pytest.mark.usefixtures("not_judged")
def test_what_can_not_be_fused_is_trained_alone(make, message):
    task, jobs = make(), jobs_of({}, {"lr": 0.01})
    with pytest.raises(NotFusableError, match=message):
        probed(task, jobs[0].recipe, task.train, CPU)
    engine = engine_of(task)
    found = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    assert_alike(found, one_by_one(task, jobs), rtol=0)
    assert engine._alone.trained == [0, 1]
    (reason,) = engine.reasons.values()
    assert re.search(message, reason)
    assert "\n" not in reason
    engine.submit(jobs[0])  # it is not tried again
    assert len(engine._apart) == 1


@pytest.mark.usefixtures("not_judged")
def test_a_dataset_is_trained_alone():
    rows = DatasetRows(TensorDataset(VECTORS, LABELS))
    task = replace(task_of(lambda: nn.Linear(6, 3)), train=rows, test=rows)
    engine, jobs = engine_of(task), jobs_of({})
    assert_alike({o.job.key: o for o in run(engine, jobs)}, one_by_one(task, jobs), rtol=0)
    assert list(engine.reasons.values()) == [
        "its rows come one by one from a Dataset: return tensors where they fit in memory"
    ]


@pytest.mark.usefixtures("not_judged")
def test_an_error_of_one_recipe_is_its_own():
    def build(norm="none", width=8):
        if width == 13:
            raise ValueError("an unlucky width")
        return MODELS["mlp"](VECTORS, 3, norm=norm, width=width)

    task = task_of(build, takes_norm=True)
    jobs = jobs_of({}, {"width": 13}, {"norm": "batch"}, {"width": 13, "lr": 0.1}, {"lr": 0.01})
    engine = engine_of(task)
    found, expected = {o.job.key: o for o in run(engine, jobs)}, one_by_one(task, jobs)
    assert_alike(found, expected)
    assert [key for key in sorted(found) if found[key].error] == [1, 3]
    assert all(found[key].error.startswith("ValueError: an unlucky width") for key in (1, 3))
    assert sorted(engine._alone.trained) == [1, 3]


@pytest.mark.usefixtures("not_judged")
def test_an_error_in_training_is_found_alone(monkeypatch):
    """A chunk that raises says nothing about which lane it was."""
    step, calls = Program.step, itertools.count()

    def fail(self, *tensors):
        if next(calls) == 5:  # after the two of the probe
            raise RuntimeError("in a chunk")
        return step(self, *tensors)

    monkeypatch.setattr(Program, "step", fail)
    task, jobs = built_in("mlp", {}), neighbours(("sgd", "momentum"), norm="layer")
    engine = engine_of(task)
    found = {o.job.key: o for o in run(engine, jobs)}
    assert_alike(found, one_by_one(task, jobs))
    assert sorted(engine._alone.trained) == [0, 1, 2, 3]
    assert engine.load == 0
    assert list(engine.reasons.values()) == ["a step raised RuntimeError: in a chunk"]
    monkeypatch.setattr(fused, "probed", None)  # it is not tried again
    assert [o.error for o in run(engine, jobs[:2])] == ["", ""]


@pytest.mark.usefixtures("not_judged")
def test_why_recipes_are_not_fused_is_said_once_for_each_reason():
    def build(norm="none"):
        return {"batch": Branching, "group": Noisy, "layer": Branching}.get(norm, nn.Linear)(6, 3)

    lines = []
    task = task_of(build, takes_norm=True)
    engine = FusedEngine(task, SHORT, CPU, Alone(task, SHORT), 8, AHEAD, once(lines.append))
    norms = ("batch", "none", "group", "layer", "batch", "group")
    outcomes = list(run(engine, jobs_of(*({"norm": norm} for norm in norms))))
    assert [o.error for o in outcomes] == [""] * 6
    assert len(engine.reasons) == 3
    assert len(lines) == 2
    branches, draws = sorted(lines, key=lambda line: "random" in line)
    assert re.match(r"norm=(batch|layer) is trained one by one, not in lanes: .*data-dependent control flow", branches)
    assert re.match(r"norm=group is trained one by one, not in lanes: .*random", draws)


# --- memory


def lack_memory(monkeypatch, most, error):
    step, tried = Program.step, []

    def step_of_few(self, trained, frozen, x, y, scale):
        tried.append(len(x))
        if len(x) > most:
            raise error
        return step(self, trained, frozen, x, y, scale)

    monkeypatch.setattr(Program, "step", step_of_few)
    return tried


@pytest.mark.parametrize(
    ("most", "error"),
    [
        (3, torch.OutOfMemoryError("CUDA out of memory")),
        (5, MemoryError()),
        (8, RuntimeError("DefaultCPUAllocator: can't allocate")),
    ],
    ids=["cuda", "python", "cpu"],
)
@pytest.mark.usefixtures("not_judged")
def test_lanes_that_do_not_fit_are_halved(monkeypatch, most, error):
    task, jobs = built_in("mlp", {}), jobs_of(*({"lr": 0.01 * (1 + i), "norm": "batch"} for i in range(18)))
    expected = in_lanes(task, jobs, lanes=16)
    tried = lack_memory(monkeypatch, most, error)
    engine = engine_of(task, lanes=16)
    found = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    assert_alike(found, expected, rtol=1e-5)
    assert engine._alone.trained == []
    assert most / 2 < engine.lanes <= most
    assert sum(n > most for n in tried) == round(math.log2(16 / engine.lanes))


@pytest.mark.usefixtures("not_judged")
def test_a_lack_of_memory_in_one_lane_is_the_trials_own(monkeypatch):
    task, jobs = built_in("mlp", {}), jobs_of({"norm": "layer"}, {"norm": "layer", "lr": 0.01})
    expected, real, opened = one_by_one(task, jobs), Program.step, itertools.count()

    def step(self, *tensors):
        if next(opened) >= 2:
            raise MemoryError
        return real(self, *tensors)

    monkeypatch.setattr(Program, "step", step)
    engine = engine_of(task, lanes=4)
    found = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    assert_alike(found, expected, rtol=0)
    assert engine._alone.trained


@pytest.mark.parametrize(
    ("free", "each", "parameters", "processes", "lanes"),
    [
        (1000, 10, 0, 1, int(SHARE * 100)),
        (1000, 10, 0, 4, int(SHARE * 25)),
        (1 << 30, 0, 1 << 10, 1, int(SHARE * (1 << 20) / (4 * STATES))),
        (10, 1000, 1000, 2, 1),
        (0, 1, 1, 1, 1),
    ],
)
def test_lanes_that_fit(monkeypatch, free, each, parameters, processes, lanes):
    monkeypatch.setattr("recipefuzz.engines.memory.free_memory", lambda: free)
    assert lanes_that_fit(each, parameters, CPU, processes) == lanes


def test_free_memory_is_some_of_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() <= total


# --- which engine

BRANCHING = """
class Branching(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out if x.sum() > 0 else -out

def build(width=4):
    return Branching(3, 1)
"""


def plan_of(config, ahead=AHEAD):
    return planned(config, resolve(config), config.default_recipe(), CPU, ahead)


def test_fused_is_refused_for_a_model_that_can_not_be(write_study):
    config = write_study(BRANCHING, "run: {engine: fused}\n")
    pattern = r"config\.yaml:5: run\.engine: this target can't be fused: .*data-dependent control flow"
    with pytest.raises(InputError, match=pattern) as caught:
        plan_of(config)
    assert "engine: auto takes the sequential engine for it" in str(caught.value)


def test_auto_says_in_a_line_why_a_model_is_not_fused(write_study):
    plan_for = plan_of(write_study(BRANCHING))
    assert (plan_for.engine, plan_for.lanes) == ("sequential", 0)
    assert plan_for.why.startswith("it can't be fused: RuntimeError: vmap: It looks like")
    assert "data-dependent control flow" in plan_for.why
    assert "\n" not in plan_for.why


def test_sequential_is_obeyed_unmeasured(write_study, monkeypatch):
    monkeypatch.setattr(plan, "_measured", None)
    assert plan_of(write_study("", "run: {engine: sequential}\n")) == plan.Plan(0, "as run.engine says")


@pytest.mark.parametrize(
    ("engine", "alone", "lane", "expected"),
    [
        ("auto", 1.0, 0.1, ("fused", "times as fast as one by one")),
        ("auto", 1.0, 3.0, ("sequential", "a step would be 0.3 times as fast as one by one")),
        ("fused", 1.0, 3.0, ("fused", "as run.engine says, though in")),
    ],
)
def test_the_faster_engine_is_taken(write_study, monkeypatch, engine, alone, lane, expected):
    """Times are made up: a step alone, and one of a lane among many."""
    calls, made = itertools.count(), []

    def least(call, _):
        call()
        if next(calls) == 0:
            return alone
        made.append(plan.TRIED_LANES[len(made)])
        return lane * 2 * made[-1]

    monkeypatch.setattr(plan, "_least", least)
    found = plan_of(write_study("", f"run: {{engine: {engine}}}\n"))
    assert found.engine == expected[0]
    assert expected[1] in found.why


@pytest.mark.parametrize(("fits", "lanes"), [(1, 1), (5, 5), (20, 16), (10**6, 64)])
def test_no_more_lanes_than_fit(write_study, monkeypatch, fits, lanes):
    monkeypatch.setattr(plan, "lanes_that_fit", lambda *_: fits)
    seconds = iter([1.0, *(2.0 * n * each for n, each in zip(plan.TRIED_LANES, (0.4, 0.3, 0.2, 0.1), strict=True))])
    monkeypatch.setattr(plan, "_least", lambda *_: next(seconds))
    assert plan_of(write_study()).lanes == lanes


@pytest.mark.parametrize(("most", "expected"), [(40, (32, 32)), (20, (16, 16)), (8, (8, 8)), (5, (4, 4)), (1, (1, 1))])
def test_lanes_that_lack_memory_when_measured_are_halved(most, expected):
    tried = []

    def lanes_step(lanes):
        tried.append(lanes)
        if lanes > most:
            raise MemoryError
        return 1.0

    steps, fits = plan._steps_of_lanes(lanes_step, 64)
    assert (max(steps), fits) == expected
    assert sum(lanes > most for lanes in tried) <= 4
    assert len(tried) == len(set(tried))


def test_a_lack_of_memory_in_one_lane_is_no_plan_for_lanes():
    def lanes_step(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        plan._steps_of_lanes(lanes_step, 64)


def test_a_plan_for_few_lanes_where_more_lack_memory(write_study, monkeypatch):
    run_lanes = Lanes.run

    def run(self, steps, order_of):
        if len(self.lanes) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run_lanes(self, steps, order_of)

    monkeypatch.setattr(Lanes, "run", run)
    monkeypatch.setattr(plan, "WORTH_IT", 1e9)
    assert plan_of(write_study()).lanes == 4


TIMES = plan.Times(alone=1.0, steps={8: 2.0, 16: 3.0, 32: 5.0}, setup=100.0)


def test_a_step_of_few_lanes_has_a_fixed_part():
    """A lane more takes 1/8 here, and a step 1 whatever its lanes."""
    lanes = [1, 2, 4, 8, 16, 100]
    assert [TIMES.lane(n) * min(n, 32) for n in lanes] == pytest.approx([1.125, 1.25, 1.5, 2.0, 3.0, 5.0])
    assert plan.Times(1.0, {8: 2.0}, 0.0).lane(1) == 2.0


@pytest.mark.parametrize(
    ("ahead", "lanes"),
    [
        (Ahead(), 32),
        (Ahead(10_000, 1), 32),
        (Ahead(1), 32),  # a search: not guessed
        (Ahead(10_000, 100), 32),
        (Ahead(64, 16), 32),
        (Ahead(64, 32), 0),  # two lanes bring 1.6 times, and setting up takes as long as a whole step of both
        (Ahead(64, 64), 0),
        (Ahead(3, 1), 32),
        (Ahead(1, 1), 0),
    ],
)
def test_set_up_must_be_worth_it_for_the_recipes_of_a_structure(ahead, lanes):
    found = plan.chosen(TIMES, 64, ahead, budget=400)
    assert found.lanes == lanes
    if not lanes:
        assert found.why.startswith(f"{ahead.trials} trials of {ahead.structures} structures, which can't share lanes")


def test_what_is_left_counts_those_of_all_processes():
    assert [Ahead(100, processes=2, done=30).left(n) for n in (0, 10, 35, 50)] == [70, 50, 0, 0]


def test_what_is_ahead_of_given_recipes():
    recipes = [
        recipe(norm=norm, lr=lr, optimizer=o) for norm in ("batch", "layer") for lr, o in ((1, "sgd"), (2, "momentum"))
    ]
    assert of_recipes(recipes) == Ahead(4, 2)


def test_the_engine_that_is_opened_says_what_it_is(write_study):
    lines = []
    config = write_study(BRANCHING, "run: {workers: 0}\n")
    engine = open_engine(config, resolve(config), lines.append, AHEAD)
    assert isinstance(engine, SequentialEngine)
    assert len(lines) == 1
    assert lines[0].startswith("sequential engine, this process on cpu: it can't be fused: ")


# --- processes

FATED = """
import os, signal

class Fated(nn.Sequential):
    fates = {"train": lambda: None, "raise": lambda: [][0], "exit": lambda: os._exit(3),
             "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    def forward(self, x):
        self.fates[self.fate]()
        return super().forward(x)

def build(fate="train", width=4):
    if torch.initial_seed() == 7:  # a lane of the others' structure: it comes when they are under way
        os._exit(4)
    model = Fated(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
    model.fate = fate
    return model
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_trial_that_ends_its_worker_costs_itself_alone(write_study, monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.2)
    config = write_study(FATED, "trial: {batch_size: 8}\n")
    fates = ["train"] * 5 + ["exit", "train", "raise", "kill", "train", "train"]
    jobs = [
        Job(key, config.recipe_of({"lr": 0.01 * (1 + key), "fate": fate, "norm": None}), key % 2)
        for key, fate in enumerate(fates)
    ]
    fates[4], jobs[4] = "exit in lanes", replace(jobs[3], key=4, seed=7)
    budget = Budget(24, 1)
    survivors = [job for job, fate in zip(jobs, fates, strict=True) if fate == "train"]
    expected = one_by_one(resolve(config), survivors, budget)
    engine = PoolEngine(config, budget, ["cpu"], None, lanes=4)
    try:
        found = {outcome.job.key: outcome for outcome in run(engine, jobs)}
    finally:
        engine.close()
    assert sorted(found) == [job.key for job in jobs]
    errors = {fate: found[key].error.partition(" (")[0] for key, fate in enumerate(fates) if fate != "train"}
    assert errors == {
        "exit in lanes": "killed: the worker process ended with exit code 4",
        "exit": "killed: the worker process ended with exit code 3",
        "kill": "killed: the worker process got SIGKILL: probably out of memory",
        "raise": "IndexError: list index out of range",
    }
    assert_alike({job.key: found[job.key] for job in survivors}, expected)
    for job in survivors:
        assert found[job.key].verdict.label == expected[job.key].verdict.label


UNFUSABLE_NORM = """
class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

def build(norm="none", width=4):
    return (Branching if norm == "group" else nn.Linear)(3, 1)
"""


def test_workers_tell_why_recipes_are_not_fused(write_study):
    config = write_study(UNFUSABLE_NORM, "trial: {batch_size: 8}\n")
    lines = []
    engine = PoolEngine(config, SHORT, ["cpu"] * 2, None, lanes=4, say=lines.append)
    recipes = [config.recipe_of({"norm": norm, "lr": 0.01}) for norm in ("group", "none") * 8]
    try:
        outcomes = list(run(engine, [Job(key, recipe, 0) for key, recipe in enumerate(recipes)]))
    finally:
        engine.close()
    assert len(outcomes) == 16
    assert all(outcome.verdict for outcome in outcomes)
    (line,) = lines
    assert re.match("norm=group.* is trained one by one, not in lanes: .*data-dependent control flow", line)
