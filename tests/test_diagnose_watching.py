"""One step under watch: the operation that made the first value that is not finite, not those that passed it on."""

# ruff: noqa: ARG005 - every function of a table takes the input and the weight, needed or not

from __future__ import annotations

import copy
import inspect
import linecache
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recipefuzz.diagnose import replay
from recipefuzz.diagnose.replay import watched_step
from recipefuzz.diagnose.watching import Watch

INF = math.inf
X = torch.linspace(-1.0, 1.0, 12).view(4, 3)
MASK = torch.tensor([[True, False, False], [False, True, False], [False, False, True], [False, False, False]])
ONES = (~MASK).float()


class Net(nn.Module):
    """One weight, a buffer of -inf above the diagonal, and any function of the input and both."""

    def __init__(self, forward, weight=(0.5, 1.0, 1.5)):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("causal", torch.full((3, 3), -INF).triu(1))
        self._function = forward

    def forward(self, x):
        return self._function(x, self.weight, *([self.causal] if len(_parameters(self._function)) == 3 else []))


def _parameters(function):
    return inspect.signature(function).parameters


def mean(output, _target):
    return output.mean()


def step_of(model, x=X, y=None, loss=mean, optimizer=None):
    """An ordinary training step, as a function."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def failure_of(model, x=X, y=None, loss=mean, optimizer=None):
    model = model if isinstance(model, nn.Module) else Net(model)
    return watched_step(model, step_of(model, x, y, loss, optimizer), x, y, 1)


def source_of(failure):
    spot = failure.origin.event.spot
    assert spot.file == __file__
    return linecache.getline(spot.file, spot.line).strip()


@pytest.fixture
def watches(monkeypatch):
    """The watches that were used: what they kept tells that there was something to be mistaken about."""
    made = []

    class Kept(Watch):
        def __init__(self, model):
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(replay, "Watch", Kept)
    return made


# operation; each stands on one line, which is what is to be named
FORWARD = {
    "log": lambda x, w: torch.log(w * 0),
    "log2": lambda x, w: (x.abs() * w - 1).log2(),
    "div": lambda x, w: (x * w) / (x * 0),
    "reciprocal": lambda x, w: (w - w).reciprocal(),
    "sqrt": lambda x, w: torch.sqrt(x * w),
    "pow": lambda x, w: (x * w) ** 0.3,
    "acos": lambda x, w: torch.acos(w + 2),
    "exp": lambda x, w: torch.exp(w * 100),
    "softmax": lambda x, w: (x * w).masked_fill(x == x, -INF).softmax(-1),
    "log_softmax": lambda x, w: functional.log_softmax(x * w + torch.log(0 * ONES), -1),
    "mul": lambda x, w: (x * w).masked_fill(MASK, -INF) * ONES,
    "sub": lambda x, w: (x * w).masked_fill(x == x, -INF) - (x * w).masked_fill(MASK, -INF),
    "mean": lambda x, w: (x * w)[x > 5].mean(),
    "std": lambda x, w: (x * w)[:1].std(dim=0),
    "mm": lambda x, w: x @ (w[:, None] * 2e38),
    "sum": lambda x, w: (w * 2e38).sum(),
    "addmm": lambda x, w: torch.addmm(x.new_zeros(4, 1), x * 1e30, w[:, None] * 1e30),
    "cumsum": lambda x, w: (w * 2e38).cumsum(0),
    "atanh": lambda x, w: torch.atanh(w * 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("op", FORWARD)
def test_the_producer_of_the_forward_pass_with_its_line(op):
    function = FORWARD[op]
    failure = failure_of(function)
    event = failure.origin.event
    assert (event.spot.op, event.spot.phase, event.forward) == (op, "forward", None)
    assert (event.spot.file, event.spot.line) == (__file__, function.__code__.co_firstlineno)
    assert event.produces
    assert failure.symptom == "loss"
    assert failure.step == 1


def through_three_lines(x, w):
    h = x * w
    h = torch.log(h - h)
    h = h - h
    return h.relu() * 2


def only_one_of_two_is_guilty(x, w):
    fine = torch.sqrt(w)
    broken = x / torch.zeros(3)
    return (fine * w + broken * w).sum()


def bad_and_unused_before(x, w):
    unused = torch.log(w * 0)
    h = x * w
    h = torch.where(h > 5, unused, h)
    return torch.log(h)


def in_a_helper(x, w):
    return scaled(x * w) + 1


def scaled(h):
    return h / h.sum(1, keepdim=True).mul(0)


def divided_in_place(x, w):
    h = x * w
    h.div_(torch.zeros(3))
    h.add_(1).mul_(2)
    return h


def rows_written(x, w):
    h = x * w
    h[1] = torch.log(w * 0)
    return h + 1


def masked_rows_written(x, w):
    h = x * w
    with torch.no_grad():
        h[MASK] = torch.zeros(3) / 0.0
    return h + 1


def view_divided_and_another_overwritten(x, w):
    h = x.clone()
    h[:, 0].div_(0)
    h[:, 1] = 0
    return h * w


def overwritten_then_broken_again(x, w):
    h = x.clone()
    h.div_(0)
    h.fill_(1)
    h.sub_(2).log_()
    return h * w


def out_of_a_division(x, w):
    h = torch.empty(4, 3)
    torch.div(x, x * 0, out=h)
    return h * w


def over_old_memory(x, w):
    for _ in range(30):
        torch.log(x.clone() - 5)
    h = x * w
    for _ in range(30):
        torch.log(x.clone() - 5)
    return h / h.new_zeros(3)


def a_list_at_once(x, w):
    parts = torch._foreach_log([x * 0, x * 0 + 1])
    return (parts[0] + parts[1]) * w


def complex_numbers(x, w):
    z = torch.complex(w, w)
    z = z / torch.zeros(3)
    return z.real.sum() + x.sum()


def an_infinity_that_is_nobodys_intention(x, w):
    scores = x * w / 0.0
    return (scores - scores.max()).softmax(-1)


def minus_an_intended_infinity(x, w):
    h = (x * w).masked_fill(MASK, -INF)
    h = h + 1
    return h - h


def zero_times_a_buffer(x, w, causal):
    h = x * w
    return h + causal[0] * 0


BURIED = {
    through_three_lines: ("log", "torch.log(h - h)"),
    only_one_of_two_is_guilty: ("div", "x / torch.zeros(3)"),
    bad_and_unused_before: ("log", "return torch.log(h)"),
    in_a_helper: ("div", "return h / h.sum(1, keepdim=True)"),
    divided_in_place: ("div", "h.div_(torch.zeros(3))"),
    rows_written: ("log", "h[1] = torch.log(w * 0)"),
    masked_rows_written: ("div", "h[MASK] = "),
    view_divided_and_another_overwritten: ("div", "h[:, 0].div_(0)"),
    overwritten_then_broken_again: ("log", "h.sub_(2).log_()"),
    out_of_a_division: ("div", "torch.div(x, x * 0, out=h)"),
    over_old_memory: ("div", "h / h.new_zeros(3)"),
    a_list_at_once: ("log", "torch._foreach_log"),
    complex_numbers: ("div", "z = z / torch.zeros(3)"),
    an_infinity_that_is_nobodys_intention: ("div", "scores = x * w / 0.0"),
    minus_an_intended_infinity: ("sub", "return h - h"),
    zero_times_a_buffer: ("mul", "causal[0] * 0"),
}


@pytest.mark.parametrize("function", BURIED, ids=lambda f: f.__name__)
def test_the_producer_not_those_that_pass_it_on(function):
    op, source = BURIED[function]
    failure = failure_of(function)
    assert failure.origin.event.spot.op == op
    assert source in source_of(failure)
    assert failure.origin.chain[0] is failure.origin.event
    assert failure.origin.chain[-1].spot.op == "mean"


def test_the_chain_leads_from_the_producer_to_the_loss():
    chain = failure_of(through_three_lines).origin.chain
    assert [e.spot.op for e in chain] == ["log", "sub", "relu", "mul", "mean"]
    assert [e.spot.phase for e in chain] == ["forward"] * 4 + ["loss"]
    assert [e.produces for e in chain] == [True, False, False, False, False]


def filled_with_nan_labels(output, y):
    return ((output - y)[~y.isnan()] ** 2).mean()


def a_weighted_softmax(x, w, causal):
    return ((x * w)[:, None] * w[:, None] + causal).softmax(-1)


def best_of_several(x, w):
    best = torch.tensor(INF)
    for column in (x * w).unbind(1):
        best = torch.minimum(best, column.abs().sum())
    return best


def assigned_one_by_one(x, w):
    scores = x * w
    scores[0, 1] = -INF
    scores[MASK] = -INF
    scores[:, 2] = float("-inf")
    return scores.exp()


def broken_and_overwritten(x, w):
    h = x.clone()
    h[:, 0].div_(0)
    h[:, 0] = 1
    return h * w


def whole_overwritten(x, w):
    h = torch.log(x * 0)
    h.copy_(x)
    h.fill_(2.0)
    return h * w


def masked_attention(x, w):
    q = (x * w).view(1, 1, 4, 3)
    return functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(4, 4, dtype=torch.bool).tril())


def by_hand_attention(x, w):
    scores = (x * w) @ (x * w).T
    scores = scores.masked_fill(torch.ones(4, 4).triu(1) == 1, -INF)
    scores = scores - scores.max(-1, keepdim=True).values
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ x


# finite losses, gradients and parameters, with values on the way that are not
HEALTHY = {
    "softmax over a mask": lambda x, w: (x * w).masked_fill(MASK, -INF).softmax(-1),
    "log-softmax over a mask, of which one is read": lambda x, w: (x * w).masked_fill(MASK, -INF).log_softmax(-1)[3],
    "cross-entropy": lambda x, w: functional.cross_entropy((x * w).masked_fill(MASK, -INF), torch.tensor([1, 2, 0, 0])),
    "logsumexp over a mask": lambda x, w: (x * w).masked_fill(MASK, -INF).logsumexp(-1),
    "padding of a maximum": lambda x, w: functional.max_pool1d(functional.pad(x * w, (1, 1), value=-INF), 3, 1),
    "min over a mask": lambda x, w: (x * w).masked_fill(MASK, INF).min(-1).values,
    "amax of a full tensor": lambda x, w: torch.maximum(torch.full((4, 3), -INF), x * w),
    "relu of a mask": lambda x, w: (x * w).masked_fill(MASK, -INF).relu(),
    "sigmoid of a mask": lambda x, w: torch.sigmoid((x * w).masked_fill(MASK, -INF)),
    "mask made by a log": lambda x, w: (x * w + torch.log(ONES)).softmax(-1),
    "buffer": a_weighted_softmax,
    "index assignment": assigned_one_by_one,
    "where with a log of what needs no gradient": lambda x, w: torch.where(x > 0, torch.log(x) * 2, x * w),
    "where with an inverse": lambda x, w: torch.where(MASK, x.new_tensor(0.0), 1 / ONES) * w,
    "nan_to_num of a constant": lambda x, w: torch.nan_to_num(torch.zeros(3) / 0) + x * w,
    "nanmean": lambda x, w: (x * w).masked_fill(MASK, math.nan).nanmean(),
    "part broken, then overwritten": broken_and_overwritten,
    "whole broken, then overwritten": whole_overwritten,
    "attention by hand": by_hand_attention,
    "a division that nobody reads": lambda x, w: (x / 0, x * w)[1],
    "detached for a log": lambda x, w: (torch.log(w.detach() * 0), x * w)[1],
    "top-k filter": lambda x, w: (x * w).masked_fill(x * w < (x * w).topk(2).values[:, -1:], -INF).softmax(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_infinities_of_a_healthy_step_are_no_failure(name, watches):
    model = Net(HEALTHY[name])
    assert watched_step(model, step_of(model), X, None, 1) is None
    assert torch.isfinite(model.weight.grad).all()
    assert watches[0].events  # there was something to be mistaken about


def test_labels_that_are_filtered_out_are_no_failure(watches):
    y = torch.where(MASK, math.nan, X)
    assert failure_of(lambda x, w: x * w, X, y, filled_with_nan_labels) is None
    assert watches[0].events


# these come from constants, or are a kernel's own: no operation of the step makes them
NEVER_SEEN = {
    "minimum with a constant": lambda x, w: torch.minimum(x * w, torch.tensor([INF, 1.0, INF])),
    "search for the best": best_of_several,
    "one over infinity": lambda x, w: x * w + 1 / torch.tensor(INF),
    "attention": masked_attention,
    "pooling": lambda x, w: functional.max_pool1d(x * w, 3, 1, padding=1),
}


@pytest.mark.parametrize("name", NEVER_SEEN)
def test_infinities_that_no_operation_gives_are_no_failure(name):
    assert failure_of(NEVER_SEEN[name]) is None


BACKWARD = {
    "sqrt": lambda x, w: (w * 0).sqrt(),
    "pow": lambda x, w: (w * 0) ** 0.5,
    "acos": lambda x, w: torch.acos(w / w),
    "asin": lambda x, w: torch.asin(w / w),
    "log": lambda x, w: torch.where(w > 5, torch.log(w * 0), w),
    "div": lambda x, w: torch.where(w > 5, x / (w * 0), w),
}  # fmt: skip
TRAPS = ("log", "div")  # where() hides the value; its derivative comes back as 0 * inf


@pytest.mark.parametrize("op", BACKWARD)
def test_the_producer_of_the_backward_pass_is_the_forward_operation(op):
    function = BACKWARD[op]
    failure = failure_of(function)
    event = failure.origin.event
    assert (event.spot.phase, event.forward.op, event.forward.phase) == ("backward", op, "forward")
    assert (event.spot.file, event.spot.line) == (__file__, function.__code__.co_firstlineno)
    assert failure.symptom == "gradient of weight"
    assert event.forward_finite is (op not in TRAPS)


def test_a_trap_whose_value_is_infinite_is_named_in_the_forward_pass():
    """The derivative of exp is its result: inf * 0 comes back from what was made then."""
    failure = failure_of(lambda x, w: torch.where(w > 5, torch.exp(w * 1000), w))
    event = failure.origin.event
    assert (event.spot.op, event.spot.phase, event.forward) == ("exp", "forward", None)
    assert failure.symptom == "gradient of weight"


class Rounded(torch.autograd.Function):
    """Its own backward pass divides by zero, on a line of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = gradient / (x - x)
        return slope * 2


