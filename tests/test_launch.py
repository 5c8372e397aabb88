"""Batch jobs without a scheduler: the scripts that would be submitted, what is kept of them, and what is said of them."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipefuzz.config import Config, parse_config
from recipefuzz.errors import InputError, RunFailedError
from recipefuzz.launch import task
from recipefuzz.launch.by_template import fill, submit_script
from recipefuzz.launch.cancelling import end
from recipefuzz.launch.jobs import FILE, Submission, alive, job_lines, keep, submitted
from recipefuzz.launch.private_folder import make_private, require_private
from recipefuzz.launch.scripts import scripts
from recipefuzz.launch.slurm import submit_workers
from recipefuzz.launch.submitting import submit
from recipefuzz.listening import Silent
from recipefuzz.run_folder import RunFolder
from recipefuzz.stopping import SIGNALS

FakeCommand = Callable[[str, str], Path]

WORKERS = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-7%4
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=6
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --job-name=recipefuzz-digits
#SBATCH --mem=8G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=RUN/jobs/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=121

# setup
module load cuda
source "env/bin/activate"
PYTHON -P -m recipefuzz.launch.private_folder RUN/jobs || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output RUN/jobs/%A_%a_%t_log.out --cpus-per-task=6 PYTHON -P -u -m submitit.core._submit RUN/jobs
"""
REPORT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=6
#SBATCH --dependency=afterany:ARRAY
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --job-name=recipefuzz-digits-report
#SBATCH --mem=8G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=RUN/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=121

# setup
module load cuda
source "env/bin/activate"
PYTHON -P -m recipefuzz.launch.private_folder RUN/jobs || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output RUN/jobs/%j_%t_log.out --cpus-per-task=6 PYTHON -P -u -m submitit.core._submit RUN/jobs
"""
SLURM = {
    "workers": 8,
    "parallel": 4,
    "partition": "gpu",
    "account": "lab",
    "qos": "normal",
    "time": 2 * 3600 + 1,
    "memory": "8G",
    "cpus": 6,
    "gpus": 1,
    "grace": "90s",
    "sbatch": ["--constraint=a100", "--exclusive"],
    "setup": ["module load cuda", 'source "env/bin/activate"'],
}


def study(folder: Path, launcher: str = "slurm", **section: object) -> Config:
    run = {"launcher": launcher, "folder": str(folder), launcher: section}
    return parse_config({"study": "digits", "target": {"data": "digits", "model": "mlp"}, "run": run})


def neutral(script: str, run: Path) -> str:
    return script.replace(str(run), "RUN").replace(sys.executable, "PYTHON")


def test_the_scripts_of_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no SLURM is needed
    shown = scripts(study(tmp_path / "run", **SLURM))
    assert [neutral(script, tmp_path / "run") for script in shown] == [WORKERS, REPORT]
    assert not (tmp_path / "run").exists()


def test_what_the_config_does_not_say_is_left_to_the_cluster(tmp_path: Path) -> None:
    work, report = scripts(study(tmp_path / "run"))
    for option in ("account", "partition", "qos", "mem", "gpus-per-node", "wckey", "error"):
        assert f"--{option}" not in work + report
    assert "--array=0-3%4" in work
    assert "--array" not in scripts(study(tmp_path / "run", workers=1))[0]


def test_a_folder_with_spaces_is_quoted_and_one_that_slurm_reads_otherwise_is_refused(tmp_path: Path) -> None:
    work, _ = scripts(study(tmp_path / "my run"))
    assert f"--output='{tmp_path}/my run/jobs/%A_%a_0_log.out'" in work
    assert f"private_folder '{tmp_path}/my run/jobs' ||" in work
    with pytest.raises(InputError, match="SLURM can't write logs in this folder"):
        scripts(study(tmp_path / "100%"))


def test_a_dry_run_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("target: {data: digits, model: mlp}\n")
    code = (
        "import sys\nfrom recipefuzz.cli import main\nsys.argv[1:] = ['submit', 'study.yaml', '--dry-run']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--job-name=recipefuzz-study\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_without_submitit_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'recipefuzz\[slurm\]'"):
        scripts(study(tmp_path / "run"))


def test_command_line_over_config(tmp_path: Path) -> None:
    local = parse_config({"target": {"data": "digits", "model": "mlp"}})
    assert local.launched(workers=9).run.slurm.workers == 9
    assert local.launched().run.storage == "file", "many workers share it"
    assert local.launched(template=tmp_path / "job.pbs", workers=9).run.template.workers == 9
    assert local.launched(template=tmp_path / "job.pbs").template_path == tmp_path / "job.pbs"
    with pytest.raises(InputError, match=r"^--workers: input should be greater than or equal to 1"):
        local.launched(workers=0)


@pytest.mark.parametrize("task_class", [task.Worker, task.Finish])
def test_the_pickle_of_a_job_names_one_class_and_holds_one_path(task_class: type) -> None:
    import cloudpickle

    written = cloudpickle.dumps(task_class("/a/run"), pickle.HIGHEST_PROTOCOL)
    words = {argument for _, argument, _ in pickletools.genops(written) if isinstance(argument, str)}
    assert words == {"recipefuzz.launch.task", task_class.__name__, "run", "/a/run"}
    assert pickle.loads(written).checkpoint().function == task_class("/a/run")


# --- jobs that were submitted


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    """Put a shell script in a command's place; a file with the arguments it was given comes back."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name: str, script: str) -> Path:
        given = tmp_path / f"{name}.given"
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {given}\n{script}\n')
        (folder / name).chmod(0o755)
        return given

    return put


ONE = Submission("2026-01-01T00:00:00+00:00", 4, ("recipefuzz-a", "recipefuzz-a-report"), "12", "13")
QUEUE = r"""printf '12|0|RUNNING|n1|None\n12|1|RUNNING|n2|None\n12|2|PENDING||Resources\n13|N/A|PENDING||Dependency\n14|N/A|RUNNING|n3|None\n'"""


def test_status_of_jobs(tmp_path: Path, fake: FakeCommand) -> None:
    keep(tmp_path, [ONE])
    given = fake("squeue", QUEUE)
    jobs = alive(tmp_path)
    assert list(job_lines(jobs, tmp_path)) == [
        "  jobs     2 running on n1 n2, 1 pending (Resources)",
        "  report   by job 13: 1 pending (Dependency)",
        f"  logs     {tmp_path / 'jobs'}",
    ]
    assert jobs.ids == ["12", "13"], "14 has the name, but is of another run"
    assert "--name=recipefuzz-a,recipefuzz-a-report" in given.read_text()


def test_status_of_jobs_that_have_ended(tmp_path: Path, fake: FakeCommand) -> None:
    keep(tmp_path, [ONE])
    fake("squeue", "true")
    lines = ["  jobs     no worker is queued or running", f"  logs     {tmp_path / 'jobs'}"]
    assert list(job_lines(alive(tmp_path), tmp_path)) == lines
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "12_0_0_log.out").write_text(
        "Traceback (most recent call last):\n  ...\nOSError: \x1b[31mno such disk\n"
    )
    (tmp_path / "jobs" / "12_1_0_log.out").write_text("search 3/20\n")
    last = r"  last     'OSError: \x1b[31mno such disk' (12_0_0_log.out)"
    assert list(job_lines(alive(tmp_path), tmp_path)) == [*lines, last]
    assert list(end(RunFolder(tmp_path))) == ["no job of this run is queued or running"]


def test_a_run_that_was_never_submitted_asks_nobody(tmp_path: Path, fake: FakeCommand) -> None:
    given = fake("squeue", "exit 1")
    assert list(job_lines(alive(tmp_path), tmp_path)) == []
    assert not given.exists()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "there is no command squeue here"),
        ("echo Unable to contact slurm controller >&2; exit 1", "squeue failed: Unable to contact slurm controller"),
        ("exit 7", "squeue failed: exit code 7"),
    ],
)
def test_a_slurm_that_can_not_be_asked_is_words(
    tmp_path: Path, fake: FakeCommand, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    keep(tmp_path, [ONE])
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake("squeue", script)
    assert list(job_lines(alive(tmp_path), tmp_path)) == [f"  jobs     unknown: {why}"]
    with pytest.raises(RunFailedError, match=why):
        list(end(RunFolder(tmp_path)))
    fake("sbatch", "true")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path / 'bin'}")
    with pytest.raises(RunFailedError, match=why):
        list(submit(study(tmp_path), listener=Silent()))


def test_lines_of_squeue_that_are_none(tmp_path: Path, fake: FakeCommand) -> None:
    keep(tmp_path, [ONE])
    fake("squeue", r"printf 'slurm: a warning\n\n12|0|RUNNING|n1|None\n\377|\n'")
    assert alive(tmp_path).ids == ["12"]


def test_cancel(tmp_path: Path, fake: FakeCommand) -> None:
    keep(tmp_path, [ONE])
    fake("squeue", QUEUE)
    given = fake("scancel", "true")
    assert list(end(RunFolder(tmp_path))) == [
        "cancelled: job 12, 13 (3 workers, the report)",
        f"everything finished is kept. Go on with: recipefuzz submit {tmp_path / 'config.yaml'}",
    ]
    assert given.read_text().split() == ["12", "13"]


def test_what_a_template_submitted_is_ended_by_its_own_scheduler(tmp_path: Path) -> None:
    keep(tmp_path, [Submission("2026-01-01T00:00:00+00:00", 4, said="77.pbs")])
    assert list(job_lines(alive(tmp_path), tmp_path)) == [
        "  jobs     handed to the scheduler 2026-01-01T00:00:00+00:00: 77.pbs"
    ]
    assert "end it with the scheduler's own command" in next(end(RunFolder(tmp_path)))


@pytest.mark.parametrize("more", [{}, {"add": True, "fresh": True}])
def test_a_run_with_jobs_is_not_submitted_again(tmp_path: Path, fake: FakeCommand, more: dict[str, bool]) -> None:
    keep(tmp_path, [ONE])
    fake("squeue", QUEUE)
    with pytest.raises(InputError, match="jobs of this run are queued or running: 12, 13"):
        list(submit(study(tmp_path), listener=Silent(), **more))


@pytest.mark.parametrize(
    "change",
    [
        {"array": "-u root"},
        {"array": 12},
        {"array": "1" * 21},
        {"finish": "٣"},
        {"names": None},
        {"names": [3]},
        {"names": ["training"]},
        {"names": ["recipefuzz-a,training"]},
        {"workers": "4"},
        {"at": None},
    ],
)
def test_a_list_of_jobs_that_others_wrote_is_data(tmp_path: Path, change: dict[str, object]) -> None:
    keep(tmp_path, [ONE])
    record = json.loads((tmp_path / FILE).read_text())[0] | change
    (tmp_path / FILE).write_text(json.dumps([record]))
    with pytest.raises(InputError, match=r"jobs.json: the list of the run's jobs can't be read"):
        alive(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["at", "array", "names", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(content=json_values.map(json.dumps) | st.text())
def test_any_list_of_jobs_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / FILE).write_text(content, encoding="utf-8", errors="replace")
    try:
        found = submitted(folder)
    except InputError:
        return
    assert all(isinstance(submission, Submission) for submission in found)


def test_where_there_is_no_slurm_it_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no command sbatch here"):
        list(submit(study(tmp_path / "run"), listener=Silent()))
    assert not (tmp_path / "run").exists()


def test_what_sbatch_says_is_shown(tmp_path: Path, fake: FakeCommand) -> None:
    make_private(tmp_path / "jobs")
    fake("srun", "true")
    fake("sbatch", "echo sbatch: error: invalid partition specified: nope >&2; exit 1")
    with pytest.raises(RunFailedError, match=r"SLURM did not take the job(.|\n)*invalid partition specified: nope"):
        submit_workers(study(tmp_path, partition="nope"), tmp_path)


def test_ids_of_what_was_submitted(tmp_path: Path, fake: FakeCommand) -> None:
    make_private(tmp_path / "jobs")
    fake("srun", "true")
    fake("sbatch", "echo Submitted batch job 77")
    assert submit_workers(study(tmp_path), tmp_path) == "77"
    assert len(list((tmp_path / "jobs").glob("77_*_submitted.pkl"))) == 4
    assert submit_workers(study(tmp_path, workers=1), tmp_path) == "77"


# --- the folder of the jobs


def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make_private(tmp_path / "jobs")
    finally:
        os.umask(old)
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
    make_private(tmp_path / "jobs")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs").chmod(mode)
    with pytest.raises(RunFailedError, match="others could write what jobs in this folder run"):
        make_private(tmp_path / "jobs")
    command = [sys.executable, "-P", "-m", "recipefuzz.launch.private_folder", tmp_path / "jobs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "others could write" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_user_and_a_link_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_private(tmp_path / "jobs")
    (tmp_path / "link").symlink_to(tmp_path / "jobs")
    with pytest.raises(RunFailedError, match="others could write"):
        require_private(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "jobs").stat().st_uid + 1)
    with pytest.raises(RunFailedError, match="others could write"):
        require_private(tmp_path / "jobs")
    with pytest.raises(RunFailedError, match="No such file"):
        require_private(tmp_path / "none")


# --- a job that is told to stop


class RequeuedError(Exception):
    pass


def run_worker(monkeypatch: pytest.MonkeyPatch, told: signal.Signals | None, *, over: bool) -> None:
    """A worker that gets a signal while it works, under a handler such as submitit's."""

    def work(*_: object) -> bool:
        if told is not None:
            signal.raise_signal(told)
        return over

    def requeue(*_: object) -> None:
        raise RequeuedError

    monkeypatch.setattr(task.Worker, "_work", work)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGUSR2, requeue)
    try:
        task.Worker("run")()
        if over:
            signal.raise_signal(signal.SIGUSR2)  # one that comes while Python ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STATES = {"runs": "echo RUNNING", "cancelled": "echo COMPLETING", "gone": "true", "no answer": "exit 1"}


@pytest.mark.parametrize(
    ("told", "state", "requeued"),
    [
        (signal.SIGUSR2, "runs", True),  # its time is nearly up, or it is preempted
        (signal.SIGUSR1, "runs", True),
        (signal.SIGTERM, "runs", True),  # preempted, where SLURM sends no other signal first
        (signal.SIGTERM, "cancelled", False),
        (signal.SIGUSR2, "cancelled", False),
        (signal.SIGTERM, "gone", False),
        (signal.SIGUSR2, "no answer", True),
        (signal.SIGTERM, "no answer", False),
    ],
)
def test_a_stopped_worker_comes_back_unless_it_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, fake: FakeCommand, told: signal.Signals, state: str, requeued: bool
) -> None:
    given = fake("squeue", STATES[state])
    if requeued:
        with pytest.raises(RequeuedError):
            run_worker(monkeypatch, told, over=False)
    else:
        run_worker(monkeypatch, told, over=False)
    assert "--jobs=12_3" in given.read_text()


@pytest.mark.parametrize("told", [None, signal.SIGUSR2])
def test_a_worker_with_nothing_left_to_do_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch, fake: FakeCommand, told: signal.Signals | None
) -> None:
    fake("squeue", STATES["runs"])
    run_worker(monkeypatch, told, over=True)


# --- a template


PBS = """\
#!/bin/bash
#PBS -N {name}
#PBS -J 1-{workers}
#PBS -l select=1:ncpus={cpus}:ngpus={gpus}:mem={memory}
#PBS -l walltime={time}
#PBS -o {log}
echo ${workers} {a,b} {unknown} $HOME
{command}
"""
FILLED = """\
#!/bin/bash
#PBS -N recipefuzz-digits
#PBS -J 1-8
#PBS -l select=1:ncpus=6:ngpus=1:mem=8G
#PBS -l walltime=02:01:00
#PBS -o RUN/jobs/log
echo ${workers} {a,b} {unknown} $HOME
PYTHON -P -m recipefuzz worker RUN
"""


def by_template(tmp_path: Path, text: str = PBS, **section: object) -> Config:
    (tmp_path / "job.pbs").write_text(text)
    resources = {"workers": 8, "time": 2 * 3600 + 1, "memory": "8G", "cpus": 6, "gpus": 1}
    return study(tmp_path / "run", "template", file=str(tmp_path / "job.pbs"), **resources | section)


def test_a_template_is_filled_in_and_the_shell_s_braces_are_left(tmp_path: Path) -> None:
    (shown,) = scripts(by_template(tmp_path))
    assert neutral(shown, tmp_path / "run") == FILLED
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "section", "message"),
    [
        ("echo\n", {}, r"job.pbs: the template has no \{command\}"),
        (PBS, {"memory": None}, r"the template has \{memory\}, and the config says none"),
        (PBS, {"file": "none.pbs"}, "the template can't be read"),
        (PBS, {"file": None}, "no template"),
    ],
)
def test_templates_that_can_not_be_filled_in(
    tmp_path: Path, text: str, section: dict[str, object], message: str
) -> None:
    config = by_template(tmp_path, text)
    template = config.run.template.model_copy(update=section)
    with pytest.raises(InputError, match=message):
        scripts(config.model_copy(update={"run": config.run.model_copy(update={"template": template})}))


def test_a_run_s_folder_that_would_have_to_be_quoted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the run's folder can't stand in a job script"):
        fill(by_template(tmp_path), tmp_path / "my run; reboot")


def test_a_template_is_handed_to_the_command_of_the_config(tmp_path: Path, fake: FakeCommand) -> None:
    run = tmp_path / "run"
    (run / "jobs").mkdir(parents=True)
    given = fake("qsub", "echo 77.pbs")
    assert submit_script(by_template(tmp_path, submit="qsub -V {script}"), run) == "77.pbs"
    assert given.read_text().split() == ["-V", str(run / "jobs" / "job.sh")]
    assert neutral((run / "jobs" / "job.sh").read_text(), run) == FILLED
    fake("qsub", "echo no such queue >&2; exit 1")
    with pytest.raises(RunFailedError, match="qsub failed: no such queue"):
        submit_script(by_template(tmp_path), run)


@pytest.mark.slow
def test_a_shell_is_a_scheduler_too(tmp_path: Path) -> None:
    """A template whose two workers run in the background of one script."""
    (tmp_path / "job.sh").write_text("for i in $(seq {workers}); do {command} >{log}.$i 2>&1 & done\nwait\n")
    (tmp_path / "study.yaml").write_text(
        "target: {data: wine, model: mlp, model_args: {width: 8, depth: 2}}\n"
        "space: {lr: {low: 1e-3, high: 1, log: true}}\n"
        "recipe: {input_norm: standardize, optimizer: momentum}\n"
        "trial: {steps: 40, batch_size: 16}\n"
        "search: {trials: 40, confirm: {top: 1, seeds: 2}}\n"
        "run: {workers: 0, template: {workers: 2, submit: sh {script}}}\n".replace("sh {script}", "'sh {script}'")
    )

    def recipefuzz(*words: str) -> str:
        command = [sys.executable, "-m", "recipefuzz", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    recipefuzz("submit", "study.yaml", "--template", "job.sh")
    logs = [path.read_text() for path in (tmp_path / "runs" / "study" / "jobs").glob("log.*")]
    assert len(logs) == 2
    assert all("nothing is left to be done" in log for log in logs)
    status = recipefuzz("status", "study")
    assert "study: done" in status
    assert "40 of 40 trials" in status
    assert "handed to the scheduler" in status
    assert "safe recipe" in recipefuzz("report", "study")
