"""All parameters learn: none is unused, cut off, frozen, or held where the optimizer does not see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipefuzz.checks.untrained import Untrained, few, untrained
from recipefuzz.diagnose.patient import Patient
from recipefuzz.engines import prepare
from recipefuzz.engines.dropout import SeededDropout
from recipefuzz.finding import Finding, Level

NAME = "parameters"
ROWS = 64  # a batch, at most
STEPS = 4  # a branch that starts at zero (LoRA, the last gain of a residual block) passes a gradient from the 2nd on
RATE = 1e-3  # of Adam: every weight moves, and none far
WATCHED = 2  # steps in which each operation is looked at: what both use was not made in one of them
TINY_BATCH = 4  # rows: Wu & He 2018 (arXiv:1803.08494), figure 1: from 8 down batch norm loses accuracy, at 4 badly


def check(patient: Patient) -> list[Finding]:
    """Make a few steps, and look which parameters take part."""
    evaluating: list[str] = []

    def build(**arguments: Any) -> nn.Module:
        model = patient.task.build(**arguments)
        evaluating.extend(_in_eval_mode(model))
        return model

    with untrained(replace(patient, task=replace(patient.task, build=build))) as seen:
        parts = _take_part(seen)
        found = [*_problems(seen.model, parts), *_modes(seen.model, evaluating, patient.recipe.batch_size)]
        return found or [_all_well(seen.model)]


def _all_well(model: nn.Module) -> Finding:
    count, numbers = 0, 0
    for parameter in model.parameters():
        count, numbers = count + 1, numbers + parameter.numel()
    drops = [name for name, m in model.named_modules() if _drops(m)]
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    told = [f"{few(names)} ({kind})" for names, kind in ((drops, "dropout"), (norms, "batch norm")) if names]
    text = f"all {count} ({numbers} numbers) receive gradient"
    text += f"; training and eval mode differ by {' and '.join(told)}" if told else ""
    return Finding(NAME, Level.PASS, text, evidence={"parameters": count, "numbers": numbers})


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, (_DropoutNd, SeededDropout)) and module.p > 0


# which parameters take part


@dataclass(frozen=True)
class _Parts:
    """What a few steps showed.

    Attributes:
        used: names of the parameters that an operation was given.
        reached: of those that the backward pass reaches.
        moved: of those whose gradient was ever other than zero.
        outside: tensors that want a gradient and are no parameters of the model, by where they are held.
    """

    used: frozenset[str]
    reached: frozenset[str]
    moved: frozenset[str]
    outside: tuple[str, ...]


class _Operands(TorchDispatchMode):
    """Leaves of the graph that operations are given; they are kept alive, so that an id is not used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaves: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_leaf and (leaf.requires_grad or isinstance(leaf, nn.Parameter)):
                self.leaves[id(leaf)] = leaf
        return func(*args, **(kwargs or {}))


def _take_part(seen: Untrained) -> _Parts:
    named = dict(seen.model.named_parameters())
    optimizer = prepare.build_optimizer(
        prepare.trainable(seen.model), seen.recipe.but(optimizer="adam", lr=RATE, weight_decay=None, precision="fp32")
    )
    watches: list[_Operands] = []
    reached, moved = set[str](), set[str]()
    for step in range(STEPS):
        x, y = seen.batch(step, ROWS)
        optimizer.zero_grad()
        watch = _Operands()
        with watch if step < WATCHED else nullcontext():
            loss = seen.task.loss(seen.model(x), y)
        loss.backward()
        if step < WATCHED:
            watches.append(watch)
        reached |= {name for name, p in named.items() if p.grad is not None}
        moved |= {name for name, p in named.items() if p.grad is not None and bool((p.grad != 0).any())}
        optimizer.step()
    used = {name for name, p in named.items() if any(id(p) in watch.leaves for watch in watches)}
    return _Parts(frozenset(used), frozenset(reached), frozenset(moved), tuple(_outside(seen, watches)))


def _outside(seen: Untrained, watches: list[_Operands]) -> Iterator[str]:
    """Where tensors that all watched steps used, and that are no parameters, are held."""
    own = {id(p) for p in seen.model.parameters()}
    kept = set.intersection(*(set(watch.leaves) for watch in watches))  # not made anew in each step, as an input is
    held = dict(_held(seen.model, "")) | dict(_held(seen.task.loss, "loss"))
    for key, leaf in watches[0].leaves.items():
        if key in kept and key not in own and leaf.requires_grad:
            yield held.get(key, f"a tensor of shape {tuple(leaf.shape)} that the model does not hold")


