"""How a watch reads a step's loss and gradients: by the function in C, and by asking torch, which must say the same."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recipefuzz.diagnose import history
from recipefuzz.diagnose.history import History

COMPILED = importlib.util.find_spec("recipefuzz.diagnose._finite") is not None
INCLUDE = Path(sysconfig.get_path("include")) / "Python.h"
COMPILER = shutil.which((os.environ.get("CC") or "cc").split()[0])
KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BAD = [math.nan, math.inf, -math.inf]

in_c = pytest.mark.skipif(history.finite_loss is None, reason="_finite.c isn't compiled, or torch is older than 2.10")


@pytest.fixture(params=[pytest.param("c", marks=in_c), "torch"])
def reader(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(history, "finite_loss", None)
    return request.param


in_both = pytest.mark.usefixtures("reader")


def parameter(gradient: Tensor | None) -> nn.Parameter:
    if gradient is None:
        return nn.Parameter(torch.zeros(3))
    made = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype), requires_grad=False)
    made.grad = gradient
    return made


def is_good(*gradients: Tensor | None, loss: Tensor | None = None) -> bool:
    return History([parameter(g) for g in gradients]).add(loss)


@pytest.mark.skipif(COMPILER is None or not INCLUDE.exists(), reason="no C compiler, or no headers of Python")
@pytest.mark.skipif(sys.platform == "win32", reason="another compiler's flags")
def test_it_is_compiled_where_it_can_be():
    assert COMPILED
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert history.finite_loss is not None


@in_both
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_one_bad_element_is_seen_wherever_it_stands(kind, count):
    for at in {0, count // 2, count - 1}:
        for bad in BAD:
            gradient = torch.ones(count, dtype=kind)
            gradient[at] = bad
            assert not is_good(torch.ones(2), gradient)


@in_both
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_finite_number_is_good(kind):
    """The largest, whose sum overflows, the smallest, those below the normal ones, both zeros."""
    limits = torch.finfo(kind)
    numbers = (limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, limits.eps, 0.0, -0.0, 1.0, -1.0)
    assert is_good(torch.tensor([n for n in numbers for _ in range(5)], dtype=kind))


@in_c
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_all_numbers_of_16_bits_are_read_as_torch_reads_them(kind):
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for numbers in words.view(kind).split(1024):
        for number in numbers.unique().tolist():
            assert is_good(torch.full((3,), number, dtype=kind)) == math.isfinite(number)


def dense() -> dict[str, Tensor]:
    image = torch.ones(2, 3, 4, 5)
    return {
        "scalar": torch.tensor(1.0),
        "transposed": torch.ones(5, 7).T,
        "channels last": image.to(memory_format=torch.channels_last),
        "part of a larger one": torch.ones(40)[7:29],
        "one row": torch.ones(6, 5)[2:3],
        "large": torch.ones(history.SMALL + 1),
    }


@in_both
@pytest.mark.parametrize("name", dense())
def test_layouts(name):
    gradient = dense()[name]
    assert is_good(gradient)
    gradient[(-1,) * gradient.dim()] = math.nan
    assert not is_good(gradient)


@in_both
def test_what_lies_between_a_gradients_elements_is_none_of_it():
    rows = torch.full((4, 6), math.nan)
    rows[:, ::2] = 1
    assert is_good(rows[:, ::2])
    rows[3, 4] = math.inf
    assert not is_good(rows[:, ::2])


@in_both
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("name", ["expanded", "sparse", "complex", "of a class of its own", "empty"])
def test_gradients_that_are_read_by_torch(name, bad):
    class Own(Tensor):
        pass

    value = math.nan if bad else 1.0
    rows = torch.ones(2, 3)
    rows[1, 2] = value
    gradient = {
        "expanded": torch.tensor([value]).expand(1000),
        "sparse": torch.sparse_coo_tensor([[0, 2]], [1.0, value], (4,), check_invariants=True),
        "complex": torch.complex(torch.ones(2, 3), rows),
        "of a class of its own": rows.as_subclass(Own),
        "empty": torch.full((0, 3), value),
    }[name]
    assert is_good(torch.ones(3), gradient) == (not bad or name == "empty")


@in_both
@pytest.mark.parametrize("kind", [*KINDS, torch.int64, torch.bool], ids=str)
def test_losses(kind):
    h = History([parameter(torch.ones(3))])
    for shape in ((), (1,), (1, 1)):
        assert h.add(torch.ones(shape, dtype=kind))
        assert h.health(1).loss == 1
    if kind.is_floating_point:
        for bad in BAD:
            assert not h.add(torch.tensor(bad, dtype=kind))
            assert h.symptom == "the loss"


@in_both
def test_a_loss_on_its_graph():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * 2).sum()
    loss.backward()
    h = History([weight])
    assert h.add(loss)
    assert h.health(1).loss == 6
    assert loss.requires_grad


@in_both
def test_steps_without_a_loss_or_gradients():
    assert is_good(None, torch.ones(2))
    assert is_good(None)
    assert not is_good(None, loss=torch.tensor(math.nan))


@in_both
def test_a_gradient_is_read_but_not_touched():
    gradient = torch.randn(50)
    before, version = gradient.clone(), gradient._version
    assert is_good(gradient)
    assert torch.equal(gradient, before)
    assert gradient._version == version


@in_c
def test_only_the_gradients_that_were_read_last_are_held():
    weight = parameter(torch.ones(3))
    h = History([weight])
    assert h.add(None)
    assert h.held[0] is weight.grad
    weight.grad = other = torch.ones(3)
    assert h.add(None)
    assert [id(g) for g in h.held] == [id(other)]
    h.held.clear()
    held = sys.getrefcount(other)
    for _ in range(100):
        h.add(torch.tensor(1.0))
    h.held.clear()
    assert sys.getrefcount(other) == held


@in_c
@pytest.mark.parametrize("wrong", [(), (None,), (None, [], ()), (None, (), []), (None, [], [], [])])
def test_wrong_arguments(wrong):
    with pytest.raises(TypeError, match=r"finite_loss\(loss, parameters, gradients\)"):
        history.finite_loss(*wrong)


@in_c
def test_views_of_no_memory_are_not_read():
    """Their address is their offset."""
    freed = torch.ones(16)[8:]
    freed.untyped_storage().resize_(0)
    for gradient in (freed, torch._efficientzerotensor(16)[8:]):
        assert history.finite_loss(None, [parameter(gradient)], []) is None


@in_c
def test_what_is_no_tensor_is_not_read():
    assert history.finite_loss(1.0, [], []) is None
    with pytest.raises(AttributeError, match="grad"):
        history.finite_loss(None, [1.0], [])