class Logged(Rounded):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.log(x - x)


def test_a_custom_function_is_named_with_its_own_backward_line():
    failure = failure_of(lambda x, w: Rounded.apply(w * 3))
    assert failure.origin.event.spot.phase == "backward"
    assert failure.origin.event.spot.op == "div"
    assert source_of(failure) == "slope = gradient / (x - x)"


def test_a_custom_function_is_named_with_its_own_forward_line():
    failure = failure_of(lambda x, w: Logged.apply(w * 3))
    assert (failure.origin.event.spot.phase, failure.origin.event.spot.op) == ("forward", "log")
    assert source_of(failure) == "return torch.log(x - x)"


def test_micro_batches_that_add_up_in_one_gradient():
    model = Net(lambda x, w: (x * w).sum() if x[0, 0] < 0 else (w * 0).sqrt().sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        first = model(X)
        first.backward()
        second = model(-X)
        second.backward()
        optimizer.step()
        return (first + second).detach()

    failure = watched_step(model, step, X, None, 1)
    assert failure.symptom == "gradient of weight"
    assert (failure.origin.event.spot.phase, failure.origin.event.forward.op) == ("backward", "sqrt")
    assert failure.origin.event.spot.line == model._function.__code__.co_firstlineno


def test_one_weight_used_twice_of_which_one_use_is_bad():
    failure = failure_of(lambda x, w: (x * w).sum() + torch.sqrt(w - w).sum() + (w * w).sum())
    assert (failure.origin.event.spot.phase, failure.origin.event.forward.op) == ("backward", "sqrt")


def test_the_optimizer_that_divides_by_a_moment_that_became_zero():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).half()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    failure = failure_of(model, (X * 1e-6).half(), loss=lambda o, _: o.mean() * 1e-2, optimizer=adam)
    event = failure.origin.event
    assert event.spot.phase == "optimizer"
    assert event.spot.op == "addcdiv"
    assert (event.spot.file, event.spot.line) == (__file__, step_line())
    assert failure.symptom == "parameter weight"


