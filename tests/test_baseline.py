"""The zero of skill: the best constant prediction against closed forms, and on the batches of a trial."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from recipefuzz.engines.baselines import Baselines
from recipefuzz.recipe import Recipe
from recipefuzz.targets.baseline import NoBaselineError, Outputs, best_constant
from recipefuzz.targets.losses import LOSSES, cross_entropy_last
from recipefuzz.targets.task import DatasetRows, Task, TensorRows

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
LABELS = torch.tensor(RANDOM.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05]))
SEQUENCES = torch.tensor(RANDOM.choice(4, (600, 3), p=[0.5, 0.3, 0.15, 0.05]))
SHARES = torch.tensor(RANDOM.dirichlet([4, 2, 1], 600), dtype=torch.float32)
SHARES_BY_POSITION = torch.tensor(RANDOM.dirichlet([4, 2, 1], (600, 5)), dtype=torch.float32).transpose(1, 2)
NUMBERS = torch.tensor(RANDOM.normal(3, 2, 600), dtype=torch.float32)
TABLE = torch.tensor(RANDOM.normal([[0, 1e3, -5]], [[1, 10, 0.1]], (600, 3)), dtype=torch.float32)
BITS = torch.tensor(RANDOM.random((600, 2)) < [0.1, 0.6], dtype=torch.float32)


def task_of(loss, y, *, kind="custom", build=None, train=None):
    train = train or TensorRows(torch.zeros(len(y), 1), y)
    if isinstance(loss, str):
        loss, kind = LOSSES[loss], loss
    return Task(train, train, build or (lambda: nn.Linear(1, 1)), loss, kind, takes_norm=False, takes=None)


def constant_of(loss, y, output=None, batch_size=50, **options):
    task = task_of(loss, y, **options)
    return task, best_constant(task, task.train, batch_size, Outputs(output))


def entropy(*shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def frequencies(labels):
    return torch.bincount(labels.flatten()).double().div(labels.numel()).tolist()


# --- closed forms: loss, targets, its value, and the constant output that has it for one row

IGNORING = torch.where(torch.arange(600) % 3 == 0, -100, LABELS)
UNEVEN = torch.where(torch.arange(3) <= torch.arange(600)[:, None] % 3, SEQUENCES, -100)  # 1, 2 or 3 labels a row
CLOSED = {
    "labels": ("cross_entropy", LABELS, entropy(*frequencies(LABELS)), torch.tensor(frequencies(LABELS)).log()),
    "absent class": ("cross_entropy", LABELS * 2, entropy(*frequencies(LABELS)), None),
    "labels by position": ("cross_entropy", SEQUENCES, entropy(*frequencies(SEQUENCES)), None),
    "images": ("cross_entropy", SEQUENCES[:, :, None].expand(600, 3, 2), entropy(*frequencies(SEQUENCES)), None),
    "ignored rows": ("cross_entropy", IGNORING, entropy(*frequencies(IGNORING[IGNORING >= 0])), None),
    "ignored positions": ("cross_entropy", UNEVEN, entropy(*frequencies(UNEVEN[UNEVEN >= 0])), None),
    "probabilities": ("cross_entropy", SHARES, entropy(*SHARES.double().mean(0).tolist()), SHARES.mean(0).log()),
    "probabilities by position": (
        "cross_entropy", SHARES_BY_POSITION, entropy(*SHARES_BY_POSITION.double().mean((0, 2)).tolist()), None,
    ),
    "one-hot": ("cross_entropy", functional.one_hot(LABELS, 5).float(), entropy(*frequencies(LABELS)), None),
    "numbers": ("mse", NUMBERS, np.var(NUMBERS.double().numpy()), NUMBERS.mean(0)),
    "column": ("mse", NUMBERS[:, None], np.var(NUMBERS.double().numpy()), NUMBERS.mean(0, keepdim=True)),
    "table": ("mse", TABLE, np.var(TABLE.double().numpy(), axis=0).mean(), TABLE.double().mean(0).float()),
    "numbers such as torch's mark for ignored": ("mse", NUMBERS.round() - 100, np.var(NUMBERS.round().double().numpy()), None),
    "sequences of vectors": ("mse", TABLE.view(200, 3, 3), np.var(TABLE.view(200, 9).double().numpy(), axis=0).mean(), None),
    "bits": ("bce", BITS, np.mean([entropy(p, 1 - p) for p in BITS.mean(0).tolist()]), torch.logit(BITS.mean(0))),
    "whole bits": ("bce", BITS[:, 0].long(), entropy(float(BITS[:, 0].mean()), 1 - float(BITS[:, 0].mean())), None),
    "a column of ones": ("bce", torch.stack([BITS[:, 0], torch.ones(600)], 1), entropy(float(BITS[:, 0].mean()), 1 - float(BITS[:, 0].mean())) / 2, None),
    "soft bits": ("bce", SHARES[:, 0], entropy(float(SHARES[:, 0].mean()), 1 - float(SHARES[:, 0].mean())), None),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "y", "expected", "_"), CLOSED.values(), ids=CLOSED)
def test_closed_form(loss, y, expected, _):
    _, constant = constant_of(loss, y)
    assert constant.loss == pytest.approx(expected, rel=1e-5)


KNOWN = {name: case for name, case in CLOSED.items() if case[3] is not None}


@pytest.mark.parametrize(("loss", "y", "expected", "output"), KNOWN.values(), ids=KNOWN)
def test_no_constant_does_better(loss, y, expected, output):
    task = task_of(loss, y)
    assert float(task.loss(output.expand(len(y), *output.shape), y)) == pytest.approx(expected, rel=1e-4)
    for step in (0.1, -0.1):
        for i in range(max(1, output.numel())):
            other = output.clone().reshape(-1)
            other[i] += step
            assert float(task.loss(other.view(output.shape).expand(len(y), *output.shape), y)) > expected


@pytest.mark.parametrize(("loss", "y", "expected", "output"), CLOSED.values(), ids=CLOSED)
def test_loss_of_the_constant_on_each_batch(loss, y, expected, output):
    """What a trial takes skill against is `task.loss` of the constant on the trial's own batches."""
    task, constant = constant_of(loss, y)
    batches = torch.randint(0, len(y), (5, 8), generator=torch.Generator().manual_seed(0))
    known = constant.of_rows(batches)
    if known is None:
        assert (y == -100).any()
        assert [float(constant.of_targets(task, y[b], 8)) for b in batches] == pytest.approx([expected] * 5)
        return
    everything = constant.of_rows(torch.arange(len(y))[None])
    assert float(everything) == pytest.approx(expected, rel=1e-4)
    if output is not None:
        of_batches = [float(task.loss(output.expand(8, *output.shape), y[b])) for b in batches]
        assert known.tolist() == pytest.approx(of_batches, rel=1e-4)
        assert len(set(known.tolist())) > 1


