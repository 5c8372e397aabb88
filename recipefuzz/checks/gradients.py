"""The backward pass against differences, and which part of the model has it wrong."""

from __future__ import annotations

from dataclasses import dataclass

from recipefuzz.diagnose.gradient_test import Compared, compare
from recipefuzz.diagnose.model_under_test import Subject, under_test
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnose.recorded_calls import LOSS, Calls, Kind
from recipefuzz.finding import Finding, Level

NAME = "gradients"
MOST = 64  # parameter groups that are compared, evenly spread over the model: each costs some ten forward passes


@dataclass(frozen=True)
class Culprit:
    """A part of the model whose own backward pass is wrong.

    Attributes:
        with_respect_to: to one of its inputs, or to parameters of the module of that name.
        stand_in: whether the forward pass is flat: a gradient of it that is not 0 is meant to stand for something else.
    """

    what: str
    module: str
    with_respect_to: str
    compared: Compared
    stand_in: bool = False

    def __str__(self) -> str:
        return f"{self.what}: its gradient with respect to {self.with_respect_to} {self.compared.words()}"


def check(patient: Patient) -> list[Finding]:
    """Compare slopes of the loss, by parameter group; of each custom Function, by input; name what is wrong."""
    with under_test(patient) as subject:
        value = subject.value().detach()
        if not value.isfinite():
            seen = f"the loss near the initial weights is {float(value)}: gradients can't be compared"
            return [Finding(NAME, Level.WARN, seen, "recipefuzz diagnose says where that begins")]
        if not bool(subject.value() == value):
            seen = "two forward passes with the same weights, rows and seed differ: gradients can't be compared"
            return [Finding(NAME, Level.WARN, seen, "look for state that the model keeps from call to call")]
        return [_finding(subject)]


