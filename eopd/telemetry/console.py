"""A run on the terminal: a calm live view, plain lines where there is no terminal, and the table at
the end.

``Console`` is a sink: it shows the newest row. The remaining time is honest: it is made of the gaps
between the last rows, so that checkpoints and waits count; it knows nothing before the second row,
since the first step warms everything up; and it stands still while a step takes longer than the
ones before it.
"""

import itertools
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import rich.console
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eopd.run.record import HeldOut, Measurement, Row, Sample, Summary
from eopd.telemetry.cells import LINE, cells, show, value
from eopd.telemetry.evaluations import COMPARED, MEASURED, best_line
from eopd.telemetry.forecast import AFTER_STEPS, forecast
from eopd.telemetry.plain import say, terminal, visible

logger = logging.getLogger(__name__)
MAX_WIDTH: Final = 100
PACE_WINDOW: Final = 20
SAMPLE_CHARACTERS: Final = 200
SILENCE_S: Final = 60.0  # seconds without a plain line, until one says what is under way

_DIVERGENCES: Final = ("reverse_kl", "forward_kl")


@dataclass(frozen=True, slots=True)
class _Progress:
    """What the live view shows. It is replaced as a whole, since a thread of its own draws it."""

    row: Row
    at: float
    step_s: float | None

    def step(self) -> int:
        return int(self.row.get("eopd_step", 0.0))

    def left_s(self, now: float, batches: int) -> float | None:
        if self.step_s is None:
            return None

        return self.step_s * (batches - self.step()) - min(now - self.at, self.step_s)


class Console:
    """Shows a live view until ``close``, or plain lines where there is no terminal. The plain lines
    go to the log too.
    """

    def __init__(
        self,
        *,
        run: str,
        batches: int,
        expected_minutes: float | None = None,
        output: rich.console.Console | None = None,
    ) -> None:
        self._output = output or terminal()
        self._run = run
        self._batches = batches
        self._expected_minutes = expected_minutes
        self._num_rows = 0
        self._start = self._output.get_time()
        self._rows_at: deque[float] = deque(maxlen=PACE_WINDOW + 1)
        self._progress = _Progress(row={}, at=self._start, step_s=None)
        self._doing = ""
        self._said_at = self._start
        self._live: Live | None = None
        if self._output.is_interactive:
            self._live = Live(self, console=self._output, refresh_per_second=2)
            self._live.start()

    def write(self, row: Row) -> None:
        """Show the row of a completed step."""
        now = self._output.get_time()
        self._rows_at.append(now)
        gaps = len(self._rows_at) - 1
        step_s = (now - self._rows_at[0]) / gaps if gaps else None
        self._progress = _Progress(row=dict(row), at=now, step_s=step_s)
        self._doing = ""
        line = self._line()
        logger.info(line)
        if self._live is None:
            self.message(line)
        else:
            self._live.refresh()

        self._num_rows += 1
        if (
            self._num_rows == AFTER_STEPS
            and step_s is not None
            and self._progress.step() < self._batches
        ):
            self._foretell(row, now - self._start, step_s)

    def _foretell(self, row: Row, spent_s: float, step_s: float) -> None:
        sentences = forecast(
            row,
            spent_s=spent_s,
            step_s=step_s,
            batches=self._batches,
            expected_minutes=self._expected_minutes,
        )
        logger.info(sentences)
        self.message(sentences)

    def message(self, text: str) -> None:
        """Print a text above the live view; brackets in it are not markup."""
        self._said_at = self._output.get_time()
        say(self._output, text)

    def doing(self, text: str) -> None:
        """Show what is under way, and how far it is, until the next step: in the live view, or on a
        plain line after ``SILENCE_S`` without one.
        """
        self._doing = text
        if self._live is None and self._output.get_time() - self._said_at >= SILENCE_S:
            self.message(text)

    def close(self) -> None:
        """Stop the live view; what it showed last stays on the screen."""
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> Constrain:
        step = self._progress.step()
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(self._run, style="bold"),
            ProgressBar(
                total=self._batches, completed=step, complete_style="cyan", finished_style="green"
            ),
            Text(f"{step}/{self._batches}"),
            Text(clock(self._output.get_time() - self._start), style="dim"),
            Text(self._remaining()),
        )
        frame = Table.grid(expand=True)
        frame.add_row(head)
        if self._doing:
            frame.add_row(Text(self._doing, style="dim", no_wrap=True, overflow="ellipsis"))

        if self._progress.row:
            frame.add_row(cells(self._progress.row))

        return Constrain(frame, MAX_WIDTH)

    def _remaining(self) -> str:
        seconds = self._progress.left_s(self._output.get_time(), self._batches)
        if self._progress.step() >= self._batches:
            return "done"

        return "" if seconds is None else f"{clock(seconds)} left"

    def _line(self) -> str:
        row = self._progress.row
        shares = ", ".join(
            f"{name} {show(row, f'eopd_{name}_seconds')}" for name in ("wait", "train", "weights")
        )
        parts = [
            f"step {self._progress.step()}/{self._batches}",
            f"{show(row, 'eopd_step_seconds')} ({shares})",
            *(f"{label} {value(row, names)}" for label, names in LINE),
            self._remaining(),
        ]

        return " | ".join(filter(None, parts))


