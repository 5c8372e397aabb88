"""`recipefuzz.watch`: what it finds in loops of the user's own, and that it leaves healthy ones alone."""

from __future__ import annotations

import ast
import copy
import gc
import linecache
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recipefuzz
from recipefuzz.diagnose.rerun import calls, steady
from recipefuzz.diagnosis import Diagnosis

START = """\
import torch
from torch import nn
from torch.nn import functional as F
import recipefuzz

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = [(torch.randn(16, 4), torch.rand(16, 1)) for _ in range(6)]

"""


def run(folder: Path, code: str) -> dict[str, Any]:
    """A script of the user's, run; its names."""
    path = folder / "train.py"
    path.write_text(START + textwrap.dedent(code))
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names


def diagnosed(folder: Path, code: str) -> tuple[Diagnosis, dict[str, Any]]:
    """What `w` says of a script that fails."""
    names = run(folder, code)
    assert names["w"].diagnosis is not None, "nothing was found"
    return names["w"].diagnosis, names


def test_log_of_zero_in_the_loss(tmp_path):
    found, names = diagnosed(
        tmp_path,
        """
        loader[3][0][2] = 1e9
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                p = torch.sigmoid(model(x)) if x.max() < 100 else torch.zeros_like(y) * model(x)
                loss = -(
                    y * torch.log(p)
                ).mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.root, found.phase, found.op, found.step) == ("log_of_zero", "code", "loss", "log", 4)
    assert found.source == "y * torch.log(p)"
    assert names["w"].steps == 6


def test_division_by_zero_in_the_model(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = model

            def forward(self, x):
                h = self.body(x)
                return h / x.abs().sum(1, keepdim=True)

        net = Net()
        loader[2][0][5] = 0
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(net(x), y).backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.phase, found.op, found.step) == ("division_by_zero", "forward", "div", 3)
    assert found.source == "return h / x.abs().sum(1, keepdim=True)"


def test_gradient_of_sqrt_at_zero(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        loader[1][0].zero_()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.zero_()
                    p.requires_grad_(False)
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                size = model(x).square().sum(1)
                loss = size.sqrt().mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.phase, found.op, found.step) == ("sqrt_gradient_at_zero", "backward", "sqrt", 2)
    assert found.source == "loss = size.sqrt().mean()"


@pytest.mark.parametrize(("side", "called"), [(0, "the model's input"), (1, "`target`")])
def test_not_a_number_in_a_batch(tmp_path, side, called):
    found, _ = diagnosed(
        tmp_path,
        f"""
        loader[4][{side}][3, 0] = float("nan")
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, target in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), target)
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.root, found.phase, found.step) == ("data_nonfinite", "data", "data", 5)
    assert f"it came in with {called}" in found.explanation


def test_an_input_that_the_loop_itself_made_bad(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        loader[2][0][3] = 1.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for raw, y in loader:
                spread = raw.std(1, keepdim=True)
                x = (raw - raw.mean(1, keepdim=True)) / spread
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.step) == ("division_by_zero", 3)
    assert found.source == "x = (raw - raw.mean(1, keepdim=True)) / spread"


def test_bad_rows_that_the_loop_picks_from_the_data(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        data, targets = torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])
        data[7, 1] = float("-inf")
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for start in range(0, 96, 16):
                rows = torch.arange(start, start + 16)
                optimizer.zero_grad()
                F.mse_loss(model(data[rows] - data[rows]), targets[rows]).backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.root, found.step) == ("data_nonfinite", "data", 1)


def test_modules_that_keep_a_state(tmp_path):
    """A replay goes out from the buffers that the step found, written or bound anew, and leaves the present ones."""
    found, names = diagnosed(
        tmp_path,
        """
        class Centred(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("written", torch.ones(4))
                self.register_buffer("bound", torch.ones(4))
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                self.written += 1
                self.bound = self.bound - 0.5
                return (x / self.bound) * self.written

        net = nn.Sequential(Centred(), model)
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for x, y in loader[:2]:
                optimizer.zero_grad()
                loss = F.mse_loss(net(x), y)
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.step, found.source) == (
        "division_by_zero",
        2,
        "return (x / self.bound) * self.written",
    )
    state = names["net"][0]
    assert (state.calls, state.written[0], state.bound[0]) == (2, 3.0, 0.0)


def test_an_iterator_is_not_advanced(tmp_path):
    found, names = diagnosed(
        tmp_path,
        """
        loader[2][1][0] = -1.0
        batches = iter(loader)
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for _ in range(len(loader)):
                x, y = next(batches)
                optimizer.zero_grad()
                loss = (model(x) - y.log()).square().mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step, names["w"].steps) == ("log_of_negative", "log", 3, 6)