def test_batches_of_sequences_and_of_columns():
    for loss, y, output in [
        (cross_entropy_last, SEQUENCES, torch.tensor(frequencies(SEQUENCES)).log().expand(8, 3, 4)),
        (LOSSES["mse"], TABLE.view(200, 3, 3), TABLE.view(200, 3, 3).mean(0).expand(8, 3, 3)),
    ]:
        kind = "mse" if y.is_floating_point() else "cross_entropy"
        task, constant = constant_of(loss, y, kind=kind)
        batches = torch.randint(0, len(y), (5, 8), generator=torch.Generator().manual_seed(0))
        assert constant.of_rows(batches).tolist() == pytest.approx(
            [float(task.loss(output, y[b])) for b in batches], rel=1e-4
        )


@pytest.mark.parametrize(("loss", "y", "expected", "_"), CLOSED.values(), ids=CLOSED)
def test_a_lazy_dataset_has_the_same_baseline(loss, y, expected, _):
    rows = DatasetRows(TensorDataset(torch.zeros(len(y)), y))
    task, constant = constant_of(loss, y, train=rows)
    assert constant.loss == pytest.approx(expected, rel=1e-5)
    assert constant.of_rows(torch.tensor([[0]])) is None
    assert float(constant.of_targets(task, y[:3], 3)) == pytest.approx(expected, rel=1e-5)


# --- a user's loss, minimized


