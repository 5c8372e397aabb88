"""A study's config: YAML in, a frozen and checked `Config` out. Nothing in the file is executed.

Every fault is one `InputError` that names the file, the line, the key, what was found and what was expected.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import parse_qs

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError

from recipefuzz import job_config
from recipefuzz.axes import parse_space, parse_values
from recipefuzz.errors import InputError, Place, did_you_mean
from recipefuzz.job_config import SlurmConfig, TemplateConfig
from recipefuzz.recipe import Recipe, Scalar
from recipefuzz.section import DURATION, Count, Duration, Section, Whole
from recipefuzz.source import KeyPath, Source, dotted, read_yaml
from recipefuzz.space import Range, Space

Samplers = Literal["tpe", "random", "qmc", "grid", "gp", "cmaes"]
STUDY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
SECRETS = {"password", "sslpassword", "oauth_client_secret"}  # parameters of libpq's
FILE = "file"  # a shared study in its run's folder


def _workers(value: object) -> object:
    number = int(str(value)) if re.fullmatch(r"\d{1,4}", str(value)) else -1
    if value != "auto" and not 0 <= number <= 1024:
        raise ValueError("not a number of processes")
    return value if value == "auto" else number


def _device(value: str) -> str:
    """Whether it is there is another question: the config may be read on another machine."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", value):
        raise ValueError("not a device")
    return value


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the store can keep: no infinity, no date, no set."""
    try:
        json.dumps(values, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("not plain data") from error
    return values


def _file_path(path: str) -> str:
    """A path that the system takes: no NUL, no half of a character."""
    if "\0" in path:
        raise ValueError("not a path")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("not a path") from error
    return path


def _arrays_file(path: str) -> str:
    if Path(path).suffix not in (".npz", ".json"):
        raise ValueError("not a file of arrays")
    return path


def _storage(url: str) -> str:
    """Where a shared study is kept; who may use it is not written into files.

    For libpq all up to an @ is a user and a password, which may hold what ends a host for others: # and ?.
    """
    if url == FILE:
        return url
    match = re.fullmatch(r"postgres(?:ql)?://([^?#]*)(?:\?([^#]*))?", url)
    if "@" in url and ":" in url.rpartition("@")[0].partition("://")[2]:
        raise ValueError("a password does not belong into the config")
    if match is None or not url.isprintable() or " " in url:
        raise ValueError("not a database")
    if SECRETS & parse_qs(match[2] or "", keep_blank_values=True).keys():
        raise ValueError("a password does not belong into the config")
    return url


FilePath = Annotated[str, AfterValidator(_file_path)]
Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]


class TargetConfig(Section):
    """What is trained."""

    data: str
    model: str
    loss: str = "cross_entropy"
    data_args: Arguments = {}
    model_args: Arguments = {}


def _rung(value: object) -> object:
    """A bare name is a model without arguments."""
    return {"model": value} if isinstance(value, str) else value


class RungConfig(Section):
    """One model of the ladder; data and loss are those of the target."""

    model: str
    model_args: Arguments = {}


class TrialConfig(Section):
    """One short run."""

    steps: Annotated[Count, Field(ge=20)] = 300
    batch_size: Count = 64
    seed: Whole = 0
    extend: Annotated[Whole, Field(le=100)] = 4
    timeout: Duration | None = None


class ConfirmConfig(Section):
    """Fresh seeds for the best candidates."""

    top: Whole = 10
    seeds: Count = 5


class SearchConfig(Section):
    """How the space is searched. `trials` is the total across restarts, `time` that of all of them together.

    `diagnose` kinds of failure, the most frequent ones, are explained at the end.
    """

    trials: Count = 100
    sampler: Samplers = "tpe"
    seed: Whole = 0
    time: Duration | None = None
    window: Literal["auto"] | Annotated[Count, Field(le=4096)] = "auto"
    grid_points: Annotated[Count, Field(ge=2, le=1000)] = 5
    confirm: ConfirmConfig = ConfirmConfig()
    rank_by: Literal["skill", "heldout_skill"] = "skill"
    diagnose: Annotated[Whole, Field(le=100)] = 3


class RunConfig(Section):
    """Where it runs. Nothing here changes a result, but for the rounding of another device.

    `storage` is where a study that many workers share is kept: `file`, in the run's folder, whose writers are kept
    apart by `lock`, or a database. Without it one process has the study for itself. A worker that is silent for
    `lease` seconds loses its trials to the others; a trial that has lost `retries` workers is an error.

    With `launcher: slurm`, `recipefuzz search` submits a job array as `recipefuzz submit` does; `workers` are the
    processes of each job.
    """

    device: Annotated[str, AfterValidator(_device)] = "auto"
    engine: Literal["auto", "sequential", "fused"] = "auto"
    workers: Annotated[Literal["auto"] | int, BeforeValidator(_workers)] = "auto"
    folder: FilePath | None = None
    storage: Annotated[str, AfterValidator(_storage)] | None = None
    lock: Literal["kernel", "file"] = "kernel"
    lease: Duration = 60.0
    retries: Count = 3
    launcher: Literal["local", "slurm", "template"] = "local"
    slurm: SlurmConfig = SlurmConfig()
    template: TemplateConfig = TemplateConfig()


class Config(Section):
    """A whole study. Without a name it is called like its file; `base` is where import paths are looked up first.

    `ladder` holds models from the simplest to the real one. `reference` is a file of right outputs that
    `recipefuzz check` holds the model against, see `checks.reference_file`; its path counts from the config's folder.
    """

    study: Annotated[str, Field(pattern=rf"^{STUDY_NAME}$")] = "study"
    target: TargetConfig
    space: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    trial: TrialConfig = TrialConfig()
    search: SearchConfig = SearchConfig()
    run: RunConfig = RunConfig()
    ladder: tuple[Annotated[RungConfig, BeforeValidator(_rung)], ...] = ()
    base: FilePath | None = None
    reference: Annotated[FilePath, AfterValidator(_arrays_file)] | None = None

    _source: Source = PrivateAttr(default_factory=Source)

    @property
    def source(self) -> Source:
        return self._source

    @property
    def folder(self) -> Path:
        """Where import paths are looked up first: the config's own folder unless it says `base`."""
        return (self._source.folder / self.base).resolve() if self.base else self._source.folder

    @property
    def reference_path(self) -> Path | None:
        return (self._source.folder / self.reference).resolve() if self.reference else None

    @property
    def database(self) -> str | None:
        """Where the study is, if it is in a database."""
        return self.run.storage if self.run.storage != FILE else None

    @cached_property
    def axes(self) -> Space:
        return parse_space(self.space, self._source)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The axes that the config names: the searched ones, then the fixed ones."""
        return (*self.axes.names, *self.recipe)

    def recipe_of(self, values: Mapping[str, Scalar]) -> Recipe:
        """A recipe: `values` over the fixed ones of the config over the defaults."""
        return Recipe.of({"batch_size": self.trial.batch_size} | self.recipe | dict(values))

    def default_recipe(self) -> Recipe:
        """The middle of every range and the first of every choice: a recipe to try things with."""
        middle = {
            n: a.grid(3)[len(a.grid(3)) // 2] if isinstance(a, Range) else a.options[0] for n, a in self.axes.axes
        }
        return self.recipe_of(middle)

    @property
    def template_path(self) -> Path | None:
        return (self.folder / self.run.template.file).resolve() if self.run.template.file else None

    def but(self, *, trials: int | None = None, workers: str | None = None, folder: Path | None = None) -> Config:
        """This config with what the command line says instead.

        Raises:
            InputError: a value that the config would not take.
        """
        options = {("search", "trials"): trials, ("run", "workers"): workers, ("run", "folder"): folder}
        return self._with({path: value for path, value in options.items() if value is not None})

    def launched(self, *, workers: int | None = None, template: Path | None = None) -> Config:
        """This config with what the command line of `recipefuzz submit` says instead: it is no local run any more.

        Raises:
            InputError: a value that the config would not take.
        """
        launcher = "slurm" if self.run.launcher == "local" else self.run.launcher
        changes: dict[KeyPath, Any] = {("run", "launcher"): launcher, ("run", "storage"): self.run.storage or FILE}
        if template is not None:
            changes |= {("run", "launcher"): "template", ("run", "template", "file"): template.resolve()}
        if workers is not None:
            changes["run", str(changes["run", "launcher"]), "workers"] = workers
        return self._with(changes)

    def _with(self, changes: Mapping[KeyPath, Any]) -> Config:
        data = self.model_dump(mode="json")
        for path, value in changes.items():
            section: Any = data
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = str(value) if isinstance(value, Path) else value
        try:
            return parse_config(data, self._source)
        except InputError as error:
            option = next((path[-1] for path in changes if error.place.key == dotted(path)), "")
            if not option:
                raise
            place = Place(key=f"--{option}")  # not the file's fault
            raise InputError(error.problem, place=place, found=error.found, expected=error.expected) from error

    def resolved(self) -> dict[str, Any]:
        """The config with every default written out and its paths absolute: valid wherever it is put."""
        reference = str(self.reference_path) if self.reference else None
        return self.model_dump(mode="json") | {"base": str(self.folder), "reference": reference}


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises:
        InputError: whatever is wrong with it.
    """
    data, source = read_yaml(Path(path))
    return parse_config({"study": study_name(Path(path))} | data, source)