def test_a_batch_that_was_fetched_ahead(tmp_path):
    """The variables have gone on to the next batch; the model is given its own once more."""
    found, _ = diagnosed(
        tmp_path,
        """
        loader[2][0][0] = 0.0
        batches = iter([*loader, loader[0]])
        x, y = next(batches)
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for _ in range(len(loader)):
                loss = (model(x) / x.abs().sum(1, keepdim=True)).mean() if False else model(x).div(1).mean()
                loss = loss + (model(x.clone()).mean() * 0)
                x, y = next(batches)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if w.steps == 3:
                    with torch.no_grad():
                        model[0].weight.fill_(float("inf"))
        """,
    )
    assert (found.phase, found.step) == ("optimizer", 4)
    assert "parameter 0.weight, which the update of step 3 left so" in found.explanation
    assert found.source == "optimizer.step()"


def test_a_mask_is_not_bad_data(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(4, 8)

            def forward(self, x, mask):
                h = self.inner(x)
                scores = h @ h.T + mask
                return torch.softmax(scores, 1) @ h

        net = Attend()
        mask = torch.full((16, 16), float("-inf")).triu(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for i, (x, y) in enumerate(loader):
                if i == 2:
                    mask[0, 0] = float("-inf")
                optimizer.zero_grad()
                loss = (net(x, mask) - y).square().mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.step) == ("fully_masked_softmax", 3)
    assert found.source == "return torch.softmax(scores, 1) @ h"


def test_helper_functions_and_clipping(tmp_path):
    """Forward and backward stand in two functions; the norm of the gradients has made all of them NaN by the step."""
    found, names = diagnosed(
        tmp_path,
        """
        seen = []

        def loss_of(net, x, y):
            d = (net(x) - y).abs()
            return (d * 1e3).exp().mean() if x.max() > 100 else d.mean()

        def update(loss):
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        def train_step(x, y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            update(loss)
            seen.append(loss.item())

        loader[2][0][3] = 1e4
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                train_step(x, y)
        """,
    )
    assert (found.cause, found.op, found.step) == ("exp_overflow", "exp", 3)
    assert found.source == "return (d * 1e3).exp().mean() if x.max() > 100 else d.mean()"
    assert len(names["seen"]) == 6


def test_gradient_accumulation(tmp_path):
    """The bad micro-batch is an earlier one than that of the step."""
    found, _ = diagnosed(
        tmp_path,
        """
        loader[3][1][0] = 0.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for i, (x, y) in enumerate(loader):
                loss = (model(x) / y).mean() / 3
                loss.backward()
                if i % 3 == 2:
                    optimizer.step()
                    optimizer.zero_grad()
        """,
    )
    assert (found.cause, found.op, found.step) == ("division_by_zero", "div", 2)


def test_all_on_one_line(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        loader[2][1][0] = 0.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader: optimizer.zero_grad(); loss = (model(x) / y).mean(); loss.backward(); optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step) == ("division_by_zero", "div", 3)


def test_a_loop_in_a_method(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        class Trainer:
            def fit(self):
                for self.epoch in range(2):
                    for x, y in loader:
                        with torch.autograd.set_grad_enabled(True):
                            output = model(x)
                            terms = [self.term(o, t) for o, t in zip(output, y)]
                            loss = sum(t for t in terms if self is not None)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()

            def term(self, output, target):
                return (output * 0 + target).sqrt().sum()

        loader[1][1][3] = -1.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            Trainer().fit()
        """,
    )
    assert (found.cause, found.op, found.step) == ("domain_error", "sqrt", 2)
    assert found.source == "return (output * 0 + target).sqrt().sum()"


def test_two_models_with_an_optimizer_each(tmp_path):
    found, names = diagnosed(
        tmp_path,
        """
        judge = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
        judges = torch.optim.Adam(judge.parameters(), lr=0.01)
        loader[3][1][0] = 1e9
        with (
            recipefuzz.watch(model, optimizer, stop=False) as other,
            recipefuzz.watch(judge, judges, stop=False) as w,
        ):
            for x, y in loader:
                made = model(x)
                judges.zero_grad()
                loss = -(judge(y).log() + (1 - judge(made.detach())).log()).mean()
                loss = loss + (y - 1e9).abs().min().log() * judge(y).sum()
                loss.backward()
                judges.step()
                optimizer.zero_grad()
                (-judge(made).log().mean()).backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step) == ("log_of_zero", "log", 4)
    assert found.source == "loss = loss + (y - 1e9).abs().min().log() * judge(y).sum()"
    assert "which the update" not in found.explanation
    assert (names["w"].steps, names["other"].steps) == (6, 6)


def test_a_cell_that_is_called_many_times_a_step(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        cell = nn.GRUCell(4, 8)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        xs = torch.randn(5, 50, 16, 4)
        with recipefuzz.watch(cell, optimizer, stop=False) as w:
            for number, sequence in enumerate(xs):
                optimizer.zero_grad()
                h = torch.zeros(16, 8)
                for t, x in enumerate(sequence):
                    h = cell(x, h)
                    if number == 2 and t == 45:
                        h = h / (t - 45)
                h.mean().backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step, found.source) == ("division_by_zero", "div", 3, "h = h / (t - 45)")


def test_closures(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        loader[2][1][0] = 0.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                def closure():
                    optimizer.zero_grad()
                    loss = (model(x) / y).square().mean()
                    loss.backward()
                    return loss
                optimizer.step(closure)
        """,
    )
    assert (found.cause, found.op, found.step) == ("division_by_zero", "div", 3)


def test_loss_is_bad_and_gradients_are_not(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        loader[2][1][0] = 0.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                loss = model(x).mean() + y.log().mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step) == ("log_of_zero", "log", 3)


def test_gradients_set_by_hand(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        loader[2][1][0] = 0.0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                parameters = list(model.parameters())
                for p, g in zip(parameters, torch.autograd.grad((model(x) / y).mean(), parameters)):
                    p.grad = g
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step) == ("division_by_zero", "div", 3)
    assert found.evidence["symptom"] == "a gradient"


DROPOUT = """
    class Gate(nn.Module):
        def forward(self, x):
            kept = F.dropout(torch.ones_like(x), 0.02)
            return x / kept

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Gate(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with recipefuzz.watch(model, optimizer, stop=False) as w:
        for x, y in loader:
            optimizer.zero_grad()
            noise = torch.randn_like(y)
            loss = F.mse_loss(model(x), y + noise)
            loss.backward()
            before = [b.clone() for b in model.buffers()], torch.get_rng_state(), model[0].weight.grad
            optimizer.step()
            if w.diagnosis:
                break
"""


def test_random_numbers_are_drawn_again(tmp_path):
    """Which element dropout drops decides whether the step fails."""
    found, _ = diagnosed(tmp_path, DROPOUT)
    assert (found.cause, found.op, found.module) == ("division_by_zero", "div", "2")


def test_the_replay_leaves_no_trace(tmp_path):
    watched = run(tmp_path, DROPOUT)
    plain = run(
        tmp_path,
        DROPOUT.replace("with recipefuzz.watch(model, optimizer, stop=False) as w:", "if True:")
        .replace("if w.diagnosis", f"if len(seen) == {watched['w'].steps}")
        .replace("before =", "seen.append(1); before =")
        .replace("for x, y", "seen = []\n        for x, y"),
    )
    for a, b in zip(watched["before"][0], plain["before"][0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(watched["before"][1], plain["before"][1])
    assert torch.equal(watched["before"][2].nan_to_num(), plain["before"][2].nan_to_num())


@pytest.mark.parametrize(("first", "kept"), [(60, True), (66, False)])
def test_random_numbers_that_only_later_steps_draw(tmp_path, first, kept):
    """One step of 64 is asked; one that draws before that says that its numbers were not kept."""
    found, _ = diagnosed(
        tmp_path,
        f"""
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for i, (x, y) in enumerate(loader * 12):
                optimizer.zero_grad()
                output = model(x)
                noise = torch.randn(16, 1) if i >= {first} else 0.0
                loss = ((output + noise) / abs(i - 67)).mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.op, found.step) == ("division_by_zero", "div", 68)
    assert ("and the replay drew others" in found.explanation) != kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models(tmp_path, inside):
    """Watched from outside, or as the module in it, whose calls are compiled away."""
    found, names = diagnosed(
        tmp_path,
        f"""
        model[1] = nn.Softplus()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        loader[3][1][0] = 0.0
        with recipefuzz.watch({"model" if inside else "compiled"}, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                loss = (compiled(x) / y).mean()
                loss.backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.step, names["w"].steps) == ("division_by_zero", 4, 6)


class Network(nn.Module):
    """Attention with a mask of -inf, dropout, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.outer = nn.Linear(8, 1)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)
        return self.outer(self.drop(h + self.attend(h, h, h, attn_mask=self.mask, need_weights=False)[0]))[:, -1]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, *, watched: bool) -> Any:
    torch.manual_seed(1)
    loader = [(torch.randn(8, 5, 4), torch.randn(8, 1)) for _ in range(10)]
    w = recipefuzz.watch(model, optimizer) if watched else None
    if w:
        w.__enter__()
    for epoch in range(2):
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad(set_to_none=epoch == 0)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(loader[0][0])
        model.train()
    if w:
        w.__exit__(None, None, None)
    return w


@pytest.mark.parametrize("foreach", [False, True])
def test_healthy_loops_are_untouched(foreach):
    torch.manual_seed(0)
    first = Network()
    second = copy.deepcopy(first)
    adam = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=foreach) for m in (first, second)]
    fit(first, adam[0], watched=False)
    w = fit(second, adam[1], watched=True)
    assert (w.steps, w.diagnosis) == (20, None)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_nothing_is_left_behind():
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = torch.autograd.backward
    before = {k: copy.copy(v) for k, v in vars(model).items()}
    with recipefuzz.watch(model, optimizer) as w:
        assert torch.autograd.backward is not backward
        batch = torch.randn(8, 5, 4)
        model(batch).mean().backward()
        optimizer.step()
    assert w.steps == 1
    assert torch.autograd.backward is backward
    assert vars(model).keys() == before.keys()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None


