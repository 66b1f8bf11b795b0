"""``eopd sweep`` runs the arms of a grid over several seeds, and compares them."""

from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.table import Table

from eopd.cli.commands import EXIT_FAILED, EXIT_INTERRUPTED, ConfigFile, train_command
from eopd.cli.terminal import outlive_readers
from eopd.config import UnavailableError
from eopd.run.arms import Interval
from eopd.run.grid import plan_runs, read_grids, read_seeds
from eopd.run.results import FILE, ArmResult
from eopd.telemetry.plain import terminal

SHOWN: Final = ("held_out/reverse_kl", "held_out/forward_kl", "held_out/top1_agreement")
OF_BENCHMARKS: Final = ("avg_at_n",)

_Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="KEY=VALUE,VALUE",
        help="A key and its values, each as --set takes it; may be given more than once. Every "
        "combination is an arm.",
    ),
]
_Seeds = Annotated[
    str | None,
    typer.Option(help="The seeds of every arm, such as 0..4 or 0,1,7; else that of the config."),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of all runs."),
]
_Parallel = Annotated[
    int, typer.Option(min=1, help="The most runs side by side, as far as resources allow.")
]
_Name = Annotated[
    str | None,
    typer.Option(help="The name of the sweep, a directory in run.directory; else NAME-sweep."),
]


def sweep(
    config: ConfigFile,
    grid: _Grid = None,
    seeds: _Seeds = None,
    overrides: _Overrides = None,
    parallel: _Parallel = 1,
    name: _Name = None,
) -> None:
    """Train every combination of settings over several seeds, and compare them in one report.

    The same command continues a sweep: complete runs are left as they are.
    """
    grids = read_grids(grid or [], overrides or [])
    numbers = None if seeds is None else read_seeds(seeds)
    directory, runs = plan_runs(config, overrides or [], grids, numbers, name)
    from eopd.runtime.sweep import Sweep

    outlive_readers()
    typer.echo(
        f"sweep {directory}: {_counted(len(runs), 'run')} of {_counted(len({run.arm for run in runs}), 'arm')}"
    )
    work = Sweep(directory, runs, grids, typer.echo)
    results = work.run(parallel)

    _print(results)
    for run in work.failed:
        typer.echo(f"failed: {run.name}: {run.error}; see {run.log}")

    for path in (directory / FILE, work.report):
        if path.exists():
            typer.echo(path)

    if work.status != "completed":
        options = _options(grid or [], seeds, parallel, name)
        again = train_command(config, overrides or [], options, verb="sweep")
        typer.echo(f"continue with: {again}")
        if work.lack is not None:
            raise UnavailableError(
                f"{work.lack}. No run was begun after it; cluster.wait_s lets runs wait for room"
            )

        raise typer.Exit(EXIT_FAILED if work.status == "failed" else EXIT_INTERRUPTED)


def _print(results: Sequence[ArmResult]) -> None:
    """Prints the final numbers of all arms, with intervals, and differences to the first arm."""
    console = terminal()
    for name in _shown(results):
        table = Table(title=name, title_justify="left", title_style="bold", box=None)
        table.add_column("arm", header_style="dim", overflow="fold")
        for heading in ("seeds", "mean ± 95 %", "to the first ± 95 %"):
            table.add_column(heading, justify="right", header_style="dim", no_wrap=True)

        for result in results:
            mean, difference = result.means.get(name), result.differences.get(name)
            seeds = str(mean.count) if mean else "-"
            cells = _cell(mean, "{:.4f}"), _cell(difference, "{:+.4f}")
            table.add_row(result.arm or "all runs", seeds, *cells)

        console.print()
        console.print(table)

    console.print()


def _shown(results: Sequence[ArmResult]) -> list[str]:
    """Returns the metrics that the terminal shows; ``sweep.json`` has all of them."""
    names = dict.fromkeys(name for result in results for name in result.means)
    scores = [name for name in names if name.rpartition("/")[2] in OF_BENCHMARKS]
    return [*(name for name in SHOWN if name in names), *scores]


def _cell(interval: Interval | None, form: str) -> str:
    """Returns a mean and half the width of its interval as text; a dash for what is not known."""
    if interval is None:
        return "-"

    mean = form.format(interval.mean)
    return mean if interval.high is None else f"{mean} ± {interval.high - interval.mean:.4f}"


def _options(grids: Sequence[str], seeds: str | None, parallel: int, name: str | None) -> list[str]:
    """Returns the options of the command without its overrides, as words."""
    words = [word for grid in grids for word in ("--grid", grid)]
    words += [] if seeds is None else ["--seeds", seeds]
    words += [] if parallel == 1 else ["--parallel", str(parallel)]
    words += [] if name is None else ["--name", name]
    return words


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
