"""Batch jobs on a real SLURM: they share the work, come back after preemption and time limits, and lose nothing."""

from __future__ import annotations

import json
import os
import pickletools
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import yaml

from recipefuzz.launch.jobs import alive, submitted

if TYPE_CHECKING:
    from slurm import Slurm

pytestmark = pytest.mark.cluster

TRIALS, TOP, SEEDS = 24, 2, 2
# and a line about each worker that comes
CODE = """
import os, pathlib, time
import torch
from torch import nn

def load():
    about = [os.environ.get(n, "") for n in ("SLURM_JOB_ID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")]
    if about[0]:
        with (pathlib.Path(__file__).parent / "came.txt").open("a") as file:
            file.write(" ".join(about) + "\\n")
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    return x[:40], y[:40], x[40:], y[40:]

def build():
    return nn.Linear(3, 1)

def loss(output, target):
    time.sleep(float(os.environ["PAUSE"]))
    return ((output - target) ** 2).mean()
"""


@dataclass(frozen=True)
class Study:
    """A study of 20 steps or more a trial, of `pause` seconds each."""

    folder: Path
    run: Path
    pause: float
    trials: int

    def recipefuzz(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "recipefuzz", *arguments]
        env = os.environ | {"PAUSE": str(self.pause)}  # of which jobs get a copy
        done = subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *options: str) -> tuple[str, str]:
        """The ids of the array and of the job that reports."""
        self.recipefuzz("submit", "study.yaml", *options)
        last = submitted(self.run)[-1]
        return last.array, last.finish

    def finished(self) -> int:
        """Results so far."""
        lines = (self.run / "study.journal").read_text().splitlines()
        return sum('"result"' in line for line in lines)

    def came(self) -> list[list[str]]:
        """Job, node and GPUs of each worker."""
        return [line.split() for line in (self.folder / "came.txt").read_text().splitlines()]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "jobs").glob("*.out")))

    def check(self) -> None:
        """Everything was done once, and is reported."""
        table = pd.read_csv(self.run / "trials.csv", keep_default_na=False)
        counts = Counter(table["phase"])
        assert counts == {"search": self.trials, "confirm": TOP * SEEDS}, self.logs()
        assert not table.duplicated(["trial", "phase", "seed"]).any()
        assert set(table["verdict"]) <= {"converging", "stalled", "nan"}, "an error"
        assert (self.run / "ranking.csv").exists()
        assert (self.run / "recipe.yaml").exists()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return write_study(tmp_path, workers=3, cpus=3)