def print_summary(
    summary: Summary,
    samples: Sequence[Sample],
    run_directory: Path,
    output: rich.console.Console | None = None,
) -> None:
    """Print the table at the end of a run: rate, where the time went, held-out numbers and texts
    before and after training. A run that did not get as far as any number has one line.
    """
    output = output or terminal()
    if not summary.steps and summary.held_out.before is None:
        head = f"{summary.status} before the first step, after {clock(summary.wall_s)}"
        say(output, f"{head}; run directory: {run_directory}")
        return

    rate = Text(
        f"{summary.status}: {summary.steps} steps, {summary.tokens:,} response tokens "
        f"in {clock(summary.wall_s)} ({summary.tokens_per_s:.1f}/s in the steps)",
        style="bold",
    )
    tables = [
        _time_table(summary.step_seconds),
        held_out_table(summary.held_out),
        parts_table(summary.held_out),
        *map(_sample_table, samples),
    ]
    for block in (rate, *(table for table in tables if table.rows)):
        output.print()
        output.print(block)

    output.print()
    if summary.best is not None:
        text = f"{best_line(summary.best)}; its student: {run_directory / 'hf-best'}"
        say(output, text)

    say(output, f"run directory: {run_directory}")


def _table(title: str, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(title, header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="right", header_style="dim")

    return table


def _time_table(step_seconds: Mapping[str, float]) -> Table:
    table = _table("mean seconds per step", *step_seconds)
    table.add_row("", *(f"{seconds:.2f}" for seconds in step_seconds.values()))
    return table


def held_out_table(held_out: HeldOut) -> Table:
    """Returns the table of held-out numbers before and after training."""
    before, after = held_out.before or {}, held_out.after or {}
    table = _table("held out, per response token", "before", "after", "change")
    for name in COMPARED:
        change = "-"
        if name in before and name in after:
            change = f"{after[name].mean - before[name].mean:+.3f}"

        table.add_row(_label(name), _measured(before, name), _measured(after, name), change)

    return table


def print_measured(
    measured: Mapping[str, Measurement], output: rich.console.Console | None = None
) -> None:
    """Print one held-out measurement."""
    output = output or terminal()
    table = _table("held out, per response token", "measured")
    for name in COMPARED:
        table.add_row(_label(name), _measured(measured, name))

    output.print(table)
    parts = parts_table(HeldOut(before=measured))
    if parts.rows:
        output.print(parts)


def parts_table(held_out: HeldOut) -> Table:
    """Returns the table of the divergences where the teacher is sure and unsure, and by source of
    the prompts, before and after training.
    """
    phases = [phase for phase in (held_out.before, held_out.after) if phase]
    parts = {
        name.removeprefix("share: ")
        for name in itertools.chain(*phases)
        if name.startswith("share: ")
    }
    table = _table("held out, by part of the tokens", "share", "reverse KL", "forward KL")

    def cell(name: str, form: str) -> str:
        return " → ".join(
            format(phase[name].mean, form) if name in phase else "-" for phase in phases
        )

    for part in sorted(parts, reverse=True):
        table.add_row(
            part,
            cell(f"share: {part}", ".0%"),
            *(cell(f"{kl}: {part}", ".3f") for kl in _DIVERGENCES),
        )

    return table


def _label(name: str) -> str:
    label, unit = MEASURED[name]
    return f"{label} (nats)" if unit == "nats" else label


def _measured(measurements: Mapping[str, Measurement], name: str) -> str:
    return measurements[name].shown() if name in measurements else "-"


def _sample_table(sample: Sample) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("prompt", Text(_printable(sample.prompt), style="bold"))
    table.add_row("before", Text(_printable(sample.before)))
    table.add_row("after", Text(_printable(sample.after)))
    return table


def _printable(text: str) -> str:
    """Returns one paragraph of bounded length."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= SAMPLE_CHARACTERS else line[:SAMPLE_CHARACTERS] + "…"


def clock(seconds: float) -> str:
    """Returns minutes and seconds, with hours where there are any: ``1:02:03``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
