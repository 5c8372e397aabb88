"""The commands. No logic: parse, call, print, exit code. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recipefuzz.atomic import write_atomically
from recipefuzz.errors import EXIT_BAD_ANSWER, EXIT_RUN_FAILED, InputError, Place, RecipefuzzError
from recipefuzz.garbage import imports_kept

if TYPE_CHECKING:
    from recipefuzz.config import Config

app = typer.Typer(
    help="Which training recipes are safe, and why the others fail: found by experiment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The study's YAML file.", show_default=False)]
Workers = Annotated[str | None, typer.Option(help="auto, or a number of worker processes.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or the study's name.", show_default=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"recipefuzz {version('recipefuzz')}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def search(
    config: ConfigPath,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an existing run is put aside.")] = False,
    trials: Annotated[int | None, typer.Option(help="Trials in all, instead of the config's.")] = None,
    workers: Workers = None,
    folder: Annotated[Path | None, typer.Option(help="The run's folder, instead of runs/<study>.")] = None,
) -> None:
    """Run the study; resume it if it exists. Ends with a ranked table of safe recipes."""
    with imports_kept():
        from recipefuzz.config import load_config
        from recipefuzz.engines.pool import warm_up
        from recipefuzz.report.progress import Progress
        from recipefuzz.report.terminal import console, summary

        study = load_config(config).but(trials=trials, workers=workers, folder=folder)
        if study.run.launcher == "local":
            warm_up()
        from recipefuzz.searching import search as run_search

    if study.run.launcher != "local":
        _submit(study.launched(), fresh=fresh, add=False)
        return
    out = console()
    progress = Progress(out, study.axes.names)
    try:
        result = run_search(study, fresh=fresh, listener=progress)
    except KeyboardInterrupt:
        again = f"recipefuzz search {config}" + "".join(f" {a}" for a in _options(trials, workers, folder))
        out.print(f"interrupted; everything finished so far is kept. Go on with: {again}")
        raise
    finally:
        progress.close()
    out.print(summary(result.folder, study, result.results, result.ranked, result.diagnoses, result.peak))
    if result.best is None:
        raise typer.Exit(EXIT_BAD_ANSWER)


def _options(trials: int | None, workers: str | None, folder: Path | None) -> list[str]:
    given = (("--trials", trials), ("--workers", workers), ("--folder", folder))
    return [f"{name} {value}" for name, value in given if value is not None]


@app.command()
def submit(
    config: ConfigPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job scripts, and submit nothing.")] = False,
    workers: Annotated[int | None, typer.Option(help="Jobs, of one worker each, instead of the config's.")] = None,
    add: Annotated[bool, typer.Option("--add", help="More workers for a run whose jobs are still there.")] = False,
    template: Annotated[Path | None, typer.Option(help="A job script for another scheduler than SLURM.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an existing run is put aside.")] = False,
    folder: Annotated[Path | None, typer.Option(help="The run's folder, instead of runs/<study>.")] = None,
) -> None:
    """The same search as batch jobs of a cluster, which go on until nothing is left and then write the report."""
    from recipefuzz.config import load_config

    study = load_config(config).but(folder=folder).launched(workers=workers, template=template)
    if not dry_run:
        _submit(study, fresh=fresh, add=add)
        return
    from recipefuzz.launch.scripts import scripts

    for script in scripts(study):
        typer.echo(script)


def _submit(study: Config, *, fresh: bool, add: bool) -> None:
    from recipefuzz.launch.submitting import submit as submit_jobs
    from recipefuzz.report.progress import Progress
    from recipefuzz.report.terminal import console

    for line in submit_jobs(study, fresh=fresh, add=add, listener=Progress(console(), study.axes.names)):
        typer.echo(line)


@app.command()
def cancel(run: RunName) -> None:
    """End the jobs of a run on the cluster. Everything finished is kept."""
    from recipefuzz.launch.cancelling import end
    from recipefuzz.run_folder import RunFolder

    for line in end(RunFolder.find(run)):
        typer.echo(line)


@app.command("run")
def run_recipes(
    config: ConfigPath,
    recipes: Annotated[Path, typer.Argument(metavar="RECIPES.csv", help="A column per axis, a row per recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the verdicts go.")] = Path("verdicts.csv"),
    workers: Workers = None,
) -> None:
    """Judge given recipes: nan, stalled or converging, a row per recipe in the same order."""
    with imports_kept():
        from recipefuzz.config import load_config
        from recipefuzz.engines.pool import warm_up
        from recipefuzz.report.progress import Progress
        from recipefuzz.report.terminal import console, short_path

        study = load_config(config).but(workers=workers)
        if not out.parent.is_dir() or out.resolve() == recipes.resolve():
            where = "another file in a folder"
            raise InputError("can't write the verdicts there", place=Place(str(out)), expected=where)
        warm_up()
        from recipefuzz.judging import judge_recipes

    screen = console()
    progress = Progress(screen, study.axes.names)
    try:
        table = judge_recipes(study, recipes, progress, out)
    finally:
        progress.close()
    counts = ", ".join(f"{n} {verdict}" for verdict, n in table["verdict"].value_counts().items())
    screen.print(f"{counts}; written to {short_path(out.resolve())}")


@app.command()
def check(
    config: ConfigPath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of lines.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also save the loss curves as a picture (SVG).")] = None,
    record: Annotated[Path | None, typer.Option(help="Write a reference (.npz, .json) instead of checking.")] = None,
) -> None:
    """Is it the recipe at all? What an experienced person looks at first: data, code, gradients, loss curves."""
    import json

    from recipefuzz.checking import check as run_checks
    from recipefuzz.checking import record as write_record
    from recipefuzz.checks import loss_curves
    from recipefuzz.config import load_config
    from recipefuzz.finding import Level, worst
    from recipefuzz.report.checked import checked
    from recipefuzz.report.terminal import console, drawing

    study, screen, found = load_config(config), console(), []
    if record is not None:
        screen.print(write_record(study, record))
        return
    for finding in run_checks(study):
        found.append(finding)
        if picture is not None and finding.check == loss_curves.NAME:
            write_atomically(picture, drawing(checked(finding), f"recipefuzz check {study.study}"))
        if not as_json:
            screen.print(checked(finding))
    if as_json:
        typer.echo(json.dumps([finding.record() for finding in found], indent=1))
    if worst(found) is Level.FAIL:
        raise typer.Exit(EXIT_BAD_ANSWER)


@app.command()
def ladder(
    config: ConfigPath,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; existing runs are put aside.")] = False,
    workers: Workers = None,
) -> None:
    """Check and search the config's models from the simplest to the real one; the first that fails is where to look."""
    with imports_kept():
        from recipefuzz.config import load_config
        from recipefuzz.engines.pool import warm_up
        from recipefuzz.report.laddered import climbed, summary
        from recipefuzz.report.progress import Progress
        from recipefuzz.report.terminal import console

        study = load_config(config).but(workers=workers)
        warm_up()
        from recipefuzz.laddering import ladder as climb

    out, rungs = console(), []
    progress = Progress(out, study.axes.names)
    try:
        for rung in climb(study, fresh=fresh, listener=progress):
            progress.close()
            out.print(climbed(rung))
            rungs.append(rung)
    except KeyboardInterrupt:
        out.print(f"interrupted; everything finished so far is kept. Go on with: recipefuzz ladder {config}")
        raise
    finally:
        progress.close()
    out.print(summary(rungs))
    if rungs[-1].winner is None:
        raise typer.Exit(EXIT_BAD_ANSWER)