def hinge(output, y):
    return (1 - (2 * y - 1) * output.squeeze(-1)).clamp_min(0).mean()


def gaussian(output, y):
    mean, log_variance = output.unbind(-1)
    return (0.5 * (math.log(2 * math.pi) + log_variance + (y - mean) ** 2 / log_variance.exp())).mean()


def probabilities(output, y):
    """Cross-entropy of probabilities: infinite at 0, outside 0 to 1 not a number."""
    return -(y * output.squeeze(-1).log() + (1 - y) * (1 - output.squeeze(-1)).log()).mean()


ONE = float(BITS[:, 0].mean())
SPREAD = float(NUMBERS.var(correction=0))
MINIMIZED = {
    "cross-entropy": (functional.cross_entropy, LABELS, (4,), entropy(*frequencies(LABELS))),
    "cross-entropy by position": (functional.cross_entropy, SEQUENCES, (4, 3), entropy(*frequencies(SEQUENCES))),
    "cross-entropy, classes last": (cross_entropy_last, SEQUENCES, (3, 4), entropy(*frequencies(SEQUENCES))),
    "mse": (functional.mse_loss, NUMBERS[:, None], (1,), SPREAD),
    "mse of a scalar output": (functional.mse_loss, NUMBERS, (), SPREAD),
    "mse of a table": (functional.mse_loss, TABLE, (3,), float(TABLE.double().var(0, correction=0).mean())),
    "half the mse": (lambda o, y: ((o - y[:, None]) ** 2).mean() / 2, NUMBERS, (1,), SPREAD / 2),
    "absolute": (lambda o, y: (o[:, 0] - y).abs().mean(), NUMBERS, (1,), float((NUMBERS - NUMBERS.median()).abs().mean())),
    "hinge": (hinge, BITS[:, 0], (1,), 2 * min(ONE, 1 - ONE)),
    "logits": (lambda o, y: functional.binary_cross_entropy_with_logits(o, y), BITS, (2,), np.mean([entropy(p, 1 - p) for p in BITS.mean(0).tolist()])),
    "probabilities": (probabilities, BITS[:, 0], (1,), entropy(ONE, 1 - ONE)),
    "density": (gaussian, NUMBERS, (2,), 0.5 * math.log(2 * math.pi * math.e * SPREAD)),
    "negative density": (gaussian, NUMBERS / 100, (2,), 0.5 * math.log(2 * math.pi * math.e * SPREAD / 1e4)),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "y", "shape", "expected"), MINIMIZED.values(), ids=MINIMIZED)
def test_a_users_loss_is_minimized_over_constants(loss, y, shape, expected):
    task, constant = constant_of(loss, y, torch.randn(50, *shape, generator=torch.Generator().manual_seed(0)))
    assert constant.loss == pytest.approx(expected, abs=1e-3)
    assert constant.output.shape == (1, *shape)
    batches = torch.arange(600).view(12, 50)
    assert constant.of_rows(batches) is None
    of_batches = [float(constant.of_targets(task, y[b], 50)) for b in batches]
    outputs = constant.output.expand(50, *shape)
    assert of_batches == [float(loss(outputs, y[b])) for b in batches]
    assert np.mean(of_batches) == pytest.approx(constant.loss, rel=1e-5)


def test_negative_baselines_are_negative():
    assert MINIMIZED["negative density"][3] < -1


@pytest.mark.parametrize("batch_size", [10, 60, 600, 1000])
def test_losses_that_depend_on_the_batch_size(batch_size):
    """A sum over the batch, and a loss of the batch's mean: averaged over batches as large as the trial's."""
    _, constant = constant_of(lambda o, y: ((o[:, 0] - y) ** 2).sum(), NUMBERS, torch.zeros(5, 1), batch_size)
    assert constant.loss == pytest.approx(batch_size * SPREAD, rel=1e-4)
    _, constant = constant_of(lambda o, y: (o.mean() - y.mean()) ** 2, NUMBERS, torch.zeros(5, 1), batch_size)
    assert constant.loss < 1.5 * SPREAD / batch_size
    assert constant.loss > 0.5 * SPREAD / batch_size or batch_size > 100  # few batches differ by chance, or not at all


