"""What a config file may say, and what is said of one that is wrong: the file, the line, the key, the fix."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipefuzz.axes import TAKEN
from recipefuzz.config import Config, load_config, parse_config
from recipefuzz.errors import InputError
from recipefuzz.recipe import AXES, Recipe
from recipefuzz.report.tables import FAILURE_COLUMNS, RANKING_COLUMNS, TRIAL_COLUMNS, TRIAL_TAIL
from recipefuzz.source import write_yaml
from recipefuzz.space import Choice, Range

steady = settings(
    derandomize=True,
    max_examples=50,
    deadline=2000,  # ms; a machine that does something else meanwhile must not fail the test
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TARGET = "target: {data: digits, model: mlp}\n"

# A name, a config (TARGET stands for the line above), and all that is said of it.
BAD = """\
=== does not parse: bracket
target: {data: digits, model: mlp
space: {}
~~~
FILE:2: not YAML: expected ',' or '}', but got ':'
  fix:      close brackets and quotes; indent with spaces; put a space after each colon

  space: {}
       ^
=== does not parse: colon
study: a: b
~~~
FILE:1: not YAML: mapping values are not allowed here
  fix:      close brackets and quotes; indent with spaces; put a space after each colon

  study: a: b
          ^
=== does not parse: quote
TARGET
study: "abc
~~~
FILE:3: not YAML: found unexpected end of stream
  fix:      close brackets and quotes; indent with spaces; put a space after each colon


  ^
=== two documents
TARGET
---
TARGET
~~~
FILE:2: not YAML: but found another document
  fix:      close brackets and quotes; indent with spaces; put a space after each colon

  ---
  ^
=== unknown alias
TARGET
recipe: {lr: *rate}
~~~
FILE:2: not YAML: found undefined alias 'rate'
  fix:      close brackets and quotes; indent with spaces; put a space after each colon

  recipe: {lr: *rate}
               ^
=== empty

~~~
FILE:1: not a config
  expected: keys such as study, target and space
=== only comments
# a study
~~~
FILE:1: not a config
  expected: keys such as study, target and space
=== a list
- target
~~~
FILE:1: not a config
  found:    ['target']
  expected: keys such as study, target and space
=== a word
digits
~~~
FILE:1: not a config
  found:    digits
  expected: keys such as study, target and space
=== python object
TARGET
base: !!python/object/apply:os.system ['touch HIT']
~~~
FILE:2: not plain data: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'
  fix:      leave the !tag out; a key is a word

  base: !!python/object/apply:os.system  ...
        ^
=== python name
TARGET
base: !!python/name:os.system
~~~
FILE:2: not plain data: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'
  fix:      leave the !tag out; a key is a word

  base: !!python/name:os.system
        ^
=== custom tag
TARGET
base: !env HOME
~~~
FILE:2: not plain data: could not determine a constructor for the tag '!env'
  fix:      leave the !tag out; a key is a word

  base: !env HOME
        ^
=== tag misfit
TARGET
base: !!bool maybe
~~~
FILE: not plain data: a value does not fit its !!tag
=== endless alias
TARGET
recipe: &r {a: *r}
~~~
FILE:2: nested more than 100 deep
=== duplicate key at top
TARGET
study: a
space: {}
study: b
~~~
FILE:4: study: the key 'study' stands here and in line 2
  fix:      keep one of them
=== duplicate key in range
TARGET
space:
  lr:
    low: 1
    high: 2
    low: 3
~~~
FILE:6: space.lr.low: the key 'low' stands here and in line 4
  fix:      keep one of them
=== key not a word
TARGET
7: 1
~~~
FILE:2: 7: a key is a word; put it in quotes if it is meant as one
  found:    7
=== axis not a word
TARGET
recipe: {on: 1}
~~~
FILE:2: recipe.1: a key is a word; put it in quotes if it is meant as one
  found:    true
=== unknown top
TARGET
spce: {}
~~~
FILE:2: spce: unknown key 'spce'
  expected: study, target, space, recipe, trial, search, run, ladder, base, reference
  fix:      did you mean 'space'?
=== unknown top far
TARGET
zzz: 1
~~~
FILE:2: zzz: unknown key 'zzz'
  expected: study, target, space, recipe, trial, search, run, ladder, base, reference
  fix:      known: base, ladder, recipe, reference, run, search, space, study, target, trial
=== unknown target
target: {data: digits, modell: mlp, model: mlp}
~~~
FILE:1: target.modell: unknown key 'modell'
  expected: data, model, loss, data_args, model_args
  fix:      did you mean 'model'?
=== unknown trial
TARGET
trial:
  seed: 1
  step: 100
~~~
FILE:4: trial.step: unknown key 'step'
  expected: steps, batch_size, seed, extend, timeout
  fix:      did you mean 'steps'?
=== unknown search
TARGET
search: {trails: 100}
~~~
FILE:2: search.trails: unknown key 'trails'
  expected: trials, sampler, seed, time, window, grid_points, confirm, rank_by, diagnose
  fix:      did you mean 'trials'?
=== unknown confirm
TARGET
search: {confirm: {seed: 3}}
~~~
FILE:2: search.confirm.seed: unknown key 'seed'
  expected: top, seeds
  fix:      did you mean 'seeds'?
=== unknown run
TARGET
run: {worker: 2}
~~~
FILE:2: run.worker: unknown key 'worker'
  expected: device, engine, workers, folder, storage, lock, lease, retries, launcher, slurm, template
  fix:      did you mean 'workers'?
=== unknown range key
TARGET
space: {lr: {low: 1, hihg: 2, high: 3}}
~~~
FILE:2: space.lr.hihg: unknown key 'hihg' of a range
  expected: low, high, log, step, integer
  fix:      did you mean 'high'?
=== several faults
TARGET
trial: {steps: 0}
search: {trails: 1, seed: -1}
~~~
FILE:2: trial.steps: input should be greater than or equal to 1
  found:    0
  expected: an integer, 20 or more: optimizer steps of one short trial

  also wrong: FILE:3: search.seed: input should be greater than or equal to 0; FILE:3: search.trails: unknown key
=== no target
study: a
~~~
FILE:1: target: the key 'target' is missing
  expected: what is trained: {data: digits, model: mlp, loss: cross_entropy}
=== no model
target: {data: digits}
~~~
FILE:1: target.model: the key 'target.model' is missing
  expected: a built-in model, or "module:build"
=== empty section
TARGET
trial:
~~~
FILE:2: trial: a section of keys belongs here
  found:    null
  expected: steps, batch_size, seed, extend, timeout
=== section is a list
TARGET
recipe: [1]
~~~
FILE:2: recipe: a section of keys belongs here
  found:    [1]
=== target is a word
target: digits
~~~
FILE:1: target: a section of keys belongs here
  found:    digits
  expected: data, model, loss, data_args, model_args
=== data not a word
target: {data: 3, model: mlp}
~~~
FILE:1: target.data: input should be a valid string
  found:    3
  expected: a built-in data set, or "module:load"
=== steps a word
TARGET
trial: {steps: many}
~~~
FILE:2: trial.steps: input should be a valid integer, unable to parse string as an integer
  found:    many
  expected: an integer, 20 or more: optimizer steps of one short trial
=== steps true
TARGET
trial: {steps: yes}
~~~
FILE:2: trial.steps: not a number
  found:    true
  expected: an integer, 20 or more: optimizer steps of one short trial
=== steps fraction
TARGET
trial: {steps: 1.5}
~~~
FILE:2: trial.steps: input should be a valid integer, got a number with a fractional part
  found:    1.5
  expected: an integer, 20 or more: optimizer steps of one short trial
=== steps inf
TARGET
trial: {steps: .inf}
~~~
FILE:2: trial.steps: input should be a finite number
  found:    inf
  expected: an integer, 20 or more: optimizer steps of one short trial
=== steps null
TARGET
trial: {steps: null}
~~~
FILE:2: trial.steps: input should be a valid integer
  found:    null
  expected: an integer, 20 or more: optimizer steps of one short trial
=== tiny step
TARGET
space: {lr: {low: 1e-3, high: 1e10, step: 1e-20}}
~~~
FILE:2: space.lr.step: more than 1e+09 steps in this range
  found:    1e-20
  fix:      a larger step, or none: then any value is taken
=== wide integers
TARGET
space: {width: {low: 1, high: 1000000000000000000000000}}
~~~
FILE:2: space.width: a range too wide to be computed with
  found:    low: 1, high: 1000000000000000000000000
=== wide range
TARGET
space: {depth: {low: -1.7e308, high: 1.7e308}}
~~~
FILE:2: space.depth: a range too wide to be computed with
  found:    low: -1.7e+308, high: 1.7e+308
=== zero steps
TARGET
trial: {steps: 0}
~~~
FILE:2: trial.steps: input should be greater than or equal to 1
  found:    0
  expected: an integer, 20 or more: optimizer steps of one short trial
=== zero batch
TARGET
trial: {batch_size: 0}
~~~
FILE:2: trial.batch_size: input should be greater than or equal to 1
  found:    0
  expected: an integer, 1 or more
=== negative seed
TARGET
trial: {seed: -1}
~~~
FILE:2: trial.seed: input should be greater than or equal to 0
  found:    -1
  expected: an integer, 0 or more
=== huge steps
TARGET
trial: {steps: 3000000000}
~~~
FILE:2: trial.steps: input should be less than 2147483648
  found:    3000000000
  expected: an integer, 20 or more: optimizer steps of one short trial
=== zero trials
TARGET
search: {trials: 0}
~~~
FILE:2: search.trials: input should be greater than or equal to 1
  found:    0
  expected: an integer, 1 or more: trials in all, across restarts
=== trials a list
TARGET
search: {trials: [1]}
~~~
FILE:2: search.trials: input should be a valid integer
  found:    [1]
  expected: an integer, 1 or more: trials in all, across restarts
=== unknown sampler
TARGET
search: {sampler: tbe}
~~~
FILE:2: search.sampler: input should be 'tpe', 'random', 'qmc', 'grid', 'gp' or 'cmaes'
  found:    tbe
  expected: tpe, random, qmc, grid, gp, cmaes
=== workers
TARGET
run: {workers: -1}
~~~
FILE:2: run.workers: not a number of processes
  found:    -1
  expected: auto, or a number of processes up to 1024 (0: train in this one)
=== workers true
TARGET
run: {workers: true}
~~~
FILE:2: run.workers: not a number of processes
  found:    true
  expected: auto, or a number of processes up to 1024 (0: train in this one)
=== engine
TARGET
run: {engine: fast}
~~~
FILE:2: run.engine: input should be 'auto', 'sequential' or 'fused'
  found:    fast
  expected: auto, sequential or fused
=== launcher
TARGET
run: {launcher: pbs}
~~~
FILE:2: run.launcher: input should be 'local', 'slurm' or 'template'
  found:    pbs
  expected: local, slurm or template
=== device
TARGET
run: {device: gpu}
~~~
FILE:2: run.device: not a device
  found:    gpu
  expected: auto, cpu, cuda, cuda:0, ... or mps
=== unknown slurm
TARGET
run:
  slurm: {partitoin: main}
~~~
FILE:3: run.slurm.partitoin: unknown key 'partitoin'
  expected: workers, time, memory, cpus, gpus, parallel, partition, account, qos, grace, sbatch, setup
  fix:      did you mean 'partition'?
=== slurm no workers
TARGET
run: {slurm: {workers: 0}}
~~~
FILE:2: run.slurm.workers: input should be greater than or equal to 1
  found:    0
  expected: an integer, 1 or more: jobs, of one worker each
=== slurm memory
TARGET
run: {slurm: {memory: 8 GB}}
~~~
FILE:2: run.slurm.memory: not an amount of memory
  found:    8 GB
  expected: a number with K, M, G or T, such as 8G: of one job; null: what the cluster gives
=== slurm partition with a line of its own
TARGET
run: {slurm: {partition: "main\\n#SBATCH --uid=0"}}
~~~
FILE:2: run.slurm.partition: not a name
  found:    'main\\n#SBATCH --uid=0'
  expected: a partition of the cluster, or several with commas between
=== slurm account that is an option
TARGET
run: {slurm: {account: --wrap=id}}
~~~
FILE:2: run.slurm.account: not a name
  found:    --wrap=id
  expected: an account of the cluster
=== slurm grace
TARGET
run:
  slurm:
    time: 5m
    grace: 5m
~~~
FILE:5: run.slurm.grace: too close to run.slurm.time
  found:    5m
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h: what a worker has for leaving before its time is up; a minute less than time, at least
=== slurm time below the default grace
TARGET
run: {slurm: {time: 90}}
~~~
FILE:2: run.slurm.grace: too close to run.slurm.time
  found:    60.0
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h: what a worker has for leaving before its time is up; a minute less than time, at least
=== slurm option in its short form
TARGET
run: {slurm: {sbatch: [-C a100]}}
~~~
FILE:2: run.slurm.sbatch[0]: not an option of sbatch
  found:    -C a100
  expected: other options, in their long form: [--constraint=a100, --exclusive]
=== slurm option with a line of its own
TARGET
run: {slurm: {sbatch: [--exclusive, "--comment=a\\nrm -rf ~"]}}
~~~
FILE:2: run.slurm.sbatch[1]: not an option of sbatch
  found:    '--comment=a\\nrm -rf ~'
  expected: other options, in their long form: [--constraint=a100, --exclusive]
=== slurm option that has a key
TARGET
run: {slurm: {sbatch: [--partition=main]}}
~~~
FILE:2: run.slurm.sbatch[0]: this has a key of its own in run.slurm
  found:    --partition=main
  expected: other options, in their long form: [--constraint=a100, --exclusive]
=== slurm option that is ours
TARGET
run: {slurm: {sbatch: [--array=0-999]}}
~~~
FILE:2: run.slurm.sbatch[0]: recipefuzz sets this option itself
  found:    --array=0-999
  expected: other options, in their long form: [--constraint=a100, --exclusive]
=== slurm setup that is no list
TARGET
run: {slurm: {setup: "module load cuda"}}
~~~
FILE:2: run.slurm.setup: a list belongs here
  found:    module load cuda
  expected: lines of shell to run before the worker: [module load cuda]
=== template command
TARGET
run: {template: {submit: qsub}}
~~~
FILE:2: run.template.submit: no {script} in it
  found:    qsub
  expected: the command that submits it, such as qsub {script}
=== duration word
TARGET
search: {time: 10 minutes}
~~~
FILE:2: search.time: not a duration
  found:    10 minutes
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h
=== duration zero
TARGET
search: {time: 0}
~~~
FILE:2: search.time: input should be greater than 0
  found:    0
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h
=== duration negative
TARGET
trial: {timeout: -5}
~~~
FILE:2: trial.timeout: input should be greater than 0
  found:    -5
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h
=== duration nan
TARGET
trial: {timeout: .nan}
~~~
FILE:2: trial.timeout: input should be greater than 0
  found:    nan
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h
=== duration true
TARGET
trial: {timeout: true}
~~~
FILE:2: trial.timeout: not a duration
  found:    true
  expected: seconds, or a number with s, m, h or d: 90, 10m, 2h
=== study space
TARGET
study: my study
~~~
FILE:2: study: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'
  found:    my study
  expected: a name for the run's folder: letters, digits, dots and dashes
=== study path
TARGET
study: ../up
~~~
FILE:2: study: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'
  found:    ../up
  expected: a name for the run's folder: letters, digits, dots and dashes
=== study empty
TARGET
study: ''
~~~
FILE:2: study: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'
  found:    ''
  expected: a name for the run's folder: letters, digits, dots and dashes
=== study number
TARGET
study: 1e5
~~~
FILE:2: study: input should be a valid string
  found:    100000.0
  expected: a name for the run's folder: letters, digits, dots and dashes
=== study null
TARGET
study:
~~~
FILE:2: study: input should be a valid string
  found:    null
  expected: a name for the run's folder: letters, digits, dots and dashes
=== args nan
target: {data: digits, model: mlp, model_args: {p: .nan}}
~~~
FILE:1: target.model_args: not plain data
  found:    {'p': nan}
  expected: keyword arguments: finite numbers, words, lists and mappings of them
=== axis null
TARGET
space: {lr: }
~~~
FILE:2: space.lr: not an axis
  found:    null
  expected: a range {low: ..., high: ..., log: true} or a list of choices
  fix:      one fixed value belongs under recipe: {lr: null}
=== axis a number
TARGET
space: {lr: 0.1}
~~~
FILE:2: space.lr: not an axis
  found:    0.1
  expected: a range {low: ..., high: ..., log: true} or a list of choices
  fix:      one fixed value belongs under recipe: {lr: 0.1}
=== axis a word
TARGET
space:
  norm: batch
~~~
FILE:3: space.norm: not an axis
  found:    batch
  expected: a range {low: ..., high: ..., log: true} or a list of choices
  fix:      one fixed value belongs under recipe: {norm: batch}
=== no choices
TARGET
space: {norm: []}
~~~
FILE:2: space.norm: an empty list of choices
  expected: at least one value
=== bad choice
TARGET
space:
  norm:
    - none
    - bach
~~~
FILE:5: space.norm[1]: not a value of norm (normalization layers; null leaves the model as it is)
  found:    bach
  expected: one of none, batch, layer, group, rms, or null
  fix:      did you mean 'batch'?
=== bad choice number
TARGET
space: {clip_norm: [null, 0, 1]}
~~~
FILE:2: space.clip_norm[1]: not a value of clip_norm (global-norm clip of the gradient)
  found:    0
  expected: a number > 0, or null
=== bad choice null
TARGET
space: {optimizer: [adam, null]}
~~~
FILE:2: space.optimizer[1]: not a value of optimizer (update rule, as in torch.optim)
  found:    null
  expected: one of sgd, momentum, adam, adamw, rmsprop
=== choice list
TARGET
space: {width: [[1, 2]]}
~~~
FILE:2: space.width[0]: not a single value
  found:    [1, 2]
  expected: a number, a word or null
=== choice twice
TARGET
space: {norm: [batch, layer, batch]}
~~~
FILE:2: space.norm[2]: this choice stands twice
  found:    batch
=== choice equal
TARGET
space: {bias: [1, true]}
~~~
FILE:2: space.bias[1]: this choice stands twice
  found:    true
  fix:      it equals 1: keep one of them
=== choice nan
TARGET
space: {width: [1, .nan]}
~~~
FILE:2: space.width[1]: not a finite number
  found:    nan
=== choice infinity
TARGET
space: {lr: [1, .inf]}
~~~
FILE:2: space.lr[1]: not a finite number
  found:    inf
=== range no low
TARGET
space: {lr: {high: 1}}
~~~
FILE:2: space.lr: a range without 'low'
  found:    {'high': 1}
=== range low word
TARGET
space: {lr: {low: small, high: 1}}
~~~
FILE:2: space.lr.low: not a number
  found:    small
  expected: a number
=== range low null
TARGET
space: {lr: {low: null, high: 1}}
~~~
FILE:2: space.lr.low: not a number
  found:    null
  expected: a number
=== range low true
TARGET
space: {lr: {low: true, high: 2}}
~~~
FILE:2: space.lr.low: not a number
  found:    true
  expected: a number
=== reversed
TARGET
space:
  lr: {low: 1, high: 0.1}
~~~
FILE:3: space.lr: a reversed range
  found:    low: 1, high: 0.1
  expected: low < high
  fix:      swap them: low: 0.1, high: 1
=== empty range
TARGET
space: {lr: {low: 1, high: 1}}
~~~
FILE:2: space.lr: an empty range
  found:    low: 1, high: 1
  expected: low < high
  fix:      one fixed value belongs under recipe: {lr: 1}
=== log zero
TARGET
space: {lr: {low: 0, high: 1, log: true}}
~~~
FILE:2: space.lr: a log range can't reach 0
  found:    low: 0, high: 1
  expected: low > 0
  fix:      start above zero, such as low: 0.0001, or drop log
=== log negative
TARGET
space: {shift: {low: -2, high: -1, log: true}}
~~~
FILE:2: space.shift: a log range can't reach 0
  found:    low: -2, high: -1
  expected: low > 0
  fix:      drop log
=== lr zero
TARGET
space: {lr: {low: 0, high: 1}}
~~~
FILE:2: space.lr.low: not a value of lr (learning rate)
  found:    0
  expected: a number > 0
=== batch low 0
TARGET
space: {batch_size: {low: 0, high: 64}}
~~~
FILE:2: space.batch_size.low: not a value of batch_size (rows drawn with replacement per step)
  found:    0
  expected: an integer >= 1
=== range nan
TARGET
space: {lr: {low: .nan, high: 1}}
~~~
FILE:2: space.lr.low: not a finite number
  found:    nan
=== range inf
TARGET
space: {batch_size: {low: 1, high: .inf}}
~~~
FILE:2: space.batch_size.high: not a finite number
  found:    inf
=== range log word
TARGET
space: {lr: {low: 1, high: 2, log: 10}}
~~~
FILE:2: space.lr.log: not true or false
  found:    10
  expected: true or false
=== integer fraction
TARGET
space: {batch_size: {low: 1.5, high: 8}}
~~~
FILE:2: space.batch_size: an integer range with a fraction
  found:    low: 1.5, high: 8
  expected: whole low and high
=== step 0
TARGET
space: {lr: {low: 1, high: 2, step: 0}}
~~~
FILE:2: space.lr.step: not a step of this range
  found:    0
  expected: more than 0, at most 1
=== step large
TARGET
space: {lr: {low: 1, high: 2, step: 3}}
~~~
FILE:2: space.lr.step: not a step of this range
  found:    3
  expected: more than 0, at most 1
=== step word
TARGET
space: {lr: {low: 1, high: 2, step: big}}
~~~
FILE:2: space.lr.step: not a number
  found:    big
  expected: a number
=== step nan
TARGET
space: {lr: {low: 1, high: 2, step: .nan}}
~~~
FILE:2: space.lr.step: not a finite number
  found:    nan
=== step log
TARGET
space: {lr: {low: 1, high: 2, step: 0.1, log: true}}
~~~
FILE:2: space.lr: log and step together
  fix:      keep one of them
=== step int
TARGET
space: {batch_size: {low: 8, high: 64, step: 0.5}}
~~~
FILE:2: space.batch_size.step: a step with a fraction in an integer range
  found:    0.5
=== range for words
TARGET
space: {norm: {low: 1, high: 2}}
~~~
FILE:2: space.norm.low: not a value of norm (normalization layers; null leaves the model as it is)
  found:    1
  expected: one of none, batch, layer, group, rms, or null
=== both
TARGET
space:
  lr: {low: 1, high: 2}
recipe:
  lr: 0.1
~~~
FILE:5: recipe.lr: lr is searched (space) and fixed (recipe)
  fix:      keep one of them
=== recipe list
TARGET
recipe: {lr: [0.1, 0.2]}
~~~
FILE:2: recipe.lr: one value belongs here
  found:    [0.1, 0.2]
  fix:      put ranges and lists under space: {lr: ...}
=== recipe bad
TARGET
recipe: {optimizer: adm}
~~~
FILE:2: recipe.optimizer: not a value of optimizer (update rule, as in torch.optim)
  found:    adm
  expected: one of sgd, momentum, adam, adamw, rmsprop
  fix:      did you mean 'adam'?
=== recipe null
TARGET
recipe: {lr: null}
~~~
FILE:2: recipe.lr: not a value of lr (learning rate)
  found:    null
  expected: a number > 0
=== recipe true
TARGET
recipe: {lr: true}
~~~
FILE:2: recipe.lr: not a value of lr (learning rate)
  found:    true
  expected: a number > 0
=== recipe nan
TARGET
recipe: {lr: .nan}
~~~
FILE:2: recipe.lr: not a finite number
  found:    nan
=== recipe nan extra
TARGET
recipe: {width: .inf}
~~~
FILE:2: recipe.width: not a finite number
  found:    inf
=== recipe string number
TARGET
recipe: {lr: '0.1'}
~~~
FILE:2: recipe.lr: not a value of lr (learning rate)
  found:    '0.1'
  expected: a number > 0
  fix:      a number has no quotes
"""


def cases() -> list:
    blocks = [block.split("\n", 1) for block in re.split(r"^=== ", BAD, flags=re.MULTILINE)[1:]]
    return [pytest.param(*rest.split("~~~\n"), id=name) for name, rest in blocks]


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    lines = str(caught.value).replace(str(path), "FILE").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize(("text", "message"), cases())
def test_bad_config(tmp_path, text, message):
    assert complaint(written(tmp_path, text.replace("TARGET\n", TARGET))) == message


def test_nothing_in_a_config_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tag in ("python/object/apply:os.mkdir [made]", "python/object/new:os.mkdir [made]", "python/name:os.mkdir"):
        complaint(written(tmp_path, f"{TARGET}base: !!{tag}\n"))
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


DEEP = 120
LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
BUILT = {
    # what writing out would hide: bombs, control characters, numbers that are too large
    "nested": (f"{TARGET}recipe: {{a: {'[' * DEEP}{']' * DEEP}}}\n", "FILE:2: nested more than 100 deep"),
    "very nested": (f"a: {'[' * 2000}", "FILE: not YAML: maximum recursion depth exceeded"),
    "alias of itself": ("a: &a [*a, *a, *a]\n", "FILE:1: nested more than 100 deep"),
    "billion laughs": (f"l0: &l0 [lol]\n{LAUGHS}", "FILE: more than 100000 values"),
    "billion merges": (f"m0: &m0 {{a: 1}}\n{MERGES}", "FILE: more than 100000 values"),
    "tab": ("target:\n\tdata: digits\n", r"FILE:2: not YAML: found character '\t' that cannot start any token"),
    "bell": ("study: a\a\n", "FILE: not YAML: unacceptable character #x0007: special characters are not allowed"),
    "long number": (f"{TARGET}recipe: {{lr: 1{'0' * 400}}}\n", "FILE:2: recipe.lr: not a finite number"),
    "longer number": (f"{TARGET}recipe: {{lr: 0x{'F' * 9000}}}\n", "FILE:2: recipe.lr: not a finite number"),
    "longest number": (
        f"{TARGET}recipe: {{lr: 1{'0' * 9000}}}\n",
        "FILE: not plain data: a value does not fit its !!tag",
    ),
    "long seed": (
        f"{TARGET}trial: {{seed: 0x{'F' * 9000}}}\n",
        "FILE:2: trial.seed: input should be less than 2147483648",
    ),
    "long time": (f"{TARGET}search: {{time: {'9' * 400}}}\n", "FILE:2: search.time: input should be a valid number"),
    "half a character": (f'{TARGET}study: "\\ud800"\n', "FILE:2: half of a character"),
}


@pytest.mark.parametrize(("text", "first_line"), BUILT.values(), ids=BUILT)
def test_bad_config_that_is_built(tmp_path, text, first_line):
    start = time.process_time()
    said = complaint(written(tmp_path, text))
    assert said.splitlines()[0].startswith(first_line)
    assert all(len(line) < 200 and line.isprintable() for line in said.split("\n\n")[0].splitlines())
    assert time.process_time() - start < 5


def test_no_such_file_names_the_configs_nearby(tmp_path):
    assert complaint(tmp_path / "digits.yaml") == (
        "FILE: no such file\n  fix:      recipefuzz init writes a config to start from\n"
    )
    for name in ("wine.yaml", "digit.yml", "notes.txt"):
        (tmp_path / name).touch()
    assert (
        complaint(tmp_path / "digits.yaml") == "FILE: no such file\n  fix:      configs there: digit.yml, wine.yaml\n"
    )
    assert "recipefuzz init" in complaint(tmp_path / "missing" / "digits.yaml")


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(b"study: caf\xe9\n")
    assert complaint(path) == "FILE: not UTF-8 text (byte 10)\n"
    assert complaint(tmp_path) == "FILE: can't be read: Is a directory\n"


def test_byte_order_mark_and_line_ends_of_windows(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TARGET.encode() + b"\r\nspace:\r\n  lr: [0.1]\r\n  norm: [bach]\r\n")
    assert complaint(path).startswith("FILE:5: space.norm[0]: ")


TABLES = {"trial", "phase", "seed", "rank", *TRIAL_COLUMNS, *TRIAL_TAIL, *RANKING_COLUMNS}


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("section", ["space", "recipe"])
def test_axis_may_not_be_called_like_a_column(tmp_path, section, name):
    said = complaint(written(tmp_path, f"{TARGET}{section}: {{{name}: [1, 2]}}\n"))
    assert said.startswith(f"FILE:2: {section}.{name}: an axis can't be called '{name}'\n")


def test_names_taken_are_the_columns_and_no_known_axis():
    assert TAKEN == TABLES
    assert not TAKEN & set(AXES)
    assert {"verdict", "cause", "reason"} <= set(FAILURE_COLUMNS) & TAKEN


def test_a_mapping_from_a_program_is_placed_by_its_key():
    with pytest.raises(InputError, match=r"^trial\.steps: input should be greater than or equal to 1\n  found:    0\n"):
        parse_config({"target": {"data": "digits", "model": "mlp"}, "trial": {"steps": 0}})


# --- what is right


def good(folder: Path, more: str = "") -> Config:
    return load_config(written(folder, TARGET + more))


NUMBERS = {
    "1e-5": 1e-5,
    "1E-5": 1e-5,
    "+1e5": 1e5,
    "1.0e-5": 1e-5,
    "1.e3": 1e3,
    "-2e3": -2e3,
    "1_000": 1000,
    "1e3_0": "1e3_0",
    "e5": "e5",
    "1e": "1e",
    "2001-01-01": "2001-01-01",
    "null": None,
    "~": None,
    "true": True,
    "'1e-5'": "1e-5",
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_values_as_yaml_has_them(tmp_path, text, value):
    found = good(tmp_path, f"recipe: {{width: {text}}}\n").recipe["width"]
    assert found == value
    assert type(found) is type(value)


AXES_WRITTEN = [
    ("lr: {low: 1e-5, high: 10, log: true}", Range(1e-5, 10, log=True)),
    ("lr: {low: 1, high: 10}", Range(1, 10)),
    ("batch_size: {low: 8, high: 256, log: true}", Range(8, 256, log=True, integer=True)),
    ("batch_size: {low: 8.0, high: 256.0}", Range(8.0, 256.0, integer=True)),
    ("warmup_steps: {low: 0, high: 100, step: 20}", Range(0, 100, integer=True, step=20)),
    ("clip_norm: [null, 1, 5, 10, 15]", Choice((None, 1, 5, 10, 15))),
    ("norm: [null, none, batch]", Choice((None, "none", "batch"))),
    ("width: {low: 16, high: 128}", Range(16, 128, integer=True)),
    ("width: {low: 16, high: 128, step: 16}", Range(16, 128, integer=True, step=16)),
    ("width: {low: 16, high: 128, integer: false}", Range(16, 128)),
    ("dropout: {low: 0, high: 1, step: 0.1}", Range(0, 1, step=0.1)),
    ("dropout: {low: 0, high: 0.5}", Range(0, 0.5)),
    ("dropout: {low: 0.0, high: 1}", Range(0.0, 1)),
    ("depth: {low: 1.0, high: 4.0, integer: true}", Range(1.0, 4.0, integer=True)),
    ("bias: [true, false]", Choice((True, False))),
    ("act: [relu, '1e5', null]", Choice(("relu", "1e5", None))),
]


@pytest.mark.parametrize(("text", "axis"), AXES_WRITTEN, ids=[text for text, _ in AXES_WRITTEN])
def test_axis_as_written(tmp_path, text, axis):
    config = good(tmp_path, f"space: {{{text}}}\n")
    assert dict(config.axes.axes) == {text.split(":")[0]: axis}
    assert config.axes.contains(config.default_recipe().values())


def test_defaults(tmp_path):
    config = good(tmp_path)
    assert config.resolved() == {
        "study": "study",
        "target": {
            "data": "digits",
            "model": "mlp",
            "loss": "cross_entropy",
            "data_args": {},
            "model_args": {},
        },
        "space": {},
        "recipe": {},
        "trial": {"steps": 300, "batch_size": 64, "seed": 0, "extend": 4, "timeout": None},
        "search": {
            "trials": 100,
            "sampler": "tpe",
            "seed": 0,
            "time": None,
            "window": "auto",
            "grid_points": 5,
            "confirm": {"top": 10, "seeds": 5},
            "rank_by": "skill",
            "diagnose": 3,
        },
        "run": {
            "device": "auto",
            "engine": "auto",
            "workers": "auto",
            "folder": None,
            "storage": None,
            "lock": "kernel",
            "lease": 60.0,
            "retries": 3,
            "launcher": "local",
            "slurm": {
                "workers": 4,
                "time": 3600.0,
                "memory": None,
                "cpus": 1,
                "gpus": 0,
                "parallel": None,
                "partition": None,
                "account": None,
                "qos": None,
                "grace": 60.0,
                "sbatch": [],
                "setup": [],
            },
            "template": {
                "workers": 4,
                "time": 3600.0,
                "memory": None,
                "cpus": 1,
                "gpus": 0,
                "file": None,
                "submit": "qsub {script}",
            },
        },
        "ladder": [],
        "base": str(tmp_path),
        "reference": None,
    }
    assert config.default_recipe() == Recipe()
    with pytest.raises(ValueError, match="frozen"):
        config.study = "other"


@pytest.mark.parametrize(
    ("file", "study"),
    [
        ("digits-mlp.yaml", "digits-mlp"),
        ("my study (2).yml", "my-study-2"),
        ("1e5.yaml", "1e5"),
        ("лето.yaml", "study"),
        (f"{'a' * 120}.yaml", "a" * 100),
        ("config.yaml", "folder.7"),
    ],
)
def test_study_is_called_like_its_file(tmp_path, file, study):
    path = tmp_path / "folder.7" / file
    path.parent.mkdir()
    path.write_text(TARGET)
    assert load_config(path).study == study
    path.write_text(f"{TARGET}study: said\n")
    assert load_config(path).study == "said"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("90s", 90), ("10m", 600), ("2 h", 7200), ("1d", 86400), ("1e-3", 1e-3), ("null", None)],
)
def test_durations(tmp_path, text, seconds):
    assert good(tmp_path, f"search: {{time: {text}}}\n").search.time == seconds


def test_recipe_of_puts_searched_over_fixed_over_defaults(tmp_path):
    config = good(tmp_path, "space: {lr: [1, 2]}\nrecipe: {optimizer: adam, width: 8}\ntrial: {batch_size: 32}\n")
    recipe = config.recipe_of({"lr": 2})
    assert recipe == Recipe(lr=2.0, optimizer="adam", batch_size=32, extra=(("width", 8),))
    assert config.recipe_of({"lr": 2, "batch_size": 5}).batch_size == 5
    assert config.axis_names == ("lr", "optimizer", "width")


def test_but(tmp_path):
    config = good(tmp_path)
    changed = config.but(trials=7, workers="2", folder=Path("elsewhere"))
    assert (changed.search.trials, changed.run.workers, changed.run.folder) == (7, 2, "elsewhere")
    assert (config.search.trials, config.run.workers, config.run.folder) == (100, "auto", None)
    assert changed.folder == config.folder == tmp_path
    assert config.but() == config
    assert config.but(workers="auto") == config
    assert config.but(folder=Path("2024")).run.folder == "2024"
    with pytest.raises(InputError, match=r"--trials: input should be greater than or equal to 1\n  found:    0"):
        config.but(trials=0)
    with pytest.raises(InputError, match=r"--workers: not a number of processes\n  found:    two"):
        config.but(workers="two")


WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=8) | st.sampled_from(
    ["1e5", "null", "~", "yes", "0x1F", "2001-01-01", "1:30", "=", "<<", "- a", "# a", "{a: b}", "it's", " a ", "a\nb"]
)
FIXED = (
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
)
NAMES = st.text("abcdefgh_0", min_size=1, max_size=6).filter(lambda name: name not in TAKEN)


@st.composite
def numeric_ranges(draw) -> dict:
    low = draw(st.integers(1, 100) | st.floats(1e-6, 100))
    spec = {"low": low, "high": draw(st.integers(101, 10**6) | st.floats(101, 1e6))}
    return spec | draw(st.sampled_from([{}, {"log": True}, {"integer": False, "step": 0.5}]))


CHOICES = st.lists(FIXED, min_size=1, max_size=4).map(
    lambda found: [option for i, option in enumerate(found) if option not in found[:i]]
)


@st.composite
def configs(draw) -> dict:
    space = draw(st.dictionaries(NAMES, numeric_ranges() | CHOICES, max_size=3))
    recipe = {
        name: value for name, value in draw(st.dictionaries(NAMES, FIXED, max_size=3)).items() if name not in space
    }
    return {
        "study": draw(
            st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True) | st.sampled_from(["1e5", "no"])
        ),
        "target": {"data": draw(WORDS), "model": "mlp", "model_args": draw(st.dictionaries(WORDS, FIXED, max_size=2))},
        "space": space,
        "recipe": recipe,
        "trial": {"timeout": draw(st.none() | st.floats(1e-9, 1e20))},
        "search": {"time": draw(st.sampled_from([None, "2h", 5, 1e-5]))},
    }


@steady
@given(configs())
def test_resolved_config_reads_back_as_it_was(tmp_path, data):
    config = parse_config(data)
    again = load_config(written(tmp_path, write_yaml(config.resolved())))
    assert again.resolved() == config.resolved()
    assert (again.axes, again.recipe, again.folder) == (config.axes, config.recipe, config.folder)
    assert again.axes.names == config.axes.names
    assert load_config(written(tmp_path, write_yaml(again.resolved()))) == again


# --- whatever the file says


def survives(folder: Path, text: str) -> None:
    """Whatever the text, there is a config or one plain error."""
    path = folder / "study.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(path).default_recipe()
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - no error is just as well


TOKENS = [*"{}[]:,-?&*!|>%@`'\"#~\n\t <=.0123456789abelnorstux", "!!int ", "<<: ", "1e9", ".nan", "&a ", "*a"]
YAMLISH = st.lists(st.sampled_from(TOKENS), max_size=60).map("".join)


@steady
@given(st.text() | YAMLISH)
@example("!!timestamp x")
@example("!!int ''")
@example("? {a: b}\n: c")
@example("a: !!float '.'")
@example("a: !!binary ä")
def test_any_text_is_a_config_or_an_input_error(tmp_path, text):
    survives(tmp_path, text)


@steady
@given(YAMLISH)
@example("!!set {a}")
@example("!!timestamp 2001-01-01")
@example("!!omap [a: 1]")
@example("-.inf")
@example("{low: .nan, high: .nan}")
@example("{low: 1, high: 2, step: true, integer: 3}")
@example("[[], {}]")
def test_any_value_of_an_axis_is_a_config_or_an_input_error(tmp_path, text):
    for key in (
        "space: {batch_size",
        "space: {width",
        "recipe: {lr",
        "recipe: {width",
        "trial: {steps",
        "search: {time",
    ):
        survives(tmp_path, f"{TARGET}{key}: {text}}}\n")


EXAMPLE = yaml.safe_load("""
study: digits
target: {data: digits, model: mlp, model_args: {width: 64, sizes: [1, 2]}, loss: cross_entropy}
space:
  lr: {low: 0.00001, high: 10, log: true}
  batch_size: {low: 8, high: 64, step: 8}
  norm: [none, batch, layer]
  clip_norm: [null, 1, 5]
recipe: {optimizer: momentum, bias: true}
trial: {steps: 300, batch_size: 64, seed: 0, timeout: 5m}
search: {trials: 100, sampler: tpe, time: 2h, confirm: {top: 10, seeds: 5}}
run: {device: auto, engine: auto, workers: 2}
""")
LEAVES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=3)
    | st.dates()
    | st.sets(st.integers(), max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw) -> object:
    """The example with a value replaced, or a key renamed, somewhere; once or twice."""
    data = draw(st.just(EXAMPLE))
    for _ in range(draw(st.integers(1, 2))):
        data = _mutate(draw, data)
    return data


def _mutate(draw, data: object) -> object:
    if not isinstance(data, (dict, list)) or not data or draw(st.integers(0, 3)) == 0:
        return draw(LEAVES)
    if isinstance(data, list):
        at = draw(st.integers(0, len(data) - 1))
        return [_mutate(draw, value) if i == at else value for i, value in enumerate(data)]
    at = draw(st.sampled_from(sorted(data, key=str)))
    if draw(st.integers(0, 5)) == 0:
        renamed = draw(st.text(max_size=4) | st.integers() | st.booleans() | st.sampled_from(sorted(AXES)))
        return {renamed if key == at else key: value for key, value in data.items()}
    return {key: _mutate(draw, value) if key == at else value for key, value in data.items()}


@steady
@given(mutated())
def test_any_mutated_config_is_a_config_or_an_input_error(tmp_path, data):
    survives(tmp_path, yaml.safe_dump(data, allow_unicode=True))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:SECRET@host/db",
        "postgres://me:SECRET@host/db",
        "postgresql://:SECRET@host/db",
        "postgresql://me:SECRET@one,two:5433/db",
        "postgresql://me:SECRET@[::1]/db",
        "postgresql://me:SECRET#1@host/db",
        "postgresql://me:SECRET?1@host/db",
        "postgresql://me:SECRET/1@host/db",
        "postgresql://me:SECRET@1@host/db",
        "postgresql://me@host/db?password=SECRET",
        "postgresql://me@host/db?pass%77ord=SECRET",
        "postgresql://me@host/db?connect_timeout=3&sslpassword=SECRET",
        " postgresql://me:SECRET@host/db",
        "postgresql+psycopg://me:SECRET@host/db",
        "redis://:SECRET@host:6379",
        "host=host password=SECRET",
    ],
)
def test_a_password_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match=r"a password does not belong into the config|not a database") as caught:
        parse_config({"target": {"data": "digits", "model": "mlp"}, "run": {"storage": url}})
    assert "SECRET" not in str(caught.value)
    assert "run.storage" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgres://host",
        "postgresql://me@host:5433/db",
        "postgresql://me@one:5432,two:5433/db?target_session_attrs=read-write",
        "postgresql://me@[::1]:5432/db",
        "postgresql:///db?host=/var/run/postgresql&user=me%40here",
        "postgresql://me@host/db?passfile=/home/me/.secret&service=x",
    ],
)
def test_a_database_without_a_password_is_taken_as_it_is(url):
    config = parse_config({"target": {"data": "digits", "model": "mlp"}, "run": {"storage": url}})
    assert config.database == url