def _finding(subject: Subject) -> Finding:
    groups = subject.groups()
    names = list(groups)
    chosen = names if len(names) <= MOST else [names[i * len(names) // MOST] for i in range(MOST)]
    compared = compare(subject.value, {name: groups[name] for name in chosen}, subject.precision)
    calls = subject.calls()
    functions = {key: _compared(subject, *key, calls) for key in calls.functions}
    culprits = [c for key, found in functions.items() for c in _of_function(subject, *key, found)]
    wrong = [c for c in compared if c.wrong(subject.precision)]
    if wrong:
        culprits += _modules(subject, calls, {c.module for c in culprits})
    if wrong and culprits and _iterates(subject, culprits):
        return _iterating(culprits, wrong, compared)
    if wrong or culprits:
        return _bad(compared, wrong, culprits)
    what = _what(len(chosen), len(groups), len(functions))
    return _good(subject, [*compared, *(c for found in functions.values() for c in found)], what)


def _what(chosen: int, groups: int, functions: int) -> str:
    """What was compared: of a deep model a part of it."""
    parts = f"{groups} parameter groups"
    if chosen < groups:
        parts = f"{chosen} of {parts}, spread over the model" + ("," if functions else "")
    return parts + (f" and {functions} custom Functions" if functions else "")


def _iterates(subject: Subject, culprits: list[Culprit]) -> bool:
    """Whether the parts that are wrong write buffers of their own in training, and are right in eval mode.

    A spectral norm does one step of its power iteration in each forward pass, without a gradient: what it gives for
    other weights is not what its gradient says, and that is meant.
    """
    written = subject.written()
    if not all(c.module and any(b.startswith(c.module + ".") for b in written) for c in culprits):
        return False
    subject.model.eval()
    again = compare(subject.value, subject.groups(), subject.precision)
    subject.model.train()
    return not any(c.wrong(subject.precision) for c in again)


def _iterating(culprits: list[Culprit], wrong: list[Compared], compared: list[Compared]) -> Finding:
    seen = f"{culprits[0]}, but only in training mode, in which it writes its buffers"
    todo = "right if it iterates, as a spectral norm does; else look there for buffers that need a gradient"
    return Finding(NAME, Level.WARN, seen, todo, _table(compared, wrong))


def _compared(subject: Subject, module: str, kind: Kind, calls: Calls) -> list[Compared]:
    return compare(*subject.of_function(kind, calls.functions[module, kind]), subject.precision)


def _of_function(subject: Subject, module: str, kind: Kind, compared: list[Compared]) -> list[Culprit]:
    where = "" if module == LOSS else f" in {_named(subject, module)}"
    what = f"custom Function {kind.__qualname__.rpartition('<locals>.')[2]}{where or ' in the loss'}"
    return [Culprit(what, module, c.name, c, c.flat) for c in compared if c.wrong(subject.precision)]


def _modules(subject: Subject, calls: Calls, known: set[str]) -> list[Culprit]:
    """Modules that are wrong by themselves, those inside of others first; and the loss.

    A module in which a part is wrong is wrong with it, and is not looked at.
    """
    culprits: list[Culprit] = []
    bad = set(known)
    for name in sorted(calls.modules, key=lambda name: (name == "", -name.count("."))):
        if any(b == name or (b != LOSS and _is_inside(b, name)) for b in bad):
            continue
        found = compare(*subject.of_module(name, calls.modules[name]), subject.precision)
        wrong = [c for c in found if c.wrong(subject.precision)]
        if wrong:
            bad.add(name)
            worst = max(wrong, key=lambda c: c.apart)
            what = "the loss" if name == LOSS else _named(subject, name)
            respect = worst.name if worst.name.startswith("its input") else _parameters(worst.name, name)
            culprits.append(Culprit(what, name, respect, worst))
    return culprits


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _parameters(group: str, module: str) -> str:
    return "its parameters" if group == module else f"the parameters of {group}"


def _named(subject: Subject, module: str) -> str:
    kind = type(subject.model.get_submodule(module)).__name__
    return f"module {module} ({kind})" if module else f"the model's own forward ({kind})"


def _bad(compared: list[Compared], wrong: list[Compared], culprits: list[Culprit]) -> Finding:
    lines = _table(compared, wrong)
    evidence = {
        "culprits": [{"module": c.module, "what": c.what, "ratio": _ratio(c.compared)} for c in culprits],
        "wrong": {c.name: _ratio(c) for c in wrong},
    }
    if not culprits:
        first = max(wrong, key=lambda c: c.apart)
        seen = f"the gradient of the parameters of {first.name or 'the model'} {first.words()}"
        todo = "look for hooks on its tensors, and for .detach() on the way from there to the loss"
        return Finding(NAME, Level.FAIL, seen, todo, lines, evidence)
    if all(c.stand_in for c in culprits):
        seen = f"{culprits[0].what} is flat, and passes a gradient: a stand-in, as in straight-through estimators"
        return Finding(NAME, Level.WARN, seen, "right if that is meant; else mend backward()", lines, evidence)
    seen = "; ".join(map(str, [c for c in culprits if not c.stand_in][:3]))
    return Finding(NAME, Level.FAIL, seen, _todo(culprits[0]), lines, evidence)


def _todo(culprit: Culprit) -> str:
    if culprit.what.startswith("custom Function"):
        return (
            "mend its backward(): no recipe makes up for a wrong gradient (leave it if it is meant, as a reversal is)"
        )
    if culprit.compared.analytic == 0:
        return "look there for .detach(), .data, torch.no_grad() or .item(); freeze parameters by requires_grad = False"
    return "look there for .detach(), .data, torch.no_grad(), and for hooks that change gradients"


def _ratio(compared: Compared) -> float | None:
    return compared.analytic / compared.numeric if compared.numeric else None


def _table(compared: list[Compared], wrong: list[Compared]) -> tuple[str, ...]:
    if not wrong:
        return ()
    width = max(len(c.name) for c in compared)
    rows = [
        f"{c.name:<{width}}  {c.analytic:>12.5g}  {c.numeric:>12.5g}  {'wrong' if c in wrong else ''}".rstrip()
        for c in compared
    ]
    return (f"{'module':<{width}}  {'backward':>12}  {'differences':>12}", *rows)


def _good(subject: Subject, compared: list[Compared], what: str) -> Finding:
    judged = [c for c in compared if c.resolved(subject.precision)]
    apart = max((c.apart for c in judged), default=0.0)
    seen = f"backward pass and differences agree to {apart:.0e} in {what} ({_mode(subject)})"
    if len(judged) < len(compared):
        seen += f"; {len(compared) - len(judged)} of {len(compared)} too close to kinks or rounding to tell"
    evidence = {"apart": apart, "compared": len(compared), "judged": len(judged)}
    return Finding(NAME, Level.PASS, seen, evidence=evidence)


def _mode(subject: Subject) -> str:
    if subject.rounded:
        return "training mode; float64 with a part cast to fewer bits"
    return f"training mode; {subject.precision.name}" + ("" if subject.precision.name == "float64" else " only")
