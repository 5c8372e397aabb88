"""Changes of a recipe that people try, the smallest first, and what became of them when they were run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from recipefuzz.diagnosis import SEEDS, Fix
from recipefuzz.engines.job import Job, Outcome
from recipefuzz.evidence import skill_at_end
from recipefuzz.recipe import Recipe, Scalar, shown
from recipefuzz.verdict import Label

CONFIRMED = 6  # smallest working changes that are run on further seeds; the others are reported with one
DOWN = (3.0, 10.0, 30.0, 100.0)
SCALES = (3.0, 10.0, 100.0)
CLIPS = (15.0, 10.0, 5.0, 1.0)
BARELY = 0.5  # of the best change's skill, under which another one leaves most of what there is to learn
UNBOUNDED = 100.0  # skill: a likelihood gains tens of nats a row over a constant, a loss that falls for ever any number
Runner = Callable[[Sequence[Job]], Iterable[Outcome]]


@dataclass(frozen=True)
class Remedy:
    """One change of a recipe.

    Attributes:
        size: how far it goes, in rungs of its ladder: the first is the smallest.
    """

    values: Mapping[str, Scalar]
    size: int

    def change(self, recipe: Recipe) -> str:
        """In words: "lr 0.3 -> 0.1"."""
        old = recipe.values()
        changed = ((name, old.get(name), new) for name, new in self.values.items() if new != old.get(name))
        return ", ".join(f"{name} {shown(before)} -> {shown(new)}" for name, before, new in changed)


@dataclass(frozen=True)
class Applies:
    """What a task admits.

    Attributes:
        norm: the model has, or takes, normalization layers.
        inputs, targets: they are numbers that can be scaled, not names of tokens or classes.
    """

    norm: bool
    inputs: bool
    targets: bool


def for_failure(recipe: Recipe, applies: Applies, steps: int) -> list[Remedy]:
    """What calms a training down: for NaN, and for one that oscillates or has blown up."""
    found = [Remedy({"lr": recipe.lr / factor}, size) for size, factor in enumerate(DOWN, start=1)]
    found += _clips(recipe)
    found += [Remedy({"init_scale": recipe.init_scale / factor}, i) for i, factor in enumerate(SCALES, 1)]
    if recipe.weight_decay:  # of which a step takes lr times as much: above 2 the weights grow by that alone
        found.append(Remedy({"weight_decay": 0.0}, 1))
    return found + _structural(recipe, applies, steps)


def for_stall(recipe: Recipe, applies: Applies, steps: int) -> list[Remedy]:
    """The same, and the reverse directions: a run that does not learn may have too little of anything."""
    found = [Remedy({"lr": recipe.lr * factor}, size) for size, factor in enumerate((*DOWN, 1000.0), start=1)]
    found += [Remedy({"init_scale": recipe.init_scale * factor}, size) for size, factor in enumerate(DOWN, start=1)]
    clips = {name: None for name in ("clip_norm", "clip_value") if recipe.values()[name] is not None}
    if clips:
        found.append(Remedy(clips, 1))
    if recipe.optimizer != "adam":
        found.append(Remedy({"optimizer": "adam", "lr": 1e-3}, 1 + len(DOWN)))
    return [*found, *for_failure(recipe, applies, steps)]


def together(recipe: Recipe, applies: Applies) -> list[Remedy]:
    """Pairs, for where no single change is enough."""
    found = [
        Remedy({"lr": recipe.lr / factor, "clip_norm": clip}, size)
        for size, (factor, clip) in enumerate(((10.0, 5.0), (10.0, 1.0), (100.0, 1.0)), start=1)
    ]
    found += [
        Remedy({"init_scale": recipe.init_scale / factor, "lr": recipe.lr / factor}, size)
        for size, factor in enumerate((3.0, 10.0, 30.0), start=1)
    ]
    scaling: dict[str, Scalar] = {}
    if applies.inputs:
        scaling["input_norm"] = "standardize"
    if applies.targets:
        scaling["target_norm"] = "standardize"
    if scaling:
        found += [Remedy({**scaling, "lr": recipe.lr / factor}, 2) for factor in (10.0, 100.0)]
    return [*found, Remedy({"optimizer": "adam", "lr": 1e-3, "init_scale": min(recipe.init_scale, 1.0)}, 3)]


def _clips(recipe: Recipe) -> list[Remedy]:
    tighter = [c for c in CLIPS if recipe.clip_norm is None or c < recipe.clip_norm]
    return [Remedy({"clip_norm": clip}, size) for size, clip in enumerate(tighter, start=1)]


def _structural(recipe: Recipe, applies: Applies, steps: int) -> list[Remedy]:
    found = []
    if applies.norm:
        found += [Remedy({"norm": norm}, 2) for norm in ("layer", "batch") if recipe.norm != norm]
    if applies.inputs and recipe.input_norm == "none":
        found.append(Remedy({"input_norm": "standardize"}, 1))
    if applies.targets and recipe.target_norm == "none":
        found.append(Remedy({"target_norm": "standardize"}, 1))
    if applies.inputs and applies.targets and recipe.input_norm == recipe.target_norm == "none":
        found.append(Remedy({"input_norm": "standardize", "target_norm": "standardize"}, 2))
    if recipe.warmup_steps < steps // 10:
        found.append(Remedy({"warmup_steps": steps // 10}, 2))
    if recipe.precision != "fp32":
        found.append(Remedy({"precision": "fp32"}, 1))
    return found


def tried(
    recipe: Recipe,
    seed: int,
    remedies: Sequence[Remedy],
    run: Runner,
    expected: Callable[[Remedy], bool] = lambda _: False,
) -> tuple[Fix, ...]:
    """Run every change, the smallest that converge on further seeds; those that work come first, smallest first.

    Left out is a change that can't be run (a normalization that the model has no place for), and one that scales the
    targets for a loss that was not made for that: of counts that have become negative it falls for ever.

    Args:
        expected: changes that the cause which is suspected asks for: their smallest is among those that are confirmed.
    """
    ordered = sorted(remedies, key=lambda r: r.size)
    first = _run(recipe, ordered, [seed], run)
    pairs = [(remedy, _fix(recipe, remedy, first[i])) for i, remedy in enumerate(ordered) if i in first]
    pairs = [(remedy, fix) for remedy, fix in pairs if not _falls_for_ever(fix)]
    kept, fixes = [remedy for remedy, _ in pairs], [fix for _, fix in pairs]
    converging = [i for i, fix in enumerate(fixes) if fix.verdict == Label.CONVERGING]
    asked_for = [i for i in converging if expected(kept[i])][:1]
    working = [*asked_for, *(i for i in converging if i not in asked_for)][:CONFIRMED]
    again = _run(recipe, [kept[i] for i in working], range(seed + 1, seed + SEEDS), run)
    for at, i in enumerate(working):
        runs = again.get(at, [])
        passed = sum(o.verdict is not None and o.verdict.label is Label.CONVERGING for o in runs)
        fixes[i] = replace(fixes[i], seeds=1 + len(runs), converged=1 + passed)
    return tuple(sorted(fixes, key=rank))


def rank(fix: Fix) -> tuple[bool, bool]:
    """Those that passed on all seeds, then those that converged at all; else as they were."""
    return not fix.works, fix.verdict != Label.CONVERGING


def barely_last(fixes: Sequence[Fix]) -> tuple[Fix, ...]:
    """In the order of `rank`, and of those that work as well the ones last that learn far less than the best."""
    best = max((f.skill for f in fixes if f.works and f.skill is not None), default=0.0)
    return tuple(sorted(fixes, key=lambda f: (*rank(f), f.works and f.skill is not None and f.skill < BARELY * best)))


def working_alone(fixes: Iterable[Fix]) -> frozenset[str]:
    """The axes whose change alone was seen to make a recipe converge."""
    return frozenset(a for f in fixes if f.verdict == Label.CONVERGING and len(f.values) == 1 for a in f.values)


def _run(recipe: Recipe, remedies: Sequence[Remedy], seeds: Iterable[int], run: Runner) -> dict[int, list[Outcome]]:
    """Outcomes by the remedy's place; without those that raised."""
    jobs = [
        Job(i, recipe.but(**remedy.values), seed, whole=True) for i, remedy in enumerate(remedies) for seed in seeds
    ]
    found: dict[int, list[Outcome]] = {}
    for outcome in run(jobs) if jobs else ():
        if outcome.verdict is not None:
            found.setdefault(outcome.job.key, []).append(outcome)
    return found


def _falls_for_ever(fix: Fix) -> bool:
    return "target_norm" in fix.values and fix.skill is not None and fix.skill > UNBOUNDED


def _fix(recipe: Recipe, remedy: Remedy, outcomes: Sequence[Outcome]) -> Fix:
    (outcome,) = outcomes
    assert outcome.verdict is not None
    converged = int(outcome.verdict.label is Label.CONVERGING)
    skill = skill_at_end(outcome.trace, outcome.baseline)
    known = None if math.isnan(skill) else round(skill, 4)
    return Fix(remedy.change(recipe), remedy.values, outcome.verdict.label, known, 1, converged)