@app.command()
def diagnose(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config, or a run's folder or name.")],
    trial: Annotated[int | None, typer.Option(help="A trial of the run, by its number.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="axis=value, over the config's recipe.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the config's.", min=0)] = None,
    workers: Workers = None,
    save: Annotated[Path | None, typer.Option(help="Write a config that reproduces this one trial.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Why one recipe fails: where NaN begins, whether recipe, code or data is at fault, and a fix that was run."""
    import json

    from recipefuzz.config import load_config
    from recipefuzz.diagnosing import diagnose as run_diagnosis
    from recipefuzz.report.diagnosed import diagnosed
    from recipefuzz.report.terminal import console
    from recipefuzz.run_folder import RunFolder
    from recipefuzz.source import parse_settings

    study = load_config(Path(config)) if Path(config).is_file() else RunFolder.find(config).load_config()
    if save is not None and not save.parent.is_dir():
        raise InputError(
            "can't write a config there", place=Place(key="--save"), found=save, expected="an existing folder"
        )
    found = run_diagnosis(
        study.but(workers=workers),
        changes=parse_settings(changes or []),
        trial=trial,
        seed=seed,
        say=lambda line: typer.echo(f"{line} ...", err=True),
    )
    if as_json:
        typer.echo(json.dumps(found.record(), indent=1))
    else:
        threshold = str(found.shrunk or "")
        console().print(diagnosed(found.diagnosis, found.recipe.values(), found.seed, threshold))
    if save is not None:
        write_atomically(save, found.as_config())


@app.command()
def report(
    run: RunName,
    svg: Annotated[Path | None, typer.Option(help="Also save the summary as a picture (SVG).")] = None,
) -> None:
    """Write a run's tables again, from its store, and print its summary."""
    from recipefuzz.report.ranked import rank_run
    from recipefuzz.report.terminal import console, drawing, summary
    from recipefuzz.report.write import write_reports
    from recipefuzz.run_folder import RunFolder

    folder = RunFolder.find(run)
    config = folder.load_config()
    results, _, peak = folder.read(config)
    ranking, winner = rank_run(config, results)
    diagnoses = folder.diagnoses()
    write_reports(folder.path, config, results, ranking, winner, diagnoses)
    shown = summary(folder.path, config, results, ranking, diagnoses, peak)
    console().print(shown)
    if svg is not None:
        write_atomically(svg, drawing(shown, f"recipefuzz search {config.study}"))


@app.command()
def status(run: RunName) -> None:
    """Counts by verdict, throughput, what is left of a run, its jobs on a cluster."""
    from recipefuzz.launch.jobs import alive, job_lines
    from recipefuzz.report.status import status_lines
    from recipefuzz.report.terminal import console
    from recipefuzz.run_folder import RunFolder

    folder = RunFolder.find(run)
    jobs = alive(folder.path)
    again = "submit" if jobs.submissions else "search"
    for line in (*status_lines(folder, queued=bool(jobs.workers), again=again), *job_lines(jobs, folder.path)):
        console().print(line)


@app.command()
def worker(run: RunName, workers: Workers = None) -> None:
    """Train trials of a run beside its other workers, on this machine or others that see its folder."""
    with imports_kept():
        from recipefuzz.engines.pool import warm_up
        from recipefuzz.report.progress import Progress
        from recipefuzz.report.terminal import console
        from recipefuzz.run_folder import RunFolder

        folder = RunFolder.find(run)
        study = folder.load_config().but(workers=workers, folder=folder.path)
        warm_up()
        from recipefuzz.stopping import Stop
        from recipefuzz.working import work

    out = console()
    progress = Progress(out, study.axes.names)
    with Stop() as stop:
        try:
            over = work(study, folder, progress, stop)
        except KeyboardInterrupt:
            out.print(f"interrupted; what was not finished is given back. Go on with: recipefuzz worker {run}")
            raise
        finally:
            progress.close()
    stop.pass_on()
    if not over and stop.signal is not None:
        raise typer.Exit(128 + stop.signal)
    out.print(f"nothing is left to be done: recipefuzz report {run}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The config to write.")] = Path("study.yaml"),
    model: Annotated[str, typer.Option(help="Your model factory, or a built-in model.")] = "my_model:build",
    data: Annotated[str, typer.Option(help="Your data loader, or a built-in data set.")] = "my_model:load",
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, bce or module:loss.")] = "cross_entropy",
) -> None:
    """Write a commented config for your own model, to be edited."""
    from recipefuzz.template import write_template

    for line in write_template(path, model, data, loss):
        typer.echo(line)


def main() -> None:
    """Entry point: what is wrong with the input is one message, not a traceback."""
    for stream in (sys.stdout, sys.stderr):  # blocks and arrows become "?" where the terminal has none
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="recipefuzz")
    except RecipefuzzError as error:
        typer.echo(f"recipefuzz: {'error' if isinstance(error, InputError) else 'failed'}: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception:  # ours to mend: shown whole, and told from a bad answer by its exit code
        traceback.print_exc()
        sys.exit(EXIT_RUN_FAILED)
