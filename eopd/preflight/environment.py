"""The machine around a run is checked before anything starts: by ``eopd check``, and by every command
that starts Ray.

In: the config and this process's environment. Out: one ``ConfigError``, with the key or the variable
and what to set instead. Left out: what only the cluster knows, such as how much of it is free
(``runtime/cluster.py``), and the environment of its other machines (``runtime/process.py``).
"""

import importlib.util
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from eopd.config import ClusterConfig, Config, ConfigError
from eopd.run.elsewhere import require_upload
from eopd.run.place import holds_rows, require_no_foreign_files, require_run_directory
from eopd.telemetry.discovery import require_discovery
from eopd.telemetry.prometheus import require_address

LOCAL: Final = "local"  # Ray is started here
PACKAGES: Final = (
    "datasets",
    "deepspeed",
    "httpx",
    "peft",
    "ray",
    "safetensors",
    "torch",
    "transformers",
)

# The longest of Ray's sockets (2.60), below the directory for temporary files; the kernel takes 107
# bytes.
RAY_SOCKET: Final = "/ray/session_2026-11-26_01-18-19_123456_1234567/sockets/plasma_store"
LONGEST_TEMPORARY: Final = 107 - len(RAY_SOCKET)
SOME_BYTES: Final = 1 << 16
_SETUP: Final = "in a checkout of eopd, make setup"

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):(\d{1,5})")


def require_environment(config: Config) -> None:
    """Checks all that needs no Ray: packages, temporary files, where the run writes and uploads,
    and where its metrics are served and announced.

    Raises:
        ConfigError: something is missing, taken, malformed, or cannot be written.
    """
    if is_local(config.cluster):
        require_local_ray()

    require_run_directory(config.run.path)
    require_no_foreign_files(config.run.path)
    if config.run.upload is not None:
        require_upload(config.run)

    if config.telemetry.port is not None:
        require_address(config.telemetry.host, config.telemetry.port)

    if config.telemetry.discovery is not None:
        require_discovery(config.telemetry.discovery)


def environment_notes(config: Config) -> Iterator[str]:
    """Yields what is no mistake and good to know."""
    path = config.run.path
    if holds_rows(path):
        yield (
            f"note: run.name: {path} holds a run already; `eopd train` takes it up with "
            "--resume only"
        )


def gpus_here() -> int:
    """Returns the number of NVIDIA GPUs of this machine, by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def is_local(config: ClusterConfig) -> bool:
    """Tells whether the run starts Ray on this machine, rather than join a cluster; raises as
    ``cluster_address`` does.
    """
    return cluster_address(config) == LOCAL


def cluster_address(config: ClusterConfig) -> str:
    """Returns where Ray is: ``HOST:PORT`` or ``auto`` for a cluster that runs, ``local`` to start it
    here.

    ``cluster.address`` comes before ``RAY_ADDRESS``. As for Ray, ``auto`` stands for the address of
    ``RAY_ADDRESS``, where that is set.

    Raises:
        ConfigError: the address is of another kind, or has no port; ``cluster.cpus`` is set beside
            it.
    """
    variable = os.environ.get("RAY_ADDRESS", "").strip()
    given = (config.address or "").strip()
    key, address = (
        ("cluster.address", given) if given not in ("", "auto") else ("RAY_ADDRESS", variable)
    )
    address = address or given or LOCAL
    if address == LOCAL:
        return address

    instead = (
        "a run joins a cluster by its HOST:PORT (Ray's port is 6379 unless `ray start` was "
        "told another), or by `auto` on one of its machines; leave it out to start Ray here"
    )
    if address.startswith(("http://", "https://")):
        raise ConfigError(f"{key}: {address} is the job server, for `eopd submit`; {instead}")

    if address.startswith("ray://"):
        raise ConfigError(
            f"{key}: {address} is for Ray Client, which cannot drive a run; {instead}"
        )

    if address != "auto":
        split_address(key, address, instead)

    if config.cpus is not None:
        raise ConfigError(
            f"cluster.cpus: {config.cpus:g} is for Ray started here; {address} has its own"
        )

    return address


def split_address(key: str, address: str, instead: str) -> tuple[str, int]:
    """Returns host and port of an address.

    Raises:
        ConfigError: it is no ``HOST:PORT``; the message ends with ``instead``.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ConfigError(f"{key}: {address} is no HOST:PORT; {instead}")

    return match[1].strip("[]"), int(match[2])