class CopiesAll(nn.Linear):
    """A module that copies itself and is pickled in a way of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()


@pytest.mark.parametrize("make", [Network, lambda: CopiesAll(4, 1)])
def test_copies_and_checkpoints_of_a_watched_model(tmp_path, make):
    """As loops keep the best model, or a moving average: they are the model as it is without the watch."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(8, 5, 4)
    with recipefuzz.watch(model, optimizer) as w:
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        model(batch).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        zero = twin.eval()(batch)
        assert not w._moment.over or len(w._moment.forwards) == 1, "a copy was taken for the model"
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(zero, torch.zeros_like(zero)), "the copy called the model"
    for other in (twin, loaded):
        assert vars(other).get("_compiled_call_impl") is None
        assert other(batch).shape == zero.shape


def test_a_model_that_compiled_itself_is_called_as_it_was():
    model = nn.Linear(3, 1)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recipefuzz.watch(model, optimizer) as outer, recipefuzz.watch(model, optimizer) as inner:
        model(torch.ones(2, 3)).mean().backward()
        optimizer.step()
    assert (len(outer._moment.parameters), outer.steps, inner.steps) == (2, 1, 1)
    assert model._compiled_call_impl is compiled


def test_nothing_is_left_behind_by_a_failure():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = torch.autograd.backward
    weight = model.weight.detach().clone()

    def train() -> None:
        with recipefuzz.watch(model, optimizer):
            (model(torch.ones(2, 3)) / 0).mean().backward()
            optimizer.step()

    with pytest.raises(recipefuzz.NonFiniteError, match="division_by_zero"):
        train()
    assert torch.autograd.backward is backward
    assert "_compiled_call_impl" not in vars(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert torch.equal(model.weight, weight), "the step with bad gradients was made"


SCALER = """
    scaler = torch.amp.GradScaler("cpu", init_scale={scale})
    loader = loader * {epochs}
    with recipefuzz.watch(model, optimizer) as w:
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = model(x)
                loss = F.mse_loss(output, y){more}
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
"""


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_no_failure(tmp_path, fused):
    adam = f"\n    optimizer = torch.optim.Adam(model.parameters(), fused={fused})"
    names = run(tmp_path, adam + SCALER.format(scale="2.0**24", epochs=30, more=""))
    assert names["w"].diagnosis is None
    assert names["scaler"].get_scale() < 2.0**24


def test_a_scaler_that_skips_for_ever_is(tmp_path):
    with pytest.raises(recipefuzz.NonFiniteError, match="step 1: loss is not finite: log_of_zero"):
        run(tmp_path, SCALER.format(scale="2.0**10", epochs=30, more=" + (y * 0).log().mean()"))


def test_gradients_that_the_loop_mends_are_no_failure(tmp_path):
    names = run(
        tmp_path,
        """
        with recipefuzz.watch(model, optimizer) as w:
            for x, y in loader:
                optimizer.zero_grad()
                (model(x * 0) * 0).sqrt().mean().backward()
                for p in model.parameters():
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimizer.step()
        """,
    )
    assert (names["w"].steps, names["w"].diagnosis) == (6, None)


def test_parameters_that_the_last_step_broke(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
        loader[0][1].fill_(1e3)
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader[:1]:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        """,
    )
    assert (found.root, found.cause, found.phase) == ("recipe", "exploding_parameters", "optimizer")
    assert found.source == "optimizer.step()"


FROZEN = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4).requires_grad_({trained})
        self.words.weight.data[8] = float("nan")
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.words(x))

model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = [torch.randint(0, 8, (16,)) for _ in range(6)]
loader[{at}][2] = 8
with recipefuzz.watch(model, optimizer, stop=False) as w:
    for x in loader:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize(("trained", "at"), [(False, 3), (True, 0)])
def test_parameters_that_were_given_so(tmp_path, trained, at):
    """No update has left a frozen one so, nor any before the first: the learning rate is not to blame."""
    found, _ = diagnosed(tmp_path, FROZEN.format(trained=trained, at=at))
    assert (found.root, found.cause, found.step) == ("data", "data_nonfinite", at + 1)
    assert found.source == "return self.head(self.words(x))"
    assert "came in with parameter words.weight, which was so before the first step" in found.explanation
    assert "learning rate" not in found.advice


def test_without_source_the_forward_pass_is_replayed():
    names: dict[str, Any] = {}
    code = textwrap.dedent(
        """
        loader[2][0][3] = float("inf")
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        """
    )
    exec(compile(START + code, "<stdin>", "exec"), names)
    found = names["w"].diagnosis
    assert (found.cause, found.step) == ("data_nonfinite", 3)
    assert "the step's own statements could not be run again, so only the model's forward pass was replayed" in (
        found.explanation
    )


def test_a_file_that_was_edited_meanwhile_is_not_run(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        import linecache, pathlib
        path = (lambda: 0).__code__.co_filename
        loader[2][1][3] = 0
        with recipefuzz.watch(model, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                loss = (model(x) / y).mean()
                loss.backward()
                pathlib.Path(path).write_text("raise SystemExit\\n" * 99)
                linecache.clearcache()
                optimizer.step()
        """,
    )
    assert found.cause == "unknown"
    assert "could not be run again" in found.explanation


def test_sparse_gradients_and_keyword_arguments(tmp_path):
    found, _ = diagnosed(
        tmp_path,
        """
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(9, 4, sparse=True)

            def forward(self, *, words, scale):
                return self.table(words).sum() / scale

        net = Words()
        optimizer = torch.optim.SparseAdam(net.parameters())
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for scale in (1.0, 2.0, 0.0):
                optimizer.zero_grad()
                net(words=torch.tensor([1, 2, 2]), scale=scale).backward()
                optimizer.step()
        """,
    )
    assert (found.cause, found.source) == ("division_by_zero", "return self.table(words).sum() / scale")


def test_what_the_error_says(tmp_path):
    code = """
        loader[2][1][3] = 0
        with recipefuzz.watch(model, optimizer) as w:
            for x, y in loader:
                optimizer.zero_grad()
                ratio = model(x) / y
                loss = ratio.mean()
                loss.backward()
                optimizer.step()
        """
    with pytest.raises(recipefuzz.NonFiniteError) as caught:
        run(tmp_path, code)
    assert str(caught.value) == textwrap.dedent(
        f"""\
        {tmp_path}/train.py:16: step 3: loss is not finite: division_by_zero (code)
          fix:      keep the divisor away from zero: add an epsilon (x / (d + 1e-8)), or clamp it

          ratio = model(x) / y
          div at train.py:16 gave -inf in 1 of 16 elements, given 16x1 float32, -1.87 to -1.07; 16x1 float32, 0 to 0.915, 1 of 16 zero (at the first bad element: -1.355, 0); before it the weights were 1.16 times their first size and the loss -2.85 (at first 1.35)
          from there: mean at train.py:17"""
    )


def test_help_does_not_import_torch():
    code = "import recipefuzz, sys; assert 'watch' in recipefuzz.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(3,), (3, 50_000), (2, 70_000)])
def test_each_gradient_is_looked_at(optimizer, value, shape):
    """A large and a small one, of either kind of optimizer; the loss is finite."""
    weights = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(5))]
    for bad in weights:
        opt = getattr(torch.optim, optimizer)(weights, lr=1e-3)
        with recipefuzz.watch(nn.Identity(), opt, stop=False) as w:
            for step in range(3):
                opt.zero_grad()
                hook = bad.register_hook(lambda g: g.index_fill(-1, torch.tensor(2), value)) if step == 1 else None
                sum(p.mean() for p in weights).backward()
                assert (w._pending is not None) == (step == 1)
                if hook:
                    hook.remove()
                    opt.zero_grad()
                opt.step()
        assert w.diagnosis is None


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_are_left_as_they_are():
    """Bit for bit, those that are part of a graph too."""
    weight = nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    bits = torch.cat([torch.tensor([-0.0, 1e-45, 3.4e38, -3.4e38]), torch.randn(996)])
    with recipefuzz.watch(nn.Identity(), optimizer) as w:
        (weight * bits).sum().backward()
        assert torch.equal(weight.grad.view(torch.int32), bits.view(torch.int32))
        optimizer.zero_grad()
        weight.pow(3).sum().backward(create_graph=True)
        (second,) = torch.autograd.grad(weight.grad.sum(), weight)
    assert torch.allclose(second, 6 * weight)
    assert w.diagnosis is None
    weight.grad = None  # of a graph that holds it


