"""Where the runs of a sweep find room: on this machine, in a Ray that they share, or in a cluster that
others use too.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from eopd.config import Config, ConfigError
from eopd.preflight.environment import gpus_here, is_local
from eopd.run.grid import SweepRun
from eopd.runtime import cluster
from eopd.runtime.placement import Capacity, Node, lack_of, plan, require_capacity
from eopd.runtime.signals import ignored_by_children


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where the runs of a sweep find their resources: the machines, and what ``eopd train`` needs to
    get there.
    """

    nodes: Sequence[Node]
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()

    def has(self, configs: Sequence[Config]) -> bool:
        """Tells whether some runs fit side by side."""
        roles = [role for config in configs for role in plan(config)]
        return lack_of(roles, self.nodes) is None


Say = Callable[[str], None]
OpenRoom = Callable[[Sequence[SweepRun], int, Say], AbstractContextManager[Room]]


@contextmanager
def room_of(runs: Sequence[SweepRun], parallel: int, say: Say) -> Iterator[Room]:
    """Yields where the runs find room, once there is room for each that waits. A Ray that is started for
    them is held while the block runs; a cluster that others use too is left again, and what it loses
    meanwhile ends no sweep.

    Raises:
        ConfigError: one of them finds no room, also after ``cluster.wait_s``.
    """
    config = runs[0].config
    waiting = [run for run in runs if run.status == "waiting"]
    local = is_local(config.cluster)
    if local and parallel == 1:
        here = Capacity(cpus=config.cluster.cpus or os.cpu_count() or 1, gpus=gpus_here())
        room = Room(nodes=[Node(total=here, free=here)])
        for run in waiting:
            with named(run.name):
                require_capacity(plan(run.config), room.nodes)

        yield room
        return

    with ExitStack() as stack:
        with ignored_by_children():
            stack.enter_context(cluster.connect(config.cluster))

        for run in waiting:
            with named(run.name):
                cluster.require_room(plan(run.config), run.config.cluster, say)

        room = Room(nodes=cluster.nodes())
        if not local:
            stack.close()
            yield room
            return

        # the address of a Ray that ends with the sweep belongs into no config
        environment = {"RAY_ADDRESS": cluster.joined_address()}
        yield Room(
            nodes=room.nodes,
            environment=environment,
            options=("--set", "cluster.cpus=null"),
        )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Lets a mistake in the block begin with the name of a run."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{name}: {error}") from None
