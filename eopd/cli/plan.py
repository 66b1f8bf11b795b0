"""``eopd plan`` says what a run needs of each device, and whether it fits, before anything starts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from eopd.cli.commands import ConfigFile, Overrides
from eopd.cli.paths import require_file
from eopd.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from eopd.planning.balance import Balance
    from eopd.planning.needs import Hardware
    from eopd.planning.simulate import Simulated

_ANY_CPUS = 1e6  # a plan says nothing of CPUs

_GpuMemory = Annotated[
    str, typer.Option("--gpu-memory", metavar="SIZE", help="The memory of a GPU: 80GB, 40GiB.")
]
_Nodes = Annotated[int, typer.Option(min=1, help="The machines of the cluster.")]
_GpusPerNode = Annotated[
    int | None, typer.Option(min=1, help="The GPUs of each machine; else they are not counted.")
]
_Bandwidth = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Between two machines, a second: 100Gbit, 10GB."),
]
_Rates = Annotated[
    str | None,
    typer.Option(
        metavar="generate=N,score=N,train=N",
        help="Response tokens a second of one engine, one replica, one rank: `eopd profile` "
        "measures them.",
    ),
]
_Devices = Annotated[
    int | None,
    typer.Option(min=1, help="With --rates: balance so many devices; else those of the config."),
]
_Mean = Annotated[
    float | None,
    typer.Option(
        "--response-tokens",
        min=1.0,
        help="With --rates: the mean length of a response; else rollout.max_response_tokens.",
    ),
]
_Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate",
        help="With --rates: run the loop in virtual time, on workers of these rates, and tell the "
        "steps an hour, who is at work and who waits, and the staleness.",
    ),
]
_Scale = Annotated[
    str | None,
    typer.Option(
        metavar="FROM..TO",
        help="With --simulate: a row for each number of devices, which doubles: 8..4096.",
    ),
]
_Sigma = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=5.0,
        help="With --simulate: the spread of the lengths, which are lognormal: the standard "
        "deviation of their logarithms. Else 1.",
    ),
]
_Publish = Annotated[
    float | None,
    typer.Option(
        "--publish-s", min=0.0, help="With --simulate: the seconds that a publish takes; else 0."
    ),
]
_FullAt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --simulate: the responses at a time with which an engine does its whole rate; "
        "fewer are written no faster each. Else its share of the config's batch.",
    ),
]
_Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE.svg", help="With --scale: draw the rows into this file."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]


_PROFILE: Final = "--rates, which `eopd profile CONFIG` measures"


class _Given(NamedTuple):
    """The options of a balance and of its simulation."""

    rates: str | None
    devices: int | None
    response_tokens: float | None
    simulate: bool
    scale: str | None
    sigma: float | None
    publish_s: float | None
    full_at: int | None
    plot: Path | None


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu_memory: _GpuMemory = "80GB",
    nodes: _Nodes = 1,
    gpus_per_node: _GpusPerNode = None,
    bandwidth: _Bandwidth = None,
    rates: _Rates = None,
    devices: _Devices = None,
    response_tokens: _Mean = None,
    simulate: _Simulate = False,
    scale: _Scale = None,
    sigma: _Sigma = None,
    publish_s: _Publish = None,
    full_at: _FullAt = None,
    plot: _Plot = None,
    as_json: _Json = False,
) -> None:
    """Reckon what a run needs of each device, whether it fits, and what to change where it does not,
    from the config and its models' config.json alone. Nothing starts.
    """
    resolved = load_config(config, overrides or [])
    given = _Given(
        rates, devices, response_tokens, simulate, scale, sigma, publish_s, full_at, plot
    )
    _check(given)
    from eopd.planning.needs import Hardware
    from eopd.planning.plan import plan_run, read_models
    from eopd.planning.show import as_record, print_plan, print_simulation, simulation_record
    from eopd.planning.units import read_bandwidth, read_bytes

    hardware = Hardware(
        gpu_bytes=read_bytes("--gpu-memory", gpu_memory),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        bandwidth=None if bandwidth is None else read_bandwidth("--bandwidth", bandwidth),
    )
    balanced = None if rates is None else _balance(resolved, rates, devices, response_tokens)
    planned = plan_run(resolved, read_models(resolved), hardware)
    lack = _lack_of_gpus(resolved, hardware)
    rows = (
        [] if balanced is None or not simulate else _simulated(resolved, given, balanced, hardware)
    )

    if as_json:
        record = as_record(planned, balanced) | {"lack_of_gpus": lack}
        record["simulation"] = simulation_record(rows) or None
        typer.echo(json.dumps(record, allow_nan=False))
        return

    print_plan(planned, balanced, resolved)
    if lack:
        typer.echo(f"There is no room for it on {nodes} x {gpus_per_node} GPUs: {lack}.")

    if rows:
        print_simulation(rows, resolved)


def _check(given: _Given) -> None:
    """Checks that no option stands without the one that it belongs to.

    Raises:
        ConfigError: one does, or two exclude each other, or there is no place for the picture.
    """
    for option, value, needed, name in (
        ("--devices", given.devices, given.rates, _PROFILE),
        ("--response-tokens", given.response_tokens, given.rates, _PROFILE),
        ("--simulate", given.simulate or None, given.rates, _PROFILE),
        ("--scale", given.scale, given.simulate or None, "--simulate"),
        ("--sigma", given.sigma, given.simulate or None, "--simulate"),
        ("--publish-s", given.publish_s, given.simulate or None, "--simulate"),
        ("--full-at", given.full_at, given.simulate or None, "--simulate"),
        ("--plot", given.plot, given.scale, "--scale"),
    ):
        if value is not None and needed is None:
            raise ConfigError(f"{option}: goes with {name}")

    if given.devices is not None and given.scale is not None:
        raise ConfigError("--devices: goes without --scale, which says the devices of each row")

    if given.plot is not None:
        require_file("--plot", given.plot)


def _balance(
    config: Config,
    rates: str,
    devices: int | None,
    mean: float | None,
    *,
    option: str = "--devices",
    fewest: int | None = None,
) -> "Balance":
    """Returns the best workers of so many devices, or what those of the config do. The batch is the
    config's, or where it is that for the ``fewest`` devices, as many trajectories a device.
    """
    from eopd.planning.balance import (
        balance,
        batch_of,
        best_counts,
        counts_of,
        devices_of,
        stages_of,
    )
    from eopd.planning.units import read_rates

    stages = stages_of(config, read_rates("--rates", rates))
    counts = counts_of(config) if devices is None else best_counts(stages, devices, option)
    number = devices or devices_of(stages, counts)
    batch = batch_of(config, number, fewest or number)
    tokens = batch * (mean or config.rollout.max_response_tokens)
    return balance(stages, counts, devices=number, batch_tokens=tokens)


def _simulated(
    config: Config, given: _Given, balanced: "Balance", hardware: "Hardware"
) -> "list[Simulated]":
    """Simulates what was balanced, or each number of devices of ``--scale``, and draws that where it
    is wanted.
    """
    from eopd.planning.lengths import Lengths
    from eopd.planning.picture import draw
    from eopd.planning.simulate import simulate_each
    from eopd.planning.units import read_rates, read_scale
    from eopd.planning.workers import Work

    assert given.rates is not None  # else _check has refused it
    most = config.rollout.max_response_tokens
    mean = given.response_tokens or most
    if mean > most:
        raise ConfigError(
            f"--response-tokens {mean:g}: is above rollout.max_response_tokens ({most})"
        )

    if given.scale is None:
        balances = [balanced]
    else:
        sizes = read_scale("--scale", given.scale)
        balances = [
            _balance(config, given.rates, size, mean, option="--scale", fewest=sizes[0])
            for size in sizes
        ]

    work = Work(
        rates=read_rates("--rates", given.rates),
        lengths=Lengths(mean, 1.0 if given.sigma is None else given.sigma, most),
        publish_s=given.publish_s or 0.0,
        full_at=given.full_at,
    )
    rows = simulate_each(config, work, balances, hardware)
    if given.plot is not None:
        given.plot.write_text(draw(rows), encoding="utf-8")

    return rows


def _lack_of_gpus(config: Config, hardware: "Hardware") -> str | None:
    """Returns why the GPUs of all machines do not hold every actor, or None."""
    from eopd.runtime.placement import Capacity, Node, lack_of
    from eopd.runtime.placement import plan as placed

    if hardware.gpus_per_node is None:
        return None

    here = Capacity(cpus=_ANY_CPUS, gpus=hardware.gpus_per_node)
    return lack_of(placed(config), [Node(total=here, free=here)] * hardware.nodes)
