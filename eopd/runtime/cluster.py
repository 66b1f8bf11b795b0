"""Ray itself is started here, or a cluster joined, and what is free there is found out.

The internals of Ray that are used were checked against 2.60: ``available_resources_per_node``; how
a cluster that is started here gets its token (``authentication_token_setup``); how often a driver
tries to join (``Node._init_gcs_client``); that an actor may be placed elsewhere than on its node
(``_spill_on_unavailable``).
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil
import ray
from ray._private.authentication import authentication_token_setup
from ray._private.state import available_resources_per_node
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eopd.config import ClusterConfig, ConfigError, UnavailableError
from eopd.preflight.environment import LOCAL, cluster_address, require_local_ray, split_address
from eopd.run.record import Row
from eopd.runtime import logs
from eopd.runtime.placement import (
    Capacity,
    Node,
    Places,
    RoleResources,
    choose_nodes,
    lack_of,
    require_capacity,
)
from eopd.runtime.process import takes_files
from eopd.runtime.signals import interrupting

REACH_S: Final = 5.0  # a cluster that runs answers at once
_MAKE: Final = "accelerator_type:"  # begins the resource that Ray makes of a GPU's make
SETTLE_S: Final = 5.0  # what an ended run held is free again within seconds
LOOK_S: Final = 1.0


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Joins ``config.address`` or ``RAY_ADDRESS``, or else starts Ray on this machine, for the time
    of the block.

    In a job the job server sets the address and the working directory; neither is
    set again here.

    Raises:
        ConfigError: the cluster cannot be joined, or Ray cannot be started here.
        UnavailableError: nobody answers there.
    """
    address = cluster_address(config)
    # it explains how to switch authentication off, which nobody asked
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    # the error of a call that was under way when the run ended: nobody waits for it any more
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    local: dict[str, object] = {}
    if address == LOCAL:
        require_local_ray()
        _make_token()
        local = {"num_cpus": config.cpus, "include_dashboard": False}
    else:
        _require_answer(address)
        # one attempt, of 40 s, instead of twenty
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")

    try:
        try:
            ray.init(address=address, logging_level=logging.WARNING, **local)
        except Exception as error:  # noqa: BLE001 - Ray raises bare ones where its processes are slow
            raise ConfigError(f"{_cannot(address)}: {_reason(error)}") from None

        logs.silence()
        yield
    finally:
        ray.shutdown()