@pytest.mark.parametrize("batch_size", [8, 64, 99, 100, 130, 3000])
def test_data_that_are_sorted(batch_size):
    """A hundred rows make one batch of 64 and a rest: the first 64 rows would be of one class for the most part."""
    labels = (torch.arange(100) >= 50).long()
    _, constant = constant_of(functional.cross_entropy, labels, torch.zeros(64, 2), batch_size)
    assert constant.loss == pytest.approx(math.log(2), rel=2e-3)
    assert constant.output.softmax(1)[0, 0] == pytest.approx(0.5, abs=0.03)


def test_a_large_training_set_is_sampled_over_its_whole_length():
    y = torch.linspace(0, 1, 50_000)  # sorted
    _, constant = constant_of(functional.mse_loss, y[:, None], torch.zeros(64, 1), 64)
    assert constant.loss == pytest.approx(1 / 12, rel=0.01)


def refusing(*_):
    raise RuntimeError("no constants")


@pytest.mark.parametrize(
    "loss", [refusing, lambda o, _: o.mean() / 0, lambda o, y: functional.cross_entropy(o, y.long() + 9)]
)
def test_a_loss_that_refuses_every_constant(loss):
    with pytest.raises(ValueError, match="the loss is not finite for any constant output"):
        constant_of(loss, NUMBERS, torch.zeros(50, 1))


def test_a_loss_that_does_not_depend_on_the_output():
    _, constant = constant_of(lambda _, y: (y**2).mean(), NUMBERS, torch.zeros(50, 1))
    assert constant.loss == pytest.approx(float((NUMBERS**2).mean()))


UNBOUNDED = {
    "linear": lambda o, y: o.mean() + y.mean(),
    "a critic's": lambda o, y: (o[:, 0] * (1 - y)).mean(),
    "of logits, not log-probabilities": lambda o, y: functional.nll_loss(o.expand(-1, 2), (y > 3).long()),
    "logarithmic": lambda o, y: -functional.softplus(o[:, 0]).log().mean() * y.mean(),
}


@pytest.mark.parametrize("loss", UNBOUNDED.values(), ids=UNBOUNDED)
def test_a_loss_without_a_lower_bound_has_no_baseline(loss):
    with pytest.raises(NoBaselineError, match="no lower bound over constant predictions"):
        constant_of(loss, NUMBERS, torch.zeros(50, 1))


BOUNDED = {
    "at infinity": lambda o, y: functional.softplus(-o[:, 0] * (1 + 0 * y)).mean(),
    "slowly": lambda o, y: (1 / (1 + (o[:, 0] + 1) ** 2) + 0 * y).mean(),
    "exponential": lambda o, y: (o[:, 0].exp() + 0 * y).mean(),
}


@pytest.mark.parametrize("loss", BOUNDED.values(), ids=BOUNDED)
def test_a_loss_that_comes_near_its_bound_only_far_away(loss):
    _, constant = constant_of(loss, NUMBERS, torch.zeros(50, 1))
    assert constant.loss < 0.5


def test_an_output_that_is_not_one_tensor():
    with pytest.raises(ValueError, match="the model's output is a tuple, not one tensor"):
        constant_of(lambda o, _: o[0].mean(), NUMBERS, (torch.zeros(50, 1), torch.zeros(50, 1)))


class Named(Dataset):
    def __len__(self):
        return 600

    def __getitem__(self, i):
        return torch.zeros(1), {"label": LABELS[i], "weight": torch.tensor(1.0)}


def weighted(output, target):
    losses = functional.cross_entropy(output, target["label"], reduction="none")
    return (losses * target["weight"]).mean()


def test_targets_of_several_parts():
    rows = DatasetRows(Named())
    task, constant = constant_of(weighted, LABELS, torch.zeros(50, 4), train=rows)
    assert constant.loss == pytest.approx(entropy(*frequencies(LABELS)), abs=1e-3)
    index = torch.arange(7)
    expected = functional.cross_entropy(constant.output.expand(7, 4), LABELS[:7])
    torch.testing.assert_close(constant.of_targets(task, rows.take(index)[1], 7), expected)