def require_local_ray() -> None:
    """Checks that Ray can be started here, with engines and learners.

    Raises:
        ConfigError: a package is missing, or the directory for temporary files cannot be used.
    """
    require_packages()
    require_temporary_files()


def require_packages() -> None:
    """Checks that every package that a worker imports is installed here.

    Raises:
        ConfigError: names those that are not, and what to install.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"{', '.join(missing)}: not installed for this Python; `make setup` in a "
            "checkout of eopd makes an environment that has all of them"
        )

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vllm: not installed for this Python; `make setup` in a checkout of eopd makes an "
            "environment that has it, for GPUs with LOCK=cluster/requirements-gpu.lock"
        )


def require_engine_build(gpus: float) -> None:
    """Checks in an actor, before it starts an engine, that the vLLM of its machine is built for what
    the actor asks for: for GPUs, or for CPUs. No build computes on both (vLLM 0.32.0,
    ``platforms/__init__.py``).

    Raises:
        ConfigError: it is the other one.
    """
    try:
        is_for_cpus = "cpu" in version("vllm")
    except PackageNotFoundError:  # the build for CPUs is a package of its own
        is_for_cpus = True

    if is_for_cpus != (gpus == 0):
        built, other, kind = ("CPUs", "GPUs", "gpu") if is_for_cpus else ("GPUs", "CPUs", "cpu")
        raise ConfigError(
            f"gpus is {gpus:g}, and vLLM on {socket.gethostname()} is built for {built}; {_SETUP} "
            f"LOCK=cluster/requirements-{kind}.lock makes an environment for {other}"
        )


def require_gpu(gpus: float) -> None:
    """Checks in a learner rank that torch sees the GPU that it asks for: it would compute on CPUs.

    Raises:
        ConfigError: it sees none.
    """
    import torch

    if gpus and not torch.cuda.is_available():
        raise ConfigError(
            f"gpus is {gpus:g}, and torch {torch.__version__} on {socket.gethostname()} sees no "
            "GPU: it is built for CPUs, or for a newer driver than that of nvidia-smi. "
            f"{_SETUP} LOCK=cluster/requirements-gpu.lock makes an environment for GPUs"
        )


def require_temporary_files() -> None:
    """Checks that ``TMPDIR`` and ``RAY_TMPDIR`` take files, and that the one that Ray uses is short
    enough for its sockets.

    Raises:
        ConfigError: names the variable and what to set.
    """
    names = [name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ] or ["TMPDIR"]
    directories = {name: os.environ.get(name, "/tmp") for name in names}
    for name, directory in directories.items():
        if not os.path.isabs(directory):
            raise ConfigError(
                f"{name}: {directory!r} is no absolute path; name a directory, or unset it for /tmp"
            )

        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(bytes(SOME_BYTES))
        except OSError as error:
            raise ConfigError(
                f"{name}: {directory} takes no files ({error.strerror}); name a directory that does"
            ) from None

    name, directory = next(iter(directories.items()))
    if (length := len(os.fsencode(directory.rstrip("/")))) > LONGEST_TEMPORARY:
        raise ConfigError(
            f"{name}: {directory} is too long for the sockets that Ray makes below it "
            f"({length} bytes of at most {LONGEST_TEMPORARY}); set RAY_TMPDIR to a shorter "
            "directory, for example RAY_TMPDIR=/tmp"
        )
