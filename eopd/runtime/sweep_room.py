"""Where the runs of a sweep find room: on this machine, in a Ray that they share, or in a cluster that
others use too.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from eopd.config import Config, ConfigError
from eopd.preflight.environment import gpus_here, is_local
from eopd.runtime import cluster
from eopd.runtime.placement import Capacity, Node, lack_of, plan
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


OpenRoom = Callable[[Config, int], AbstractContextManager[Room]]


@contextmanager
def room_of(config: Config, parallel: int) -> Iterator[Room]:
    """Yields where the runs find room, and holds the Ray that they share while the block runs."""
    local = is_local(config.cluster)
    if local and parallel == 1:
        here = Capacity(cpus=config.cluster.cpus or os.cpu_count() or 1, gpus=gpus_here())
        yield Room(nodes=[Node(total=here, free=here)])
        return

    with ExitStack() as stack:
        with ignored_by_children():
            stack.enter_context(cluster.connect(config.cluster))

        nodes = cluster.nodes()
        if not local:
            yield Room(nodes=nodes)
            return

        # the address of a Ray that ends with the sweep belongs into no config
        environment = {"RAY_ADDRESS": cluster.joined_address()}
        yield Room(
            nodes=nodes,
            environment=environment,
            options=("--set", "cluster.cpus=null"),
        )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Lets a mistake in the block begin with the name of a run."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
