"""A reference: one input of a model and the right output of its modules. Arrays by name, in a .npz or a .json file.

    input               what the model gets, rows first, scaled as the recipe says; input:NAME for each of a dict's
    NAME                what the module NAME gives, as in model.named_modules(); (model) is the model itself
    NAME#2              ... in its second call; NAME:1 is the second tensor of a tuple that it gives
    weight:NAME         a parameter or buffer to be set before, as in model.state_dict()
    tolerance           largest difference that is none, a number: for outputs worked out by hand to a few digits

A module that is called like one of these words can't be given.

The file may be somebody else's: nothing in it is unpickled, and a small one does not unpack into a large one.
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipefuzz.atomic import write_atomically
from recipefuzz.errors import InputError, Place

Array = NDArray[Any]
INPUT, WEIGHT, TOLERANCE, MODEL = "input", "weight:", "tolerance", "(model)"
KINDS = (".npz", ".json")
EXPANSION, FREE = 20, 2**26  # of a packed file, arrays of numbers rarely get to the first; small ones of zeros may
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's; of the others, zipfile unpacks all at once
BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, tokenize.TokenError)


@dataclass(frozen=True)
class Reference:
    """What a reference file holds.

    Attributes:
        inputs: by name; "" is the one input of a model that takes one tensor.
        outputs: by what gives them, as in the file.
        tolerance: None where rounding decides.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    weights: Mapping[str, Array] = field(default_factory=dict)
    tolerance: float | None = None


def read_reference(path: Path, place: Place) -> Reference:
    """Read a file.

    Args:
        place: of the key that names it, for errors.

    Raises:
        InputError: no such file, not of its kind, an entry that is no array of numbers, no input, no output.
    """
    try:
        arrays = _from_json(path) if path.suffix == ".json" else _from_npz(path)
    except FileNotFoundError as error:
        fix = "recipefuzz check CONFIG --record FILE writes one; the path counts from the config's folder"
        raise InputError("no such file", place=place, found=str(path), fix=fix) from error
    except (OSError, ValueError, MemoryError, OverflowError, *BAD_ARCHIVE) as error:  # RecursionError is one of them
        expected = f"arrays by name, as {'a JSON object' if path.suffix == '.json' else 'numpy.savez writes them'}"
        raise InputError(
            f"can't be read: {error or 'too large'}", place=place, found=str(path), expected=expected
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            problem = f"{path.name}: {name!r} is no array of numbers"
            raise InputError(problem, place=place, expected="lists of numbers, all rows of the same length")
    return _sorted(arrays, path, place)


def _from_json(path: Path) -> dict[str, Array]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}")
    return {name: _array(value) for name, value in data.items()}


def _array(value: Any) -> Array:
    """What holds more than numbers becomes an array of none: as text, each cell would be as long as the longest."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif not isinstance(one, (int, float)):
            return np.asarray(None)
    try:
        return np.asarray(value)
    except ValueError:  # rows of several lengths
        return np.asarray(None)


def _from_npz(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as file:
        entries, most = file.infolist(), max(FREE, EXPANSION * path.stat().st_size)
        if sum(entry.file_size for entry in entries) > most:
            raise ValueError(f"it unpacks to more than {most} bytes, {EXPANSION} times its size")
        return {entry.filename.removesuffix(".npy"): _unpacked(file, entry) for entry in entries}


def _unpacked(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    if entry.compress_type not in PACKINGS:
        raise ValueError("it is packed in another way")
    with file.open(entry) as packed:
        content = io.BytesIO(packed.read(entry.file_size))  # without a number it may unpack more than it says
    array: Array = np.lib.format.read_array(content, allow_pickle=False)
    return array


def _sorted(arrays: dict[str, Array], path: Path, place: Place) -> Reference:
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    for name, array in arrays.items():
        if name == INPUT or name.startswith(f"{INPUT}:"):
            inputs[name[len(INPUT) + 1 :]] = array
        elif name.startswith(WEIGHT):
            weights[name.removeprefix(WEIGHT)] = array
        elif name != TOLERANCE:
            outputs[name] = array
    tolerance = arrays.get(TOLERANCE)
    if tolerance is not None and (tolerance.size != 1 or not float(tolerance.reshape(())) >= 0):
        expected = "one number, 0 or more: the largest difference that is none"
        raise InputError(f"{path.name}: not a tolerance", place=place, found=tolerance.tolist(), expected=expected)
    if not inputs or ("" in inputs and len(inputs) > 1):
        problem = "input and input:NAME are given" if inputs else "no input"
        raise InputError(f"{path.name}: {problem}", place=place, expected="input, or input:NAME for each of several")
    if not outputs:
        problem, expected = f"{path.name}: no output to compare", f"names of modules, {MODEL} for the model itself"
        raise InputError(problem, place=place, expected=expected)
    return Reference(inputs, outputs, weights, None if tolerance is None else float(tolerance.reshape(())))


def write_reference(path: Path, reference: Reference) -> None:
    """Write a file that `read_reference` reads back as it was; the same bytes for the same arrays.

    Raises:
        InputError: a file of another kind.
    """
    arrays = {f"{INPUT}:{name}" if name else INPUT: array for name, array in reference.inputs.items()}
    arrays |= reference.outputs
    arrays |= {f"{WEIGHT}{name}": array for name, array in reference.weights.items()}
    if path.suffix not in KINDS or not path.parent.is_dir():
        where = f"a {' or '.join(KINDS)} file in a folder that is there"
        raise InputError("can't write a reference there", place=Place(key="--record"), found=str(path), expected=where)
    if path.suffix == ".json":
        write_atomically(path, json.dumps({name: array.tolist() for name, array in arrays.items()}) + "\n")
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # numpy.savez takes no array called "file"
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
