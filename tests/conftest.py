"""What tests share: one thread for torch, and a user's folder with code and a config in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from postgres import Server
    from slurm import Slurm

    from recipefuzz.config import Config

CASE = """\
import torch
from torch import nn


def load():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    return x[:40], y[:40], x[40:], y[40:]


def build(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def loss(output, target):
    return ((output - target) ** 2).mean()


"""

# what scripts on the pretend accelerator begin with: it is registered, and `moved` puts a model there
FAKE_GPU = r"""
import numpy as np, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

backend_registration._setup_privateuseone_for_python_backend("fakegpu", backend_module=Module())
library = torch.library.Library("_", "IMPL")
library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast casts nothing there

device = torch.device("fakegpu")


def moved(model):
    # Module.to() can't exchange fake parameters for others
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device=device)))
        for name, b in module._buffers.items():
            if b is not None:
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=device))
    return model.train()

"""

# a study of short trials, of which some fail, to be killed and gone on with
MEDICAL = """
target: {data: breast_cancer, model: mlp, model_args: {width: 32, depth: 3}}
space:
  lr: {low: 1e-5, high: 10, log: true}
  init_scale: {low: 0.1, high: 10, log: true}
  norm: [none, batch, layer]
recipe: {input_norm: standardize, optimizer: momentum}
trial: {steps: 150}
"""

WriteStudy = Callable[..., "Config"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run torch on one thread: its operations are tiny here, and on a busy machine two threads take longer.

    Test modules that need torch have imported it by now; where none has, it is not imported.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep out of the user's cache: what lies in it decides how fast steps are, and by which code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """Where nobody pulls the plug, and on a busy disk a sync takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server of PostgreSQL, for all tests that need one."""
    from postgres import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM cluster, for all tests that need one."""
    from slurm import serving

    with serving(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster, of which the test leaves nothing running."""
    yield cluster
    cluster.run("scancel", f"--user={os.getuid()}")
    cluster.wait_for_end(60)


@pytest.fixture(autouse=True)
def import_path() -> Iterator[None]:
    """Put `sys.path` back: a config's folder goes on it when the user's code is imported."""
    path = sys.path.copy()
    yield
    sys.path[:] = path


@pytest.fixture
def user_modules(tmp_path: Path) -> Iterator[None]:
    """Forget what the test imported from its folder."""
    yield
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in _origin(module)]:
        del sys.modules[name]


def _origin(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or str(list(getattr(module, "__path__", [])))


@pytest.fixture
def write_study(tmp_path: Path, user_modules: None) -> WriteStudy:  # noqa: ARG001 - for its effect
    """Write a user's case.py and config.yaml, and load the config.

    `code` comes after CASE and may define its functions again. The lines of the config are fixed: target.data
    stands on line 2, model on 3, loss on 4, and `more` from line 5.
    """

    def write(
        code: str = "",
        more: str = "",
        *,
        data: str = "case:load",
        model: str = "case:build",
        loss: str = "mse",
        folder: Path = tmp_path,
    ) -> Config:
        from recipefuzz.config import load_config

        folder.mkdir(exist_ok=True)
        (folder / "case.py").write_text(CASE + code)
        path = folder / "config.yaml"
        path.write_text(f"target:\n  data: {data}\n  model: {model}\n  loss: {loss}\n{more}")
        return load_config(path)

    return write