def require_room(
    roles: Sequence[RoleResources],
    config: ClusterConfig,
    say: Callable[[str], None] = logs.logger.info,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Compares what the roles ask for with what is free in the cluster. A signal that asks to end, or
    whatever ``look`` raises, ends it at once.

    Args:
        roles: what is to be started.
        config: of the cluster, which says how long to wait for room, if there is none now.
        say: is told what is waited for.
        look: is called every second, or oftener.

    Raises:
        ConfigError: the cluster is too small for all of them, also after ``wait_s``.
        UnavailableError: there is no room for them now, also after ``wait_s`` and ``SETTLE_S``.
        KeyboardInterrupt: a signal came.
    """
    wait_s = 0.0 if cluster_address(config) == LOCAL else config.wait_s
    with interrupting():
        _require_room(roles, wait_s, say, look)


def _require_room(
    roles: Sequence[RoleResources],
    wait_s: float,
    say: Callable[[str], None],
    look: Callable[[], None],
) -> None:
    until, is_told = time.monotonic() + wait_s, False
    while True:
        try:
            return _settle(roles, look)
        except ConfigError as error:  # also where somebody else was quicker
            if time.monotonic() > until:
                raise

            if not is_told:
                say(f"waiting for room, for up to {wait_s:g} s (cluster.wait_s): {error}")
                is_told = True

        _wait_for_room(roles, until, look)


def _settle(roles: Sequence[RoleResources], look: Callable[[], None]) -> None:
    """Raises ConfigError where there is no room, and UnavailableError where there is none within
    ``SETTLE_S``.
    """
    idle = [replace(node, free=node.total) for node in nodes()]
    require_capacity(roles, idle)
    until = time.monotonic() + SETTLE_S

    while True:
        try:
            return require_capacity(roles, nodes())
        except ConfigError as error:
            if time.monotonic() > until:
                raise UnavailableError(str(error)) from None

        look()
        time.sleep(0.25)


def _wait_for_room(roles: Sequence[RoleResources], until: float, look: Callable[[], None]) -> None:
    """Waits until Ray could start everybody at the same time: for that long a placement group of all
    actors is asked for, which an autoscaler takes as demand. It is given back at once.
    """
    actors = [role for role in roles for _ in range(role.actors) if role.cpus or role.gpus]
    asked = ({"CPU": actor.cpus, "GPU": actor.gpus} for actor in actors)
    group = placement_group(
        [{name: number for name, number in bundle.items() if number} for bundle in asked],
        bundle_label_selector=[dict(actor.labels) for actor in actors],
    )
    try:
        # signals are heard between two waits
        while time.monotonic() < until and not group.wait(LOOK_S):
            look()
    finally:
        remove_placement_group(group)


def has_room(role: RoleResources) -> bool:
    """Tells whether the cluster has room for all actors of a role now."""
    return lack_of([role], nodes()) is None


def find_places(roles: Sequence[RoleResources], *, spread: bool = False) -> Places:
    """Returns where the actors are to be started, in a cluster of several machines. None have a place
    where somebody has taken room since ``require_room``; ``spread`` is that of ``choose_nodes``.
    """
    here = nodes()
    try:
        return choose_nodes(roles, here, spread=spread) if len(here) > 1 else {}
    except ConfigError:
        return {}


def place_on(node: str | None) -> NodeAffinitySchedulingStrategy | None:
    """Returns how Ray places an actor that is to start on a node: elsewhere, where the node is gone or
    has no room any more; None stands for Ray's own choice.
    """
    if node is None:
        return None

    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)


def joined_address() -> str:
    """Returns the ``HOST:PORT`` of the cluster that this process has joined or started."""
    return str(ray.get_runtime_context().gcs_address)


def machines() -> dict[str, object]:
    """Returns how many machines, CPUs and GPUs the cluster has, and of which make its GPUs are."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    makes = sorted({name for one in resources for name in one if name.startswith(_MAKE)})
    return {
        "nodes": len(resources),
        "cpus": sum(one.get("CPU", 0.0) for one in resources),
        "gpus": sum(one.get("GPU", 0.0) for one in resources),
        "gpu_model": ", ".join(make.removeprefix(_MAKE) for make in makes),
    }


def nodes() -> list[Node]:
    """Returns the machines of the cluster; one that has not reported yet has nothing free."""
    free = available_resources_per_node()
    return [
        Node(
            total=_capacity(node["Resources"]),
            free=_capacity(free.get(node["NodeID"], {})),
            id=node["NodeID"],
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _capacity(resources: dict[str, float]) -> Capacity:
    return Capacity(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


def _require_answer(address: str) -> None:
    """Checks that a server listens at ``HOST:PORT``; ``auto`` stands for a cluster on this machine."""
    if address == "auto":
        return

    try:
        socket.create_connection(
            split_address("cluster.address", address, ""), timeout=REACH_S
        ).close()
    except (OSError, UnicodeError) as error:
        raise UnavailableError(
            f"{_cannot(address)}: nobody answers there ({getattr(error, 'strerror', '') or error})"
        ) from None


def _cannot(address: str) -> str:
    if address == LOCAL:
        return "Ray cannot be started on this machine"

    return f"cluster.address or RAY_ADDRESS: {address} cannot be joined"


def _reason(error: Exception) -> str:
    """Returns Ray's reason in one line, without the traceback it may hold. The cause of an error
    says more than the error.
    """
    text = str(error.__cause__ or error).partition("Last connection error: Traceback")[0]
    return " ".join(text.split())


def _make_token() -> None:
    """Gives a cluster that is started here a token, which keeps other users out.

    Ray makes one by itself in the home directory. Where that cannot be written, the token is in the
    environment of this cluster's processes.
    """
    if os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return

    home = os.environ.get("HOME", "")
    if not os.path.isabs(home) or not takes_files(Path(home)):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def memory_row() -> Row:
    """Returns the metrics of memory: of all nodes' object stores, and of this process."""
    store = "object_store_memory"
    total, free = ray.cluster_resources(), ray.available_resources()
    return {
        "eopd_object_store_bytes": float(total.get(store, 0.0) - free.get(store, 0.0)),
        "eopd_driver_memory_bytes": resident_bytes(),
    }


def resident_bytes() -> float:
    """Returns the bytes of memory that this process holds."""
    return float(psutil.Process().memory_info().rss)


def log_directory() -> str:
    """Returns where Ray keeps the logs of actors that belong to no run."""
    return (
        f"{ray.get_runtime_context().get_session_name()}/logs, below Ray's folder for "
        "temporary files"
    )


def is_job_copy(directory: Path) -> bool:
    """Tells whether a directory lies in the copy of a working directory that ``ray job submit``
    or ``eopd submit`` made; that copy is removed with the job.
    """
    return "working_dir_files" in directory.parts
