"""``eopd status``: a run at a glance, from its files."""

import time
from collections.abc import Sequence

import rich.console
from rich.constrain import Constrain

from eopd.run.evaluations import Evaluation
from eopd.run.record import Row, Summary, seconds_between
from eopd.telemetry.cells import FAULTS, cells, value
from eopd.telemetry.console import MAX_WIDTH, clock, held_out_table
from eopd.telemetry.evaluations import best_line, evaluation_line
from eopd.telemetry.plain import say, terminal


def print_status(
    run: str,
    status: str,
    summary: Summary | None,
    rows: Sequence[Row],
    *,
    batches: int,
    evaluations: Sequence[Evaluation] = (),
    advice: str | None = None,
    output: rich.console.Console | None = None,
) -> None:
    """Print how far a run is, what its last step looked like, and what was lost and replaced.

    Args:
        run: its name.
        status: how it stands, see ``RunDirectory.status``.
        summary: ``summary.json``; None where there is none.
        rows: the last of ``metrics.jsonl``, with their ``time``; the seconds of the run between them
            tell the remaining time.
        batches: of the whole run.
        evaluations: the newest of every name.
        advice: a last line: what to do.
        output: else the terminal.
    """
    output = output or terminal()
    step = int(rows[-1]["eopd_step"]) if rows else 0
    head = f"{run}: {status}, step {step}/{batches}"
    if rows and status != "completed":
        head += _since(rows[-1]["time"], running=status == "running")

    if len(rows) > 1 and status == "running":
        pace_s = seconds_between(rows[0], rows[-1]) / (len(rows) - 1)
        head += f", about {clock(pace_s * (batches - step))} left"

    say(output, head, style="bold")
    if rows:
        output.print(Constrain(cells(rows[-1]), MAX_WIDTH))
        faults = ", ".join(f"{label} {value(rows[-1], names)}" for label, names in FAULTS)
        say(output, faults)

    for evaluation in evaluations:
        line = evaluation_line(evaluation)
        say(output, line)

    if summary and summary.best:
        say(output, best_line(summary.best))

    if summary and (summary.held_out.before or summary.held_out.after):
        output.print(held_out_table(summary.held_out))

    if advice is not None:
        say(output, advice)


def _since(moment: float, *, running: bool) -> str:
    ago = f"{clock(time.time() - moment)} ago"
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return f", the last one {ago}" if running else f", the last one at {at} ({ago})"