def write_study(
    folder: Path, pause: float = 0.02, diagnose: int = 0, trials: int = TRIALS, lease: float = 60, **slurm: object
) -> Study:
    (folder / "case.py").write_text(CODE)
    config = {
        "target": {"data": "case:load", "model": "case:build", "loss": "case:loss"},
        "space": {"lr": {"low": 1e-3, "high": 1, "log": True}},
        "trial": {"steps": 20, "extend": 1},
        "search": {
            "trials": trials,
            "sampler": "random",
            "confirm": {"top": TOP, "seeds": SEEDS},
            "diagnose": diagnose,
        },
        "run": {
            "engine": "sequential",
            "workers": 0,
            "lease": lease,
            "launcher": "slurm",
            "slurm": {"time": "10m"} | slurm,
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    return Study(folder, folder / "runs" / "study", pause, trials)


def test_workers_on_several_nodes_and_then_the_report(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, pause=0.0, diagnose=1, trials=400, workers=3, cpus=3)
    scripts = study.recipefuzz("submit", "study.yaml", "--dry-run")
    array, finish = study.submit()
    assert "report   by job" in study.recipefuzz("status", "study")
    slurm.wait("all three work", lambda: [j.state for j in alive(study.run).workers] == ["RUNNING"] * 3)
    assert len({job.node for job in alive(study.run).workers}) == 3, "with 3 of 4 cores, each has a node for itself"
    for name in (f"{array}_submission.sh", f"{finish}_submission.sh"):
        script = (study.run / "jobs" / name).read_text()
        assert script.replace(f"afterany:{array}", "afterany:ARRAY") in scripts, "the dry run shows another one"
    slurm.wait_for_end()
    study.check()
    assert len({job for job, *_ in study.came()}) == 3 + 1, "three workers and the report"
    assert slurm.show(finish)["JobState"] == "COMPLETED"
    assert json.loads((study.run / "diagnoses.json").read_text()), "a failure is explained"
    assert "no worker is queued or running" in study.recipefuzz("status", "study")
    assert "no job of this run" in study.recipefuzz("cancel", "study")


def test_what_is_unpickled(slurm: Slurm, study: Study) -> None:
    study.submit()
    names = set()
    for path in (study.run / "jobs").glob("*.pkl"):
        words = [str(argument) for _, argument, _ in pickletools.genops(path.read_bytes()) if argument is not None]
        names |= {word for word in words if "." in word and "/" not in word}
    assert names == {"submitit.core.utils", "recipefuzz.launch.task"}
    assert (study.run / "jobs").stat().st_mode & 0o777 == 0o700
    slurm.run("scancel", f"--user={os.getuid()}")


def test_a_folder_that_others_can_write_is_not_unpickled_from(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, workers=1, sbatch=["--hold"])
    jobs = study.submit()
    (study.run / "jobs").chmod(0o770)
    slurm.run("scontrol", "release", *jobs)
    slurm.wait_for_end()
    assert "others could write what jobs in this folder run" in study.logs()
    assert "Loading pickle" not in study.logs()
    assert "others could write" in study.recipefuzz("submit", "study.yaml", code=3)


def test_each_worker_has_a_gpu_for_itself(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, pause=0.1, workers=6, gpus=1)
    study.submit()
    slurm.wait("all six work", lambda: len(study.came()) == 6 if (tmp_path / "came.txt").exists() else False)
    assert [job.state for job in alive(study.run).workers] == ["RUNNING"] * 6, "at the same time"
    assert {gpus for _, _, gpus in study.came()} == {"0", "1"}, "one each"
    assert len({(node, gpus) for _, node, gpus in study.came()}) == 6
    slurm.wait_for_end()
    study.check()


def test_cancelled_in_the_middle_and_submitted_again(slurm: Slurm, study: Study) -> None:
    array, finish = replace(study, pause=0.2).submit()
    slurm.wait("some trials are done", lambda: study.finished() > 3)
    assert "--add gives it 3 more" in study.recipefuzz("submit", "study.yaml", code=2)
    said = study.recipefuzz("cancel", "study")
    assert f"cancelled: job {array}, {finish} (3 workers, the report)" in said
    slurm.wait_for_end(60)
    assert all(slurm.show(f"{array}_{i}")["JobState"] == "CANCELLED" for i in range(3)), "and none came back"
    before = study.finished()
    assert 3 < before < TRIALS
    assert "0 trials" not in study.recipefuzz("status", "study")
    study.submit()
    slurm.wait_for_end()
    study.check()


def test_more_workers_for_a_run_that_has_some(slurm: Slurm, study: Study) -> None:
    slow = replace(study, pause=0.06)
    first, early = slow.submit("--workers", "1")
    second, late = slow.submit("--add", "--workers", "2")
    slurm.wait_for_end()
    assert slurm.show(early)["JobState"] == "CANCELLED", "the report waits for all of them"
    assert slurm.show(late)["JobState"] == "COMPLETED"
    assert {slurm.show(job)["JobState"] for job in (first, f"{second}_0", f"{second}_1")} == {"COMPLETED"}
    study.check()


def test_a_time_limit_is_not_the_end(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, pause=0.08, workers=1, time="2m", grace="60s")
    array, _ = study.submit()
    slurm.wait_for_end(600)
    assert int(slurm.show(array)["Restarts"]) >= 1, study.logs()
    assert "told to stop (SIGUSR2)" in study.logs()
    assert slurm.show(array)["JobState"] == "COMPLETED"
    study.check()


def test_preempted_jobs_come_back_once(slurm: Slurm, study: Study) -> None:
    array, _ = replace(study, pause=0.06).submit()
    slurm.wait("some trials are done", lambda: study.finished() > 3)
    everything = ["--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null"]
    slurm.run("sbatch", *everything, "--wrap=sleep 2")
    slurm.wait_for_end()
    shown = [slurm.show(f"{array}_{i}") for i in range(3)]
    assert [job["Restarts"] for job in shown] == ["1"] * 3, study.logs()
    assert {job["JobState"] for job in shown} == {"COMPLETED"}
    assert json.loads((study.run / "jobs.json").read_text())[0]["array"] == array
    study.check()


def test_a_node_that_is_lost(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, pause=0.06, lease=5, workers=3, cpus=3)
    study.submit()
    slurm.wait("some trials are done", lambda: study.finished() > 3)
    node = alive(study.run).workers[0].node
    with slurm.lost(node):
        slurm.wait_for_end()
        study.check()
    assert len({job for job, *_ in study.came()}) >= 3


TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name} --array=1-{workers} --cpus-per-task={cpus} --mem={memory} --time={time}
#SBATCH --output={log}.%a.out
{command}
"""


def test_a_template_for_another_scheduler(slurm: Slurm, study: Study) -> None:
    (study.folder / "job.sh").write_text(TEMPLATE)
    config = yaml.safe_load((study.folder / "study.yaml").read_text())
    template = {"file": "job.sh", "submit": "sbatch {script}", "workers": 3, "cpus": 3, "memory": "1G"}
    config["run"] |= {"launcher": "template", "template": template}
    (study.folder / "study.yaml").write_text(yaml.safe_dump(config))
    assert "Submitted batch job" in study.recipefuzz("search", "study.yaml")
    slurm.wait_for_end()
    assert "handed to the scheduler" in study.recipefuzz("status", "study")
    study.recipefuzz("report", "study")
    study.check()
    assert len({node for _, node, *_ in study.came()}) == 3