def step_line():
    """Where `step_of` calls the optimizer."""
    lines, start = inspect.getsourcelines(step_of)
    return start + next(i for i, line in enumerate(lines) if "optimizer.step()" in line)


class Block(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.inner = nn.ModuleDict({"linear": nn.Linear(3, 3), "act": Act(broken)})

    def forward(self, x):
        return self.inner["act"](self.inner["linear"](x))


class Act(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def forward(self, h):
        return (h - h).log() if self.broken else h.tanh()


class Tower(nn.Module):
    def __init__(self, broken, shared=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(i == broken) for i in range(3)])
        self.again = self.blocks[1] if shared else nn.Identity()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.again(x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_module_by_its_qualified_name(broken, shared):
    spot = failure_of(Tower(broken, shared)).origin.event.spot
    assert spot.module == f"blocks.{broken}.inner.act"
    assert "(h - h).log()" in linecache.getline(spot.file, spot.line)


def test_a_layer_of_torch_is_named_with_the_user_line_that_called_it():
    model = Tower(None)
    with torch.no_grad():
        model.blocks[0].inner["linear"].weight.fill_(1e38)
    for block in model.blocks:
        block.inner["act"] = nn.Identity()  # tanh(inf) is 1
    spot = failure_of(model, X + 5).origin.event.spot
    assert (spot.op, spot.module) == ("addmm", "blocks.0.inner.linear")
    assert 'self.inner["linear"](x)' in linecache.getline(spot.file, spot.line)


def test_the_module_of_a_functional_call():
    model = Tower(1)

    def call(output, _):
        parameters = {name: p * 1 for name, p in model.named_parameters()}
        return torch.func.functional_call(model, parameters, (X,)).mean() + 0 * output.mean()

    spot = failure_of(model, loss=call).origin.event.spot
    assert spot.module == "blocks.1.inner.act"


def test_a_failure_of_the_loss_belongs_to_no_module():
    failure = failure_of(nn.Linear(3, 1), loss=lambda o, _: torch.log(o.mean() * 0))
    spot = failure.origin.event.spot
    assert (spot.phase, spot.module, spot.op) == ("loss", "", "log")
    assert "torch.log(o.mean() * 0)" in source_of(failure)


def test_what_came_with_the_batch():
    x = X.clone()
    x[2, 1] = math.nan
    failure = failure_of(nn.Linear(3, 1), x)
    assert (failure.origin.event, failure.origin.outside) == (None, "x")
    y = X.clone()
    y[0] = INF
    failure = failure_of(nn.Linear(3, 3), X, y, functional.mse_loss)
    assert (failure.origin.event, failure.origin.outside) == (None, "y")


@pytest.mark.parametrize("value", [math.nan, INF])
def test_what_came_with_a_parameter(value):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].weight[0, 2] = value
    failure = failure_of(model)
    assert (failure.origin.event, failure.origin.outside) == (None, "parameter 1.weight")


def test_a_buffer_that_the_step_breaks():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.register_buffer("average", torch.ones(3))

        def forward(self, x):
            self.average.mul_(x.std(0) / x.new_zeros(3))
            return self.linear(x)

    failure = failure_of(Counting())
    assert failure.symptom == "buffer average"
    assert failure.origin.event.spot.op == "div"
    assert "self.average.mul_" in source_of(failure)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.rnn(x.repeat(3, 1)[None])[0]) / x.new_zeros(1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.project = nn.Linear(3, 4)

    def forward(self, x):
        h = self.project(x)[None]
        ignored = torch.tensor([[False, False, True, True]])
        return self.attention(h, h, h, key_padding_mask=ignored, need_weights=True)[0] / x.new_zeros(1)


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2, padding=1), nn.Dropout(0.2)
        )

    def forward(self, x):
        return self.layers(x[:, None]) / x.new_zeros(1)


