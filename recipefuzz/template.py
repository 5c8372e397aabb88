"""The config that `recipefuzz init` writes: everything a user may turn, with a word on each."""

from __future__ import annotations

from pathlib import Path

from recipefuzz.atomic import write_atomically
from recipefuzz.config import study_name
from recipefuzz.errors import InputError, Place
from recipefuzz.source import write_yaml

CONFIG = """\
# recipefuzz study. Run it with: recipefuzz search {file}
{study}

target:
  data: {data}        # built-in (digits, breast_cancer, wine, diabetes, text, adding) or module:function
  model: {model}      # built-in (mlp, cnn, rnn, gru, lstm, transformer) or module:function -> torch.nn.Module
  loss: {loss}        # cross_entropy, mse, bce (on logits), or module:function(output, target) -> scalar
  # model_args: {{}}                 # fixed keyword arguments of the model factory
  # data_args: {{}}                  # and of the data loader

space:                             # what is searched: ranges {{low, high, log, step, integer}} or lists; null = off
  lr: {{low: 1e-5, high: 10, log: true}}
  init_scale: {{low: 0.1, high: 10, log: true}}   # factor on every weight matrix after the model's own init
  clip_norm: [null, 1, 10]         # clip of the gradient's global norm
  # norm: [none, batch, layer]     # for models that take norm=, or that have normalization layers to replace
  # width: {{low: 16, high: 128}}    # any other name goes to the model factory as a keyword argument

recipe:                            # fixed values for axes that are not searched
  optimizer: adam                  # sgd, momentum, adam, adamw, rmsprop
  input_norm: none                 # none, standardize, minmax

trial: {{steps: 300, batch_size: 64, seed: 0}}   # one short training run
search: {{trials: 100, sampler: tpe, confirm: {{top: 10, seeds: 5}}}}
run: {{device: auto, workers: auto}}
"""

MODULE = '''\
"""Your model and data, as recipefuzz takes them. Replace the bodies."""

import torch
from torch import nn


def load():
    """Return (x_train, y_train, x_test, y_test) as tensors or numpy arrays, or (train, test) Datasets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 20, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return x[:800], y[:800], x[800:], y[800:]


def build(width=64):
    """Return a fresh torch.nn.Module. Keyword arguments can be axes of the search."""
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 2))
'''


def write_template(path: Path, model: str, data: str, loss: str) -> list[str]:
    """Write the config, and beside it the module that it names where there is none; say what was done.

    Raises:
        InputError: a file of that name exists. Nothing is overwritten.
    """
    if path.exists():
        raise InputError("the file exists", place=Place(str(path)), fix="give another name: recipefuzz init NAME.yaml")
    if not path.parent.is_dir():
        raise InputError("no such folder", place=Place(str(path.parent)))
    study = write_yaml({"study": study_name(path)}).strip()
    names = {"file": path, "study": study, "data": data, "model": model, "loss": loss}
    write_atomically(path, CONFIG.format(**names))
    lines = [f"wrote {path}"]
    module = path.parent / "my_model.py"
    if "my_model:" in model + data and not module.exists():
        write_atomically(module, MODULE)
        lines.append(f"wrote {module}: put your model and data there")
    return [*lines, f"next: recipefuzz search {path}"]