@pytest.mark.parametrize("kind", ["complex", "expanded"])
def test_gradients_that_are_read_another_way(kind):
    weight = nn.Parameter(torch.ones(4, dtype=torch.complex64 if kind == "complex" else torch.float32))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    with recipefuzz.watch(nn.Identity(), optimizer, stop=False) as w:
        for scale in (1.0, 1.0, float("nan")):
            weight.grad = torch.full((1,), scale, dtype=weight.dtype).expand(4)
            optimizer.step()
            assert (w.diagnosis is not None) == (scale != scale)


def test_batch_norm_that_the_failing_batch_spoilt(tmp_path):
    """Its statistics aren't copied at each step; the replay neither reads the spoilt ones nor writes them."""
    found, names = diagnosed(
        tmp_path,
        """
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = model

            def forward(self, x):
                return self.body(x / x.abs().sum(1, keepdim=True))

        net = Net()
        loader[2][0][5] = 0
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for x, y in loader[:3]:
                optimizer.zero_grad()
                F.mse_loss(net(x), y).backward()
                seen = model[1].running_mean.clone(), model[1].num_batches_tracked.item()
                optimizer.step()
        """,
    )
    assert (found.cause, found.step, found.phase) == ("division_by_zero", 3, "forward")
    assert names["seen"][0].isnan().all()
    assert names["model"][1].running_mean.isnan().all()
    assert (names["seen"][1], names["model"][1].num_batches_tracked) == (3, 3)