def study_name(path: Path) -> str:
    """A study without a name is called like its file, or like its folder where the file is config.yaml."""
    stem = path.resolve().parent.name if path.stem == "config" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "study"


def parse_config(data: Mapping[str, Any], source: Source | None = None) -> Config:
    """Check a config that is already a mapping; `source` places the errors.

    Raises:
        InputError: whatever is wrong with it.
    """
    source = source or Source()
    try:
        config = Config.model_validate(dict(data))
    except ValidationError as error:
        raise _first_fault(error, source) from error
    config._source = source  # noqa: SLF001 - our own private attribute, set once here
    parse_values(config.recipe, source)
    both = sorted(set(config.axes.names) & set(config.recipe))
    if both:
        place = source.place("recipe", both[0])
        raise InputError(f"{both[0]} is searched (space) and fixed (recipe)", place=place, fix="keep one of them")
    return config


def _first_fault(error: ValidationError, source: Source) -> InputError:
    faults = error.errors(include_url=False)
    first = faults[0]
    path = _path(first)
    place = source.place(*path)
    others = "" if len(faults) == 1 else "also wrong: " + "; ".join(_brief(f, source) for f in faults[1:6])
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        return InputError(
            f"unknown key {path[-1]!r}",
            place=place,
            expected=", ".join(known),
            fix=did_you_mean(str(path[-1]), known),
            detail=others,
        )
    if first["type"] == "missing":
        expected = _meaning(path)
        return InputError(f"the key {dotted(path)!r} is missing", place=place, expected=expected, detail=others)
    if dotted(path) == "run.storage":  # it may hold a password
        return InputError(_sentence(first), place=place, expected=_meaning(path), detail=others)
    found = {None: "null", True: "true", False: "false"}[first["input"]] if _is_word(first["input"]) else first["input"]
    expected = ", ".join(_known_keys(path)) if first["type"] == "model_type" else _meaning(path)
    return InputError(_sentence(first), place=place, found=found, expected=expected, detail=others)


