"""A plan is printed as a table and sentences, or becomes a record for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import rich.console
from rich.table import Table

from eopd.config import Config
from eopd.planning.balance import WORKERS, Balance
from eopd.planning.needs import Need
from eopd.planning.plan import RunPlan
from eopd.planning.simulate import Simulated
from eopd.planning.traffic import Traffic
from eopd.telemetry.plain import say, terminal
from eopd.telemetry.step import PARTS

_HEADINGS: Final = (
    "devices",
    "workers",
    "batch",
    "formula\nsteps/h",
    "simulated\nsteps/h",
    "engines\nat work",
    "engines\nfull",
    "replicas\nat work",
    "waits for\nengines",
    "waits for\nteachers",
    "learner\ntrains",
    "learner\nsends",
    "staleness\nmean",
    "staleness\nmax",
)
_TABLE_WIDTH: Final = 150


def as_record(plan: RunPlan, balance: Balance | None) -> dict[str, object]:
    """Returns everything that ``print_plan`` shows, as JSON; sizes are bytes."""
    teachers = {name: model.parameters for name, model in plan.models.teachers.items()}
    roles = [
        {
            "role": need.role,
            "actors": need.actors,
            "gpus": need.gpus,
            "device": need.device,
            "device_bytes": need.device_bytes,
            "host": need.host,
            "host_bytes": need.host_bytes,
            "limit_bytes": need.limit,
            "fits": need.fits,
            "responses_at_a_time": need.responses,
        }
        for need in plan.needs
    ]
    return {
        "parameters": {"student": plan.models.student.parameters, "teachers": teachers},
        "trained_parameters": plan.models.student.trained,
        "gpu_bytes": plan.hardware.gpu_bytes,
        "roles": roles,
        "memory_bytes": plan.memory_bytes,
        "fits": plan.fits,
        "traffic": asdict(plan.traffic),
        "advice": list(plan.advice),
        "notes": list(plan.notes),
        "balance": None if balance is None else asdict(balance),
    }


def print_plan(
    plan: RunPlan,
    balance: Balance | None,
    config: Config,
    *,
    output: rich.console.Console | None = None,
) -> None:
    """Prints a plan as a table and sentences.

    Args:
        plan: the numbers.
        balance: of the workers, where rates were given.
        config: of the run.
        output: else the terminal.
    """
    output = output or terminal()
    table = Table(title="memory, GB", title_justify="left", title_style="bold", box=None)
    table.add_column(no_wrap=True)
    table.add_column("of one", justify="right", header_style="dim", no_wrap=True)
    table.add_column("", no_wrap=True)

    for need in plan.needs:
        _add(table, need)

    output.print(table)
    output.print()
    lines = [*_of_memory(plan), *_of_traffic(plan.traffic)]
    if balance is not None:
        lines += _of_balance(balance, config)

    for line in (*lines, *plan.advice, *plan.notes):
        say(output, line)


def _add(table: Table, need: Need) -> None:
    """Adds a role: its parts, and their sum with a verdict."""
    place = "of each GPU" if need.on_gpu else "of memory"
    table.add_row(f"{need.role} x {need.actors}", "", place, style="dim")
    for name, size in need.device.items():
        table.add_row(f"  {name}", gigabytes(size), "")

    verdict = ""
    if need.limit is not None:
        verdict = f"of {gigabytes(need.limit)}: {'fits' if need.fits else 'DOES NOT FIT'}"

    table.add_row("  together", gigabytes(need.device_bytes), verdict, style="bold")
    if need.responses is not None:
        table.add_row("  sequences of full length in the cache", str(need.responses), "")

    for name, size in need.host.items():
        table.add_row(f"  {name}, host memory", gigabytes(size), "")


def _of_memory(plan: RunPlan) -> list[str]:
    student = plan.models.student
    trained = "" if student.trained == student.parameters else f", trained {student.trained:,}"
    where = "beside GPUs" if plan.fits is not None else "together"
    return [
        f"Parameters: student {student.parameters:,}{trained}"
        + "".join(
            f"; teacher {name} {model.parameters:,}" for name, model in plan.models.teachers.items()
        )
        + ".",
        f"All actors need {gigabytes(plan.memory_bytes)} GB of memory {where}.",
    ]


def _of_traffic(traffic: Traffic) -> list[str]:
    seconds = "" if traffic.sync_s is None else f", {traffic.sync_s:.2f} s at that bandwidth"
    return [
        f"A trajectory of full length has {traffic.body_bytes:,} bytes, a batch "
        f"{traffic.batch_bytes / 1e6:,.1f} MB; {traffic.slots} may be under way, "
        f"{traffic.in_flight_bytes / 1e6:,.1f} MB.",
        f"A publish is {gigabytes(traffic.sync_bytes)} GB by {traffic.wire}{seconds}.",
        f"A checkpoint takes {gigabytes(traffic.checkpoint_bytes)} GB of disk or more, and "
        f"{traffic.checkpoints} lie there at a time.",
    ]


def _of_balance(balance: Balance, config: Config) -> list[str]:
    workers = ", ".join(f"{WORKERS[name]} {count}" for name, count in balance.counts.items())
    spare = f", {balance.spare} of them spare" if balance.spare else ""
    lines = [
        f"Balance of {balance.devices} devices{spare}: with {workers} they do {balance.tokens_per_s:,.0f} "
        f"response tokens/s, {balance.steps_per_hour:,.1f} steps an hour.",
        f"The bottleneck is {balance.bottleneck}; one worker more there moves it to "
        f"{balance.next_bottleneck}, at {balance.next_tokens_per_s:,.0f} tokens/s.",
    ]
    if config.flow.max_staleness == 0:
        lines.append(
            "That is with stages that overlap: flow.max_staleness is 0, and then it may be as few as "
            f"{balance.in_turn_steps:,.1f} steps an hour."
        )

    return lines


def simulation_record(rows: Sequence[Simulated]) -> list[dict[str, object]]:
    """Returns everything that ``print_simulation`` shows, as JSON, a record for each row."""
    return [
        {
            "devices": row.balance.devices,
            "closed_steps_per_hour": row.closed_steps,
            "balance": asdict(row.balance),
            **asdict(row.simulation),
        }
        for row in rows
    ]


def print_simulation(
    rows: Sequence[Simulated], config: Config, *, output: rich.console.Console | None = None
) -> None:
    """Prints a row for each number of devices, and what the columns mean.

    Args:
        rows: the simulations.
        config: of the run.
        output: else the terminal.
    """
    output = output or terminal(width=_TABLE_WIDTH)
    table = Table(title="simulation", title_justify="left", title_style="bold", box=None)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", header_style="dim", no_wrap=True)

    for row in rows:
        table.add_row(*_cells(row))

    output.print()
    output.print(table)
    output.print()
    for line in _of_simulation(rows, config):
        say(output, line)


def _cells(row: Simulated) -> list[str]:
    simulation, counts = row.simulation, row.balance.counts
    shares = [
        simulation.busy["generate"],
        simulation.engines_full,
        simulation.busy.get("score"),
        *(simulation.learner[part] for part in PARTS),
    ]
    return [
        str(row.balance.devices),
        "/".join(str(count) for count in counts.values()),
        str(simulation.batch),
        f"{row.closed_steps:,.1f}",
        f"{simulation.steps_per_hour:,.1f}",
        *("" if share is None else f"{share:.0%}" for share in shares),
        f"{simulation.staleness_mean:.2f}",
        str(simulation.staleness_max),
    ]


def _of_simulation(rows: Sequence[Simulated], config: Config) -> list[str]:
    names = ", ".join(WORKERS[name] for name in rows[0].balance.counts)
    closed = "follow one another" if config.flow.max_staleness == 0 else "overlap"
    lines = [
        f"Workers are {names}. Formula: steps an hour by the closed formula for stages that {closed}; "
        "simulated: those of the simulation.",
        "Engines and replicas are at work while they have something to do; full is what engines "
        "write, of what they would with all of their places taken. The learner waits for engines, "
        "waits for teachers, trains, or sends weights. Staleness is in versions.",
    ]
    if len(rows) > 1:
        lines.append(
            f"The batch grows with the devices: as many trajectories a device as {rows[0].simulation.batch} "
            f"(the config's) on {rows[0].balance.devices}."
        )

    return lines


def gigabytes(size: int) -> str:
    """Returns a size in GB, with three digits that count."""
    number = size / 1e9
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )
