"""Any other scheduler (PBS, LSF, ...): a job script of the user's, filled in and handed to their submit command.

`{command}` and the other names in braces are replaced wherever they stand; all else, `${HOME}` say, is the shell's.
Each job that the script starts is one worker. There is no job that reports: `recipefuzz report RUN` does.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from recipefuzz.atomic import write_atomically
from recipefuzz.config import Config
from recipefuzz.errors import InputError, Place
from recipefuzz.launch.jobs import job_names, run_command
from recipefuzz.launch.private_folder import JOBS

SCRIPT = "job.sh"
PLAIN = r"[\w./+@:,=-]+"  # a path that means the same to the shell and in a line of a scheduler's options


def fill(config: Config, run: Path) -> str:
    """The job script.

    Raises:
        InputError: no such file, no {command} in it, or a run's folder that has to be quoted.
    """
    place = config.source.place("run", "template", "file")
    path = config.template_path
    if path is None:
        raise InputError("no template", place=place, expected="run.template.file, or --template FILE")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the template can't be read", place=Place(str(path)), found=str(error)) from error
    if not re.fullmatch(PLAIN, str(run)):
        expected = "letters, digits and . / _ + @ : , = -"
        raise InputError("the run's folder can't stand in a job script", place=Place(str(run)), expected=expected)
    values = _values(config, run)
    if "{command}" not in text:
        raise InputError(
            "the template has no {command}, so its jobs would do nothing",
            place=Place(str(path)),
            expected=f"a job script with some of {', '.join(f'{{{name}}}' for name in values)}",
        )
    names = re.compile(rf"(?<!\$)\{{({'|'.join(values)})\}}")
    if not config.run.template.memory and "memory" in names.findall(text):
        problem = "the template has {memory}, and the config says none"
        raise InputError(problem, place=config.source.place("run", "template", "memory"), expected="such as 8G")
    return names.sub(lambda match: values[match[1]], text)


def _values(config: Config, run: Path) -> dict[str, str]:
    job, minutes = config.run.template, -(-config.run.template.time // 60)
    hours, rest = divmod(int(minutes), 60)
    return {
        "command": shlex.join([sys.executable, "-P", "-m", "recipefuzz", "worker", str(run)]),
        "workers": str(job.workers),
        "run": str(run),
        "time": f"{hours:02}:{rest:02}:00",
        "minutes": str(int(minutes)),
        "memory": job.memory or "",
        "cpus": str(job.cpus),
        "gpus": str(job.gpus),
        "log": str(run / JOBS / "log"),
        "name": job_names(config.study)[0],
    }


def submit_script(config: Config, run: Path) -> str:
    """Write the script into the run's folder and submit it; what the submit command says.

    Raises:
        InputError: as `fill`.
        RunFailedError: the submit command isn't there, or fails.
    """
    script = run / JOBS / SCRIPT
    write_atomically(script, fill(config, run))
    words = shlex.split(config.run.template.submit)
    return run_command([word.replace("{script}", str(script)) for word in words], seconds=None).strip()