def test_a_loss_of_one_element():
    task, constant = constant_of(lambda o, y: ((o[:, 0] - y) ** 2).mean()[None], NUMBERS, torch.zeros(50, 1))
    assert constant.loss == pytest.approx(SPREAD, abs=1e-3)
    assert constant.of_targets(task, NUMBERS[:3], 3).shape == ()


# --- outputs that obey something whatever the weights: so must the constant

X = torch.tensor(RANDOM.normal(size=(600, 5)), dtype=torch.float32)
ANCHORS = functional.normalize(torch.tensor(RANDOM.normal(size=(4, 8)), dtype=torch.float32), dim=1)


class Unit(nn.Module):
    def forward(self, x):
        return functional.normalize(x, dim=1)


class Heads(nn.Module):
    def forward(self, x):
        return torch.cat([part.softmax(1) for part in x.split(2, dim=1)], dim=1)


def own_nll(shares, y):
    return -shares[torch.arange(len(y)), y].log().mean()


def clamped(output, y):
    """Free of its wall at 0 and 1, the cross-entropy of probabilities has no lower bound above 1."""
    p = output.squeeze(1)
    return -(y * p.clamp_min(1e-7).log() + (1 - y) * (1 - p).clamp_min(1e-7).log()).mean()


def info_nce(embedded, y):
    """Pairs of each row with the next: of a constant, every pair is as good as any."""
    return functional.cross_entropy(embedded @ embedded.roll(1, 0).T / 0.1, torch.arange(len(y)))


def agreement(output, y):
    return -(output[:, 0] * (2 * y - 1)).mean()


H_LABELS, H_SEQUENCES, H_BITS = entropy(*frequencies(LABELS)), entropy(*frequencies(SEQUENCES)), entropy(ONE, 1 - ONE)
OBEYING = {
    "log-probabilities": (functional.nll_loss, LABELS, [4, nn.LogSoftmax(1)], H_LABELS),
    "log-probabilities over time": (lambda o, y: functional.nll_loss(o.transpose(1, 2), y), SEQUENCES, [12, nn.Unflatten(1, (3, 4)), nn.LogSoftmax(2)], H_SEQUENCES),
    "log-probabilities, classes first": (functional.nll_loss, SEQUENCES, [12, nn.Unflatten(1, (4, 3)), nn.LogSoftmax(1)], H_SEQUENCES),
    "probabilities": (own_nll, LABELS, [4, nn.Softmax(1)], H_LABELS),
    "divergence": (lambda o, y: functional.kl_div(o, functional.one_hot(y, 4).float(), reduction="batchmean"), LABELS, [4, nn.LogSoftmax(1)], H_LABELS),
    "sigmoid": (probabilities, BITS[:, 0], [1, nn.Sigmoid()], H_BITS),
    "sigmoid, torch's loss": (lambda o, y: functional.binary_cross_entropy(o[:, 0], y), BITS[:, 0], [1, nn.Sigmoid()], H_BITS),
    "sigmoid, clamped": (clamped, BITS[:, 0], [1, nn.Sigmoid()], H_BITS),
    "tanh": (agreement, BITS[:, 0], [1, nn.Tanh()], -abs(2 * ONE - 1)),
    "not negative": (lambda o, y: (o[:, 0] + 0 * y).mean(), NUMBERS, [1, nn.ReLU()], 0),
    "unit vectors": (lambda o, y: -(o * ANCHORS[y]).sum(1).mean(), LABELS, [8, Unit()], -float(ANCHORS[LABELS].mean(0).norm())),
    "contrastive": (info_nce, LABELS, [8, Unit()], math.log(50)),
    "mean and log-variance": (gaussian, NUMBERS, [2], MINIMIZED["density"][3]),
}  # fmt: skip


def network(width, *tail):
    return lambda: nn.Sequential(nn.Linear(5, width), *tail)


@pytest.mark.parametrize(("loss", "y", "layers", "expected"), OBEYING.values(), ids=OBEYING)
def test_the_constant_obeys_what_all_outputs_do(loss, y, layers, expected):
    task = task_of(loss, y, build=network(*layers), train=TensorRows(X, y))
    constant = Baselines(task, CPU).of(recipe())
    assert constant.loss == pytest.approx(expected, abs=2e-3)
    assert float(constant.of_targets(task, y, 600)) == pytest.approx(expected, abs=2e-3) or loss is info_nce


