"""Recordings of a computation in lanes: replayed with any number of them, simplified, measured; and what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from recipefuzz.engines.capture import (
    CannotCaptureError,
    Linear,
    Recording,
    bytes_per_lane,
    compiled_source,
    linear_in_lanes,
    record,
    replaying,
    written,
)
from recipefuzz.engines.simplify import FEW_CLASSES, simplified

CPU = torch.device("cpu")
TWO = (2, 3)
TABLE = torch.arange(12.0).view(3, 4)


def drawn(lanes, *shapes):
    generator = torch.Generator().manual_seed(lanes)
    return [torch.randn(lanes, *shape, generator=generator) for shape in shapes]


def recorded(function, shapes, inputs=drawn):
    return linear_in_lanes(*(record(function, inputs(lanes, *shapes)) for lanes in TWO), TWO)


def chain(x, w):
    return ((x @ w).tanh().sum((1, 2)),)


def several_outputs(x, w):
    values, index = x.topk(2, dim=2)
    mean, spread = torch.var_mean(w, dim=2)
    return values, index, mean + spread, x.split(2, dim=2)[1]


def in_place(x, w):
    y = x.clone()
    y.mul_(2).add_(1)
    y[:, 0] = 7.0
    y[:, 1:].sub_(w.sum((1, 2))[:, None, None])
    z = torch.empty_like(y)
    torch.exp(y.clamp(max=1), out=z)
    return y, z


def changes_its_argument(x, w):
    x.add_(w.mean((1, 2))[:, None, None])
    return (x.square().sum((1, 2)),)


def views(x, w):
    y = x.transpose(1, 2).reshape(len(x), -1)
    kept = y.view(len(x), -1)
    first = kept[:, :3]
    return first.flip(1), w.flatten(0, 1), x.expand(2, *x.shape).movedim(0, 1), w.unbind(1)[1]


def constants(x, w):
    return x @ TABLE.mT + torch.tensor([1.0, 2.0, 3.0]), w * torch.arange(3.0), w.new_full((len(w), 2), 0.5)


def returns_its_argument(x, w):
    return x, w.detach(), w.view(w.shape), TABLE


def gradient(x, w):
    with torch.enable_grad():
        leaf = w.detach().requires_grad_()
        loss = functional.log_softmax((x @ leaf).relu(), 2)[..., 0].mean(1)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), [leaf]))


def vmapped(x, w):
    def lane(x, w):
        hidden = functional.layer_norm(functional.linear(x, w.mT, w[0]), (3,))
        return functional.cross_entropy(hidden, torch.tensor([0, 1, 2, 0, 1]))

    with torch.enable_grad():
        leaf = w.detach().requires_grad_()
        losses = vmap(lane)(x, leaf)
        return (losses.detach(), *torch.autograd.grad(losses.sum(), [leaf]))


def special_floats(x, w):
    return x.masked_fill(x > 0, float("-inf")).amax(2), w.nan_to_num(0.0, float("inf")), w * -0.0, w.clamp(-1e30, 1e30)


def large_softmax(x, w):
    wide = w.repeat(1, 1, FEW_CLASSES)
    return wide.log_softmax(2), w.log_softmax(1), x.log_softmax(2), x.log_softmax(-1)


def unused_results(x, w):
    x @ w
    y = x + 1
    y.add_(1)
    torch.var_mean(x)
    return (y,)


def biased(x, w):
    product = x @ w
    twice = torch.bmm(x, w)
    return product + w[:, :1], w[:, 1:2] + torch.bmm(x, w), twice + twice, twice, torch.add(x @ w, w[:, :1], alpha=2)


def turned(x, w):
    product = torch.bmm(x, w)
    other = torch.bmm(x.transpose(1, 2), w.new_ones(len(w), 5, 2))
    return product.transpose(1, 2), other.transpose(1, 2), torch.bmm(x, w).transpose(1, 2).contiguous()


def times_one(x, w):
    return x * 1, (w * 1.0).view(w.shape) * 1, w.reshape(w.shape).expand(w.shape) + 0


def changed_since(x, w):
    """What a product was made of changes before the product is used."""
    y, z = x + 1, x + 2
    product, other = torch.bmm(y, w), torch.bmm(z, w)
    y.add_(1)
    z[:, 0] = 0.0
    return w[:, :1] + product, other.transpose(1, 2), y, z


def other_dtypes(x, w):
    times = torch.ops.aten.mul.Scalar
    return (
        times((x > 0).detach(), 1),
        times(x.long().detach(), 1.0),
        (x > 0) + torch.bmm(x, w).sum((1, 2), keepdim=True),
    )


def sums_of_products(x, w):
    mask, half, whole = x > 0, x.bfloat16(), x.long()
    return x * x + w[:, :1, :1], half * half + x, mask * mask + x, x + mask * x, whole * whole + x, whole + whole * mask


def products_of_what_changes(x, w):
    y = x + 1
    product = y * x
    y[:, 0] = 0.0
    return product + w[:, :1, :1], y


FUNCTIONS = [
    sums_of_products,
    products_of_what_changes,
    changed_since,
    other_dtypes,
    chain,
    several_outputs,
    in_place,
    changes_its_argument,
    views,
    constants,
    returns_its_argument,
    gradient,
    vmapped,
    special_floats,
    large_softmax,
    unused_results,
    biased,
    turned,
    times_one,
]
X, W = (5, 4), (4, 3)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_replay_is_the_computation_for_any_number_of_lanes(function, lanes):
    recording = recorded(function, (X, W))
    plain, fewer = (replaying(r)(lanes) for r in (recording, simplified(recording, CPU)))
    inputs = [drawn(lanes, X, W) for _ in range(3)]
    expected, found, after = function(*inputs[0]), plain(*inputs[1]), fewer(*inputs[2])
    assert len(expected) == len(found) == len(after)
    for mine, short, theirs in zip(found, after, expected, strict=True):
        assert mine.shape == short.shape == theirs.shape
        assert mine.dtype == short.dtype == theirs.dtype
        # with other kernels for one lane than for two, some sums are rounded otherwise
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(short, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    for a, b, c in zip(*inputs, strict=True):  # what it changes in place is changed alike
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_a_replay_can_be_called_again_and_holds_nothing():
    replay = replaying(recorded(gradient, (X, W)))(4)
    inputs = drawn(4, X, W)
    first = replay(*inputs)
    held = [weakref.ref(tensor) for tensor in first]
    again = replay(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    del first
    assert [ref() for ref in held] == [None] * len(held)


def test_a_replay_needs_no_autograd():
    replay = replaying(recorded(gradient, (X, W)))(4)
    x, w = drawn(4, X, W)
    with torch.inference_mode():
        assert not any(out.requires_grad for out in replay(x, w))


def calls_of(recording):
    return [str(call.op).removeprefix("aten.") for call in recording.calls]


@pytest.mark.parametrize(
    ("function", "gone", "there"),
    [
        (times_one, {"mul.Tensor"}, set()),
        (biased, set(), {"baddbmm.default", "add.Tensor"}),
        (unused_results, {"bmm.default", "var_mean.correction"}, {"add_.Tensor"}),
        (large_softmax, set(), {"amax.default", "_log_softmax.default"}),
        (gradient, {"_log_softmax_backward_data.default", "detach.default"}, set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_simplified(function, gone, there):
    before = recorded(function, (X, W))
    after = calls_of(simplified(before, CPU))
    if function is not times_one:  # vmap alone leaves products with the number 1
        assert not gone & set(after)
    assert there <= set(after)


def test_products_with_one_of_vmap_and_aliases_are_dropped():
    def scaled(x):
        return (torch.ops.aten.mul.Scalar(x.detach(), 1).view(x.shape).exp(),)

    recording = simplified(recorded(scaled, (X,)), CPU)
    assert calls_of(recording) == ["exp.default"]


def test_an_alias_of_what_changes_later_is_kept():
    def later(x):
        y = x * 2
        alias = y.detach()
        y.add_(1)
        return alias + 0, y

    found = replaying(simplified(recorded(later, (X,)), CPU))(5)(*drawn(5, X))
    assert all(torch.equal(a, b) for a, b in zip(found, later(*drawn(5, X)), strict=True))


def test_a_bias_of_another_dtype_is_not_fused_with_its_product():
    def half(x, w):
        return (w[:, :1] + torch.bmm(x.bfloat16(), w.bfloat16()),)

    x, w = drawn(4, X, W)
    (found,) = replaying(simplified(recorded(half, (X, W)), CPU))(4)(x, w)
    assert found.dtype == torch.float32
    assert torch.equal(found, half(x, w)[0])


def test_on_an_accelerator_softmaxes_stay_whole():
    recording = recorded(large_softmax, (X, W))
    assert "amax.default" not in calls_of(simplified(recording, torch.device("cuda")))


# --- sizes


def test_sizes_are_linear_in_the_lanes():
    def sized(x):
        return x.new_zeros(2 * len(x) + 5, 3), x.view(-1), x.new_ones(7)

    recording = recorded(sized, (X,))
    source, _ = compiled_source(recording)
    assert "[5 + 2 * lanes, 3]" in source
    assert Linear(5, 2) in recording.calls[0].args[1]
    assert [tuple(out.shape) for out in replaying(recording)(10)(*drawn(10, X))] == [(25, 3), (200,), (7,)]


def test_sizes_are_worked_out_once():
    source, _ = compiled_source(recorded(chain, (X, W)))
    made, body = source.split("def replay")
    assert "lanes" in made
    assert "lanes" not in body


def test_what_is_written_is_known():
    recording = recorded(in_place, (X, W))
    assert written(recording.calls)
    assert not {0, 1} & written(recording.calls)
    assert 0 in written(recorded(changes_its_argument, (X, W)).calls)
    assert written(recorded(chain, (X, W)).calls) == set()


# --- what can't be recorded


def reads(x):
    return (x * float(x.sum()),)


def asks(x):
    return (x if x.sum() > 0 else -x,)


def compares(x):
    return (x + torch.equal(x, x),)


def random(x):
    return (x + torch.rand(x.shape),)


def drops(x):
    return (functional.dropout(x, 0.5),)


def takes_a_step_a_lane(x):
    return (torch.stack([row.exp() for row in x.unbind(0)]),)


def squares_its_lanes(x):
    return (x * 0.5 ** len(x),)


def other_branch(x):
    return (x.exp() if len(x) == 2 else x.log(),)


REFUSED = {
    reads: r"it reads a tensor's value in Python \(\.item\(\), bool\(\), float\(\), torch\.equal\)",
    asks: "it reads a tensor's value in Python",
    compares: "it reads a tensor's value in Python",
    random: r"it draws random numbers \(aten\.rand\.default\)",
    drops: "it draws random numbers",
    takes_a_step_a_lane: "what it launches depends on the number of lanes",
    squares_its_lanes: r"it computes with the number of lanes \(0\.25 and 0\.125\)",
    other_branch: "what it launches depends on the number of lanes",
}


@pytest.mark.parametrize(("function", "message"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", None))
def test_what_can_not_be_recorded(function, message):
    with pytest.raises(CannotCaptureError, match=message):
        recorded(function, (X,))


@pytest.mark.parametrize("other", [torch.tensor([2.0]), torch.tensor([[1.0]])], ids=["value", "shape"])
def test_tensors_from_outside_must_not_change_from_call_to_call(other):
    outside = iter([torch.tensor([1.0]), other])

    def changing(x):
        return (x * next(outside),)

    with pytest.raises(CannotCaptureError, match="it holds tensors that change from call to call"):
        recorded(changing, (X,))


def test_a_nan_that_stays_one_is_a_constant():
    outside = iter([torch.tensor([float("nan"), 1.0])] * 2)

    def keeping(x):
        return (x.sum() * next(outside),)

    recording = recorded(keeping, (X,))
    assert len(recording.constants) == 1


# --- memory


class Peak(TorchDispatchMode):
    """Most bytes of storages that are made under it and alive at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = {}

    def ignore(self, *tensors):
        self._known |= {t.untyped_storage()._cdata: None for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            storage = out.untyped_storage() if isinstance(out, torch.Tensor) else None
            if storage is None or storage._cdata in self._known:
                continue
            size, key = storage.nbytes(), storage._cdata
            self._known[key] = weakref.finalize(storage, self._freed, key, size)
            self.now += size
            self.most = max(self.most, self.now)
        return result

    def _freed(self, key, size):
        self._known.pop(key, None)
        self.now -= size


def test_bytes_of_a_case_by_hand():
    def by_hand(x):
        a = x + 1  # 80 bytes a lane
        b = a * 2  # 160, then a goes
        c = b.view(-1)  # a view
        d = c.exp()  # 160
        e = torch.cat([d, d])  # 80 + 160 more, and b: all three, 320
        return (e.sum(),)

    assert bytes_per_lane(recorded(by_hand, (X,))) in (240, 320)


def test_what_does_not_grow_with_the_lanes_is_not_counted():
    assert bytes_per_lane(recorded(lambda x: (x.new_zeros(1000),), (X,))) == 0
    assert bytes_per_lane(Recording((), 0, {}, ())) == 0


@pytest.mark.parametrize("function", [chain, gradient, vmapped, biased, large_softmax], ids=lambda f: f.__name__)
def test_bytes_per_lane_are_near_the_peak(function):
    recording, lanes = simplified(recorded(function, (X, W)), CPU), 16
    replay, inputs = replaying(recording)(lanes), drawn(16, X, W)
    # the replay calls operations below any mode: its source, with the operations themselves
    source, names = compiled_source(recording)
    ops = {call.op._op: call.op for call in recording.calls}
    names = {name: ops.get(value, value) if callable(value) else value for name, value in names.items()}
    exec(source, names)
    with Peak() as peak:
        peak.ignore(*inputs, *recording.constants.values())
        outputs = names["make"](lanes)(*inputs)
    assert all(torch.allclose(a, b) for a, b in zip(outputs, replay(*inputs), strict=True))
    assert peak.most / 2 <= lanes * bytes_per_lane(recording) <= 2 * peak.most


def test_outputs_count_to_the_end():
    def kept(x):
        return x + 1, (x + 2).sum((1, 2))

    def dropped(x):
        return (x + 1).sum((1, 2)), (x + 2).sum((1, 2))

    each = 4 * X[0] * X[1]
    assert bytes_per_lane(recorded(kept, (X,))) >= 2 * each
    assert each <= bytes_per_lane(recorded(dropped, (X,))) < 2 * each


def test_recordings_of_modules_keep_to_their_inputs():
    """A model's own parameters that are not handed in are constants, and are not changed."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    recording = recorded(lambda x: (model(x).detach(),), (X,))
    assert len(recording.constants) == 2
    (x,) = drawn(9, X)
    torch.testing.assert_close(replaying(recording)(9)(x)[0], model(x).detach())
    assert replace(recording, constants={}).calls == recording.calls