class Embedding(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)

    def forward(self, x):
        return self.table((x.abs() * 4).long()).log_softmax(-1) / x.new_zeros(1)


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return checkpoint(lambda h: self.second(h).tanh(), self.first(x), use_reentrant=False) / x.new_zeros(1)


NETS = {
    "conv": Convolving,
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attending,
    "embedding": lambda: Embedding(False),
    "embedding with a sparse gradient": lambda: Embedding(True),
    "checkpoint": Recomputed,
    "sparse matrix": lambda: Net(lambda x, w: torch.sparse.mm(x.to_sparse(), w[:, None]) / x.new_zeros(1)),
    "transposed": lambda: Net(lambda x, w: (x.T.contiguous().T * w).expand(2, 4, 3) / x.new_zeros(1)),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_of_every_kind(name):
    torch.manual_seed(0)
    failure = failure_of(NETS[name]())
    event = failure.origin.event
    assert (event.spot.op, event.spot.phase, event.spot.module) == ("div", "forward", "")
    assert "/ x.new_zeros(1)" in source_of(failure)
    assert failure.recurrent is (name in ("rnn", "lstm", "gru"))


def test_a_sparse_gradient_that_is_not_finite():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    failure = failure_of(table, torch.tensor([0, 3]), loss=lambda o, _: (o - o.detach()).sqrt().sum())
    assert failure.symptom == "gradient of weight"
    assert failure.origin.event.forward.op == "sqrt"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_looked_into(layout):
    def ragged(x, w):
        rows = torch.nested.as_nested_tensor([x[0, :2], x[1]], layout=layout)
        rows = rows / 0.0
        return torch.nested.to_padded_tensor(rows, 0.0)[:, :3] * w

    failure = failure_of(ragged)
    assert failure.origin.event.spot.op == "div"
    assert source_of(failure) == "rows = rows / 0.0"


def test_one_weight_applied_over_and_over_is_a_recurrence():
    def steps(number):
        def forward(x, w):
            for _ in range(number):
                x = torch.tanh(x * w)
            return torch.log(x - x)

        return forward

    assert not failure_of(steps(3)).recurrent
    assert failure_of(steps(9)).recurrent


def deep():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_watching_changes_no_bit_of_the_step(kind):
    watched, plain = deep(), deep()
    steps = [step_of(m, X, None, mean, kind(m.parameters(), lr=0.1)) for m in (watched, plain)]
    for number in range(1, 4):
        torch.manual_seed(number)
        assert watched_step(watched, steps[0], X, None, number) is None
        after = torch.get_rng_state()
        torch.manual_seed(number)
        steps[1]()
        assert torch.equal(torch.get_rng_state(), after)
        for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(watched.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_a_step_that_fails_is_the_same_under_watch():
    def forward(x, w):
        return torch.sqrt(w * 0) + torch.log(x * w)

    watched, plain = Net(forward), Net(forward)
    assert watched_step(watched, step_of(watched), X, None, 1) is not None
    step_of(plain)()
    assert torch.equal(watched.weight.isnan(), plain.weight.isnan())


def hooks_of(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")
    modules = [len(getattr(m, kind)) for m in model.modules() for kind in kinds]
    return modules + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]


@pytest.mark.parametrize("broken", [None, 1, "raises"])
def test_nothing_of_the_watch_is_left_on_the_model(broken):
    model = Tower(broken)
    before = hooks_of(model)
    model.blocks[0].register_forward_hook(lambda *_: None)
    own = hooks_of(model)
    assert own != before
    if broken == "raises":
        with pytest.raises(RuntimeError, match="shapes"):
            failure_of(model, torch.zeros(4, 7))
    else:
        failure_of(model)
    assert hooks_of(model) == own
    copy.deepcopy(model)


def test_the_same_step_gives_the_same_events():
    def told():
        torch.manual_seed(0)
        return repr(failure_of(Tower(1)))

    assert told() == told()


@pytest.mark.parametrize("wrap", [lambda t: {"a": ONES, "b": t}, lambda t: [ONES, {"b": (t,)}]], ids=["dict", "nested"])
def test_rows_of_a_batch_are_named_however_it_holds_them(wrap):
    def given(x, w):
        inner = x["b"] if isinstance(x, dict) else x[1]["b"][0]
        return inner * w

    failure = failure_of(given, x=wrap(torch.full((4, 3), math.nan)))
    assert (failure.origin.event, failure.origin.outside) == (None, "x")