@pytest.mark.parametrize(
    ("loss", "y", "layers"), [(functional.nll_loss, LABELS, [4]), (agreement, BITS[:, 0], [1]),
     (lambda o, y: own_nll(o[:, :2], y % 2) + own_nll(o[:, 2:], y % 2), LABELS, [4, Heads()])],
    ids=["logits", "linear", "two distributions side by side"],
)  # fmt: skip
def test_outputs_that_obey_nothing_that_is_known(loss, y, layers):
    task = task_of(loss, y, build=network(*layers), train=TensorRows(X / 1e3, y))  # small: in [-1, 1] by chance
    with pytest.raises(NoBaselineError, match="no lower bound"):
        Baselines(task, CPU).of(recipe())


def test_numbers_in_an_interval_by_chance_bind_no_constant():
    task = task_of(
        functional.mse_loss, NUMBERS[:, None], build=network(1, nn.Sigmoid()), train=TensorRows(X, NUMBERS[:, None])
    )
    assert Baselines(task, CPU).of(recipe()).loss == pytest.approx(SPREAD, abs=1e-3)


def test_what_outputs_obey_does_not_depend_on_which_recipe_came_first():
    task = task_of(functional.nll_loss, LABELS, build=network(4, nn.LogSoftmax(1)), train=TensorRows(X, LABELS))
    baselines = Baselines(task, CPU)
    assert baselines.of(recipe(init_scale=1e30)) is baselines.of(recipe())


# --- one baseline for all recipes that share it


def recipe(**values):
    return Recipe.of({"batch_size": 50, **values})


def test_recipes_share_a_baseline():
    baselines = Baselines(task_of("mse", TABLE), CPU)
    first = baselines.of(recipe())
    assert baselines.of(recipe(lr=3, init_scale=9, batch_size=7, input_norm="standardize")) is first
    assert baselines.of(recipe(target_norm="standardize")).loss == pytest.approx(1, rel=1e-5)
    scaled = (TABLE - TABLE.amin(0)) / (TABLE.amax(0) - TABLE.amin(0))
    assert baselines.of(recipe(target_norm="minmax")).loss == pytest.approx(
        float(scaled.var(0, correction=0).mean()), rel=1e-4
    )
    assert baselines.of(recipe()) is first


def test_a_users_baseline_depends_on_the_batch_size():
    baselines = Baselines(task_of(lambda o, y: ((o[:, 0] - y) ** 2).sum(), NUMBERS), CPU)
    assert baselines.of(recipe()).loss == pytest.approx(50 * SPREAD, rel=1e-4)
    assert baselines.of(recipe(batch_size=10)).loss == pytest.approx(10 * SPREAD, rel=1e-4)
    assert baselines.of(recipe(lr=3)) is baselines.of(recipe())


def test_a_users_baseline_does_not_depend_on_which_recipe_came_first():
    """An axis of the factory may change the shape of the output."""

    def mixture(output, y):
        return -torch.logsumexp(-((output - y[:, None]) ** 2), dim=1).mean() + math.log(output.shape[1])

    task = task_of(mixture, NUMBERS, build=lambda parts=1: nn.Linear(1, parts))
    ways = [[recipe(parts=1), recipe(parts=3)], [recipe(parts=3), recipe(parts=1)]]
    found = []
    for way in ways:
        baselines = Baselines(task, CPU)
        found.append({r: baselines.of(r) for r in way})
    for r in ways[0]:
        assert found[0][r].loss == found[1][r].loss
        assert found[0][r].output.shape == found[1][r].output.shape == (1, dict(r.extra)["parts"])


def test_finding_a_baseline_draws_nothing_of_the_users():
    before = torch.get_rng_state()
    task = task_of(functional.mse_loss, NUMBERS[:, None], build=lambda: nn.Sequential(nn.Linear(1, 1), nn.Dropout()))
    Baselines(task, CPU).of(recipe())
    assert torch.equal(torch.get_rng_state(), before)
