"""Ray itself: start it here or join a cluster, and find out what it has."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from eopd.config import ClusterConfig, ConfigError
from eopd.runtime import logs
from eopd.runtime.placement import Capacity


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Join ``config.address`` or ``RAY_ADDRESS``, or else start Ray on this machine; leave it on the way out.

    Under ``ray job submit`` the address is set by the job server, and so is the working directory: neither is set again
    here.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if config.cpus is not None and address != "local":
        raise ConfigError(f"cluster.cpus: {config.cpus:g} is for Ray started here; {address} has its own")
    local = {"num_cpus": config.cpus, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.WARNING, **local)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cluster.address: {address} cannot be joined: {error}") from None
    logs.silence()
    try:
        yield
    finally:
        ray.shutdown()


def capacity() -> tuple[Capacity, Capacity]:
    """What the whole cluster has, and what its largest node has: an actor lives on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total, largest = (
        {kind: pick(node.get(ray_name, 0.0) for node in nodes) for kind, ray_name in (("cpus", "CPU"), ("gpus", "GPU"))}
        for pick in (sum, max)
    )
    return Capacity(**total), Capacity(**largest)


def object_store_bytes() -> float:
    """What all nodes' object stores hold now."""
    name = "object_store_memory"
    return float(ray.cluster_resources().get(name, 0.0) - ray.available_resources().get(name, 0.0))


def log_directory() -> str:
    """Where Ray keeps what actors wrote that belong to no run."""
    return f"{ray.get_runtime_context().get_session_name()}/logs, below Ray's folder for temporary files"


def is_job_copy(directory: Path) -> bool:
    """Whether a directory lies in the copy of a working directory that ``ray job submit`` made; it goes away with the
    job.
    """
    return "working_dir_files" in directory.parts
