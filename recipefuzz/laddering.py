"""`recipefuzz ladder`: models from the simplest to the real one, checked and searched one after the other.

The first that fails is where to look. Data, loss and space are the study's; each search starts from where the last one
was safe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from recipefuzz.checks import overfit
from recipefuzz.checks.every import findings
from recipefuzz.config import Config, parse_config
from recipefuzz.diagnose.patient import Patient
from recipefuzz.diagnosing import default_patient
from recipefuzz.engines.predictions import Kind, Predictions, predictions
from recipefuzz.errors import InputError
from recipefuzz.finding import Level
from recipefuzz.listening import Listener, Silent
from recipefuzz.narrowing import narrowed, safe_region
from recipefuzz.recipe import Recipe
from recipefuzz.run_folder import RunFolder
from recipefuzz.rung import Rung, described
from recipefuzz.searching import as_config, search
from recipefuzz.source import KeyPath, Source
from recipefuzz.targets.builtin.data import text_alphabet

ALSO = (overfit.NAME,)  # checks that are worth their seconds on each rung, beside the cheap ones


def ladder(
    config: Config | dict[str, Any] | str | Path, *, fresh: bool = False, listener: Listener | None = None
) -> Iterator[Rung]:
    """Rung after rung, up to the first that fails; runs that exist are resumed.

    Raises:
        InputError: the config has no ladder or no space; a model's code can't be run.
    """
    config = as_config(config)
    if not config.ladder:
        raise InputError(
            "nothing to climb: the config has no ladder",
            place=config.source.place("ladder"),
            expected="models from the simplest to the real one, such as "
            "ladder: [{model: rnn, model_args: {depth: 1}}, {model: lstm, model_args: {depth: 2}}]",
        )
    space, listener = dict(config.space), listener or Silent()
    for index in range(len(config.ladder)):
        own = rung_config(config, index, space)
        rung = _climbed(own, index + 1, len(config.ladder), fresh, listener)
        yield rung
        if rung.winner is None:
            return
        space = narrowed(space, own.axes, safe_region(rung.ranking), rung.results)


def rung_config(config: Config, index: int, space: dict[str, Any]) -> Config:
    """The study of one rung, in a folder beside the study's own: `runs/<study>-ladder/rung-1-rnn`.

    Not in `runs/<study>`: that is a search's, which refuses a folder that holds anything else.
    """
    rung, rungs = config.ladder[index], len(config.ladder)
    data = config.model_dump(mode="json")
    own = RunFolder.of(config).path
    label = re.sub(r"[^A-Za-z0-9]+", "-", rung.model.rpartition(":")[2]).strip("-")
    folder = own.with_name(f"{own.name}-ladder") / f"rung-{index + 1}-{label}"
    data["target"] |= {"model": rung.model, "model_args": dict(rung.model_args)}
    data["search"]["trials"] = max(1, config.search.trials // rungs)
    if config.search.time is not None:
        data["search"]["time"] = config.search.time / rungs
    data["run"]["folder"] = str(folder)
    study = f"{config.study[:90]}-rung-{index + 1}"  # also its name in a database
    data |= {"study": study, "space": space, "ladder": [], "base": str(config.folder)}
    return parse_config(data, _pointing_at(config.source, index))


def _pointing_at(source: Source, index: int) -> Source:
    """Faults of the target's model are those of the rung's lines."""
    at = source.lines.get(("ladder", index))
    if at is None:
        return source
    own: dict[KeyPath, int] = {
        ("target", key): source.lines.get(("ladder", index, key), at) for key in ("model", "model_args")
    }
    return replace(source, lines={**source.lines, **own})


def _climbed(config: Config, number: int, of: int, fresh: bool, listener: Listener) -> Rung:
    rung = Rung(number, of, config, ())
    listener.say(f"rung {number} of {of}: {rung.name}; {described(config.space)}")
    with default_patient(config) as patient:
        rung = replace(rung, findings=tuple(findings(patient, cheap=True, also=ALSO)))
    if rung.checks is Level.FAIL:
        return rung
    result = search(config, fresh=fresh, listener=listener, checked=True)
    shown = None if result.best is None else _shown(patient, result.best)
    return replace(rung, results=result.results, ranking=tuple(result.ranked), winner=result.winner, shown=shown)


def _shown(patient: Patient, best: Recipe) -> Predictions:
    """By a recipe, trained again for the short budget."""
    models: list[nn.Module] = []
    patient = replace(patient, recipe=best)
    patient.train(look=lambda _, model, __: models.append(model))
    if not models:  # it broke before the first checkpoint
        return Predictions(Kind.NONE)
    alphabet = text_alphabet() if patient.config.target.data == "text" else ""
    return predictions(models[-1], patient.heldout_rows, patient.task.loss_kind, alphabet, patient.device)