def _held(root: Any, prefix: str) -> Iterator[tuple[int, str]]:
    """Tensors in attributes, lists and dicts, within each other as well: their id and qualified name."""
    seen: set[int] = set()
    waiting: list[tuple[Any, str]] = [(root, prefix)]
    while waiting:
        value, name = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield id(value), name
        elif isinstance(value, nn.Module):
            own = dict(value.named_parameters(recurse=False)) | dict(value.named_children())
            rest = {k: v for k, v in vars(value).items() if not k.startswith(("_parameters", "_modules", "_buffers"))}
            waiting += [(v, f"{name}.{k}" if name else k) for k, v in (rest | own).items()]
        elif isinstance(value, dict):
            waiting += [(v, f"{name}[{k!r}]") for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(v, f"{name}[{i}]") for i, v in enumerate(value)]


# what is wrong


def _problems(model: nn.Module, parts: _Parts) -> Iterator[Finding]:
    named = dict(model.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    live = [name for name, p in named.items() if p.requires_grad]
    unused = [name for name in live if name not in parts.used and name not in parts.reached]
    cut = [name for name in live if name in parts.used and name not in parts.reached]
    # biases may cancel rightly, as before batch norm, or in the keys of attention
    still = [n for n in live if n in parts.reached and n not in parts.moved and named[n].dim() >= 2]
    if parts.outside:
        yield _wrong(
            Level.FAIL,
            list(parts.outside),
            "used, but not registered: the optimizer does not train",
            "hold modules in nn.ModuleList or nn.ModuleDict, tensors as nn.Parameter or in nn.ParameterList"
            if not all(name.startswith("loss") for name in parts.outside)
            else "the optimizer is given the model's parameters alone: hold those of the loss in the model",
        )
    if cut:
        yield _wrong(
            Level.FAIL,
            cut,
            "used, but cut off from the loss: no gradient reaches",
            "look for .detach(), .data, .item(), numpy or torch.no_grad() behind it in forward()",
        )
    if unused:
        yield _wrong(Level.WARN, unused, "never used:", "use it in forward(), or remove it from the model")
    if still:
        yield _wrong(
            Level.FAIL if len(still) == sum(named[n].dim() >= 2 for n in live) else Level.WARN,
            still,
            f"a gradient of exactly zero in {STEPS} steps:",
            "look for weights that start at zero or all alike, units that are dead, or a factor of zero",
        )
    if frozen:
        yield _wrong(
            Level.WARN,
            frozen,
            f"frozen ({len(frozen)} of {len(named)} have requires_grad False):",
            "if that is not meant, set requires_grad_(True) in the model's factory",
        )


def _wrong(level: Level, names: list[str], what: str, todo: str) -> Finding:
    return Finding(NAME, level, f"{what} {few(names)}", todo, evidence={"names": names})


def _in_eval_mode(model: Any) -> list[str]:
    """Layers that behave otherwise in training, and are not in training mode."""
    if not isinstance(model, nn.Module):
        return []
    return [n for n, m in model.named_modules() if (_drops(m) or isinstance(m, _BatchNorm)) and not m.training]


def _modes(model: nn.Module, evaluating: list[str], batch_size: int) -> Iterator[Finding]:
    stuck = _in_eval_mode(model)
    if stuck:
        seen = f"in eval mode while the model trains: {few(stuck)}"
        yield Finding(
            NAME, Level.WARN, seen, "if that is not meant, let model.train() reach it", evidence={"eval": stuck}
        )
    elif evaluating:
        seen = f"the factory leaves the model in eval mode, where {few(evaluating)} work otherwise"
        todo = "call model.train() before training: recipefuzz does, and your own loop must, too"
        yield Finding(NAME, Level.WARN, seen, todo, evidence={"eval": evaluating})
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if norms and batch_size <= TINY_BATCH:
        seen = f"batch norm ({few(norms)}) takes its statistics from batches of {batch_size} rows"
        todo = "a batch_size of 16 or more, or norm: layer or group, which don't look at the batch"
        yield Finding(NAME, Level.WARN, seen, todo, evidence={"batch_size": batch_size})
