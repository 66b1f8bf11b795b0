"""``eopd plan`` says what a run needs of each device, and whether it fits, before anything starts."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.cli.commands import ConfigFile, Overrides
from eopd.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from eopd.planning.balance import Balance
    from eopd.planning.needs import Hardware

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
_Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]


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
    as_json: _Json = False,
) -> None:
    """Reckon what a run needs of each device, whether it fits, and what to change where it does not,
    from the config and its models' config.json alone. Nothing starts.
    """
    resolved = load_config(config, overrides or [])
    if rates is None and (devices is not None or response_tokens is not None):
        option = "--devices" if devices is not None else "--response-tokens"
        raise ConfigError(f"{option}: goes with --rates, which `eopd profile CONFIG` measures")

    from eopd.planning.needs import Hardware
    from eopd.planning.plan import plan_run, read_models
    from eopd.planning.show import as_record, print_plan
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

    if as_json:
        record = as_record(planned, balanced) | {"lack_of_gpus": lack}
        typer.echo(json.dumps(record, allow_nan=False))
        return

    print_plan(planned, balanced, resolved)
    if lack:
        typer.echo(f"There is no room for it on {nodes} x {gpus_per_node} GPUs: {lack}.")


def _balance(config: Config, rates: str, devices: int | None, mean: float | None) -> "Balance":
    """Returns the best workers of so many devices, or what those of the config do."""
    from eopd.planning.balance import balance, best_counts, counts_of, devices_of, stages_of
    from eopd.planning.units import read_rates

    stages = stages_of(config, read_rates("--rates", rates))
    counts = counts_of(config) if devices is None else best_counts(stages, devices)
    tokens = config.batch_trajectories * (mean or config.rollout.max_response_tokens)
    number = devices or devices_of(stages, counts)
    return balance(stages, counts, devices=number, batch_tokens=tokens)


def _lack_of_gpus(config: Config, hardware: "Hardware") -> str | None:
    """Returns why the GPUs of all machines do not hold every actor, or None."""
    from eopd.runtime.placement import Capacity, Node, require_capacity
    from eopd.runtime.placement import plan as placed

    if hardware.gpus_per_node is None:
        return None

    here = Capacity(cpus=_ANY_CPUS, gpus=hardware.gpus_per_node)
    try:
        require_capacity(placed(config), [Node(total=here, free=here)] * hardware.nodes)
    except ConfigError as error:
        return str(error)

    return None