def test_batch_norm_that_was_spoilt_before(tmp_path):
    """In evaluation it reads its statistics: they are the origin then."""
    found, _ = diagnosed(
        tmp_path,
        """
        norm = nn.BatchNorm1d(4).eval()
        norm.running_mean[2] = float("nan")
        net = nn.Sequential(norm, model)
        with recipefuzz.watch(net, optimizer, stop=False) as w:
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(net(x), y).backward()
                optimizer.step()
        """,
    )
    assert found.step == 1
    assert "running_mean" in found.explanation


def test_calls_end_at_the_function_that_watches():
    """But not where that can pause, as a generator's callers change: then all are noted."""

    def made(outermost: Any) -> list[str]:
        return [code.co_name for code, _ in calls(sys._getframe(0), outermost=outermost)]

    def watching() -> list[str]:
        return made(steady(sys._getframe(0)))

    def pausing() -> Any:
        yield made(steady(sys._getframe(0)))

    here = "test_calls_end_at_the_function_that_watches"
    assert watching() == ["made", "watching"]
    assert next(pausing())[:3] == ["made", "pausing", here]


RATIO = """
    optimizer.zero_grad()
    loss = (model(x) / y).square().mean()
    loss.backward()
    optimizer.step()
"""


def ratio(body: str = RATIO, before: str = "", watched: str = "model, optimizer") -> str:
    """A loop whose fourth step divides by zero."""
    head = f"loader[3][1][3] = 0\nwith recipefuzz.watch({watched}, stop=False) as w:\n    for i, (x, y) in enumerate(loader):"
    return textwrap.dedent(before) + head + textwrap.indent(textwrap.dedent(body), " " * 8)


PARTS = """
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 1))

        def predict(self, x):
            return self.inner(x) @ self.weight

    net = Parts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
"""
METHOD = RATIO.replace("model(x)", "net.predict(x)")
ANEW = "\noptimizer = torch.optim.Adam(model.parameters())" + textwrap.dedent(RATIO)
LOOKED = "\nprint(model(loader[0][0]).mean().item())" + textwrap.dedent(RATIO)
LOOKED_AFTER = textwrap.dedent(RATIO) + "print(model(loader[0][0]).mean().item())"
TRACED = textwrap.dedent(RATIO) + "torch.func.vmap(torch.func.grad(lambda a: model(a).sum()))(x)"
BY_HAND = """
    optimizer.zero_grad()
    out = model(x) / y
    out.backward(torch.ones_like(out))
    optimizer.step()
"""
REENTRANT = """
    optimizer.zero_grad()
    h = torch.utils.checkpoint.checkpoint(model[:2], model[0].weight.new_tensor(x.tolist()).requires_grad_(), use_reentrant=True)
    ((model[2](h) + 0 * model(x)) / y).mean().backward()
    optimizer.step()
"""
MAML = """
    optimizer.zero_grad()
    fast = dict(model.named_parameters())
    for k in range(2):
        inner = (torch.func.functional_call(model, fast, (x,)) - 1).square().mean()
        steps = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), steps)}
    (torch.func.functional_call(model, fast, (x,)) / y).mean().backward()
    optimizer.step()
"""
LAMBDA = "step = lambda x, y: ((model(x) / y).mean().backward(), optimizer.step())\n"
WRAPPER = """
    class Warm:
        def __init__(self, inner):
            self.inner, self.zero_grad = inner, inner.zero_grad

        def step(self):
            self.inner.step()

    optimizer = Warm(optimizer)
"""
NAMELESS = """
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"rate": 0.1})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)

    optimizer = Own(model.parameters())
"""
LAZY = """
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
"""
COMPILED = """
    step = torch.compile(lambda x, y: (model(x) / y).mean(), backend="eager")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(ratio(METHOD, PARTS, "net, optimizer"), id="a method of the model is called"),
        pytest.param(ratio(watched="nn.ModuleList([model]), optimizer"), id="a list of models"),
        pytest.param(ratio(ANEW), id="an optimizer made anew in each step"),
        pytest.param(ratio(LOOKED), id="outputs looked at before the step, with gradients"),
        pytest.param(ratio(LOOKED_AFTER), id="outputs looked at after the step"),
        pytest.param(ratio(TRACED), id="per-sample gradients of torch.func"),
        pytest.param(ratio(BY_HAND), id="backward(gradient=...)"),
        pytest.param(ratio(REENTRANT), id="a reentrant checkpoint"),
        pytest.param(ratio(MAML), id="MAML"),
        pytest.param(ratio("\nstep(x, y)", LAMBDA), id="a lambda"),
        pytest.param(ratio(before=WRAPPER), id="a wrapped optimizer"),
        pytest.param(ratio(before=NAMELESS), id="an optimizer without lr"),
        pytest.param(ratio(before=LAZY), id="lazy modules"),
        pytest.param(ratio("\nstep(x, y).backward(); optimizer.step()", COMPILED), id="a compiled loss"),
    ],
)
def test_loops_as_they_are_written(tmp_path, code):
    found, names = diagnosed(tmp_path, code)
    assert (found.cause, found.op, found.step, names["w"].steps) == ("division_by_zero", "div", 4, 6)
    assert "/ y)" in found.source or found.source == "out = model(x) / y"


GAN = """
    judge = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    judges = torch.optim.Adam(judge.parameters(), lr=0.01)
    total = torch.zeros(())
    loader[3][1][3] = 0
    with {watch}(model, optimizer{stop}) as w:
        for i, (x, y) in enumerate(loader[:4]):
            made = model(x)
            judges.zero_grad()
            judge(made.detach()).square().mean().backward()
            judges.step()
            total += made.detach().mean()
            optimizer.zero_grad()
            loss = (judge(made) / y).mean()
            loss.backward()
    states = [*judge.state_dict().values(), total, *(p.grad for p in judge.parameters())]
    states += [s for state in judges.state.values() for s in state.values()]