def _meaning(path: KeyPath) -> str:
    """Of a key, whichever item of a list it stands in."""
    return MEANING.get(dotted(tuple(part for part in path if isinstance(part, str))), "")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _path(fault: Any) -> KeyPath:
    """Where a fault lies. A key that YAML reads as a number or a truth value is a word in the file."""
    path = tuple(p for p in fault["loc"] if p != "[key]")
    return (*path[:-1], str(path[-1])) if path and _is_key(fault) else path


def _is_key(fault: Any) -> bool:
    return bool(fault["type"] == "invalid_key" or fault["loc"][-1:] == ("[key]",))


def _sentence(fault: Any) -> str:
    if _is_key(fault):
        return "a key is a word; put it in quotes if it is meant as one"
    if fault["type"] == "extra_forbidden":
        return "unknown key"
    if fault["type"] in ("model_type", "dict_type"):
        return "a section of keys belongs here"
    if fault["type"] == "tuple_type":
        return "a list belongs here"
    text = str(fault["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _brief(fault: Any, source: Source) -> str:
    return f"{source.place(*_path(fault))}: {_sentence(fault)}"


def _known_keys(path: KeyPath) -> list[str]:
    section: Any = Config
    for part in path:
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
        section = get_args(section)[0] if get_origin(section) is Annotated else section
    return list(section.model_fields)


ARGUMENTS = "keyword arguments: finite numbers, words, lists and mappings of them"
MEANING = job_config.MEANING | {
    "study": "a name for the run's folder: letters, digits, dots and dashes",
    "target": "what is trained: {data: digits, model: mlp, loss: cross_entropy}",
    "target.data": 'a built-in data set, or "module:load"',
    "target.model": 'a built-in model, or "module:build"',
    "target.loss": 'cross_entropy, mse, bce, or "module:loss"',
    "target.data_args": ARGUMENTS,
    "target.model_args": ARGUMENTS,
    "ladder": "models from the simplest to the real one: [{model: rnn, model_args: {depth: 1}}, {model: lstm}]",
    "ladder.model": 'a built-in model, or "module:build"',
    "ladder.model_args": ARGUMENTS,
    "reference": "a file of the model's right outputs, .npz or .json: recipefuzz check CONFIG --record FILE writes one",
    "trial.steps": "an integer, 20 or more: optimizer steps of one short trial",
    "trial.batch_size": "an integer, 1 or more",
    "trial.seed": "an integer, 0 or more",
    "trial.extend": "an integer, 0 or more: how many more budgets an undecided trial may have",
    "search.trials": "an integer, 1 or more: trials in all, across restarts",
    "search.sampler": ", ".join(get_args(Samplers)),
    "search.time": DURATION,
    "trial.timeout": DURATION,
    "run.device": "auto, cpu, cuda, cuda:0, ... or mps",
    "run.workers": "auto, or a number of processes up to 1024 (0: train in this one)",
    "run.engine": "auto, sequential or fused",
    "run.storage": "for many workers: file, in the run's folder, or postgresql://user@host/database; "
    "its password in PGPASSWORD, in the file PGPASSFILE names, or in ~/.pgpass",
    "run.lock": "kernel, or file where the filesystem has no locks that other machines see",
    "run.lease": DURATION + ": after so much silence a worker counts as gone",
    "run.retries": "an integer, 1 or more: workers that a trial may lose before it is an error",
}