"""


def test_a_replay_leaves_other_models_as_they_are(tmp_path):
    """Between the model's call and the loss another one is trained, with batch norm, and a tensor is summed up."""
    watched = run(tmp_path, GAN.format(watch="recipefuzz.watch", stop=", stop=False"))
    plain = run(
        tmp_path,
        "from contextlib import nullcontext" + textwrap.dedent(GAN.format(watch="(lambda *_: nullcontext())", stop="")),
    )
    assert watched["w"]._pending.cause == "division_by_zero"
    for a, b in zip(watched["states"], plain["states"], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_watches_end_in_any_order():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = torch.autograd.backward
    first, second = (recipefuzz.watch(model, optimizer).__enter__() for _ in range(2))
    for ended in (first, second):
        model(torch.ones(2, 3)).mean().backward()
        optimizer.step()
        ended.__exit__(None, None, None)
    assert (first.steps, second.steps) == (1, 2)
    assert torch.autograd.backward is backward
    assert "_compiled_call_impl" not in vars(model)


def test_what_another_thread_trains_is_not_this_watchs():
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recipefuzz.watch(model, optimizer) as w:
        thread = threading.Thread(target=lambda: (other(torch.ones(2, 3)) / 0).mean().backward())
        thread.start()
        thread.join()
        assert w._pending is None
        thread = threading.Thread(target=lambda: (model(torch.ones(2, 3)) / 0).mean().backward())
        thread.start()
        thread.join()
        assert w._pending.cause == "division_by_zero"
        optimizer.zero_grad()
    assert w.diagnosis is None


def test_a_replica_is_called_itself():
    """`nn.DataParallel` makes one for each GPU, a copy with the attributes of the model, and a thread for it."""
    model = nn.Sequential(nn.Linear(3, 1))
    with recipefuzz.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        replica = model._replicate_for_data_parallel()
        replica._modules["0"] = nn.Identity()
        shapes: list[torch.Size] = []
        thread = threading.Thread(target=lambda: shapes.append(replica(torch.ones(2, 3)).shape))
        thread.start()
        thread.join()
    assert shapes == [(2, 3)]


def test_parameters_that_are_not_finite_by_intention():
    model = nn.Linear(3, 1)
    model.mask = nn.Parameter(torch.full((3, 3), float("-inf")), requires_grad=False)
    with recipefuzz.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as w:
        model(torch.ones(2, 3)).mean().backward()
    assert w.diagnosis is None


def test_buffers_that_come_and_go():
    """Removed, resized, made in inference mode, hanging on a graph: the next step begins as without a watch."""
    model = nn.Linear(3, 1)
    for name in ("removed", "resized", "inferred", "hanging"):
        model.register_buffer(name, torch.zeros(5000))
    with recipefuzz.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        del model.removed
        model.resized.resize_(3)
        with torch.inference_mode():
            model.inferred = torch.ones(5000)
        model.hanging = model.weight.sum().expand(5000)
        for _ in range(2):
            model(torch.ones(2, 3)).mean().backward()


def test_nothing_is_kept_after_the_first_failure(tmp_path):
    """Nor while a step of its own calls the model over and over: no batch but the failing one's successors is held."""
    names = run(tmp_path, ratio())
    assert names["w"]._moment.forwards == []
    assert "_compiled_call_impl" not in vars(names["model"])


def test_a_cell_of_a_notebook():
    """IPython keeps its source under a name of its own, and compiles each of its statements by itself."""
    code, name = START + textwrap.dedent(ratio()), "<ipython-input-3-0123456789ab>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "__main__"}
    for statement in ast.parse(code).body:
        exec(compile(ast.Module([statement], []), name, "exec"), names)
    found = names["w"].diagnosis
    assert (found.file, found.cause, found.step) == (name, "division_by_zero", 4)
    assert found.source == "loss = (model(x) / y).square().mean()"
