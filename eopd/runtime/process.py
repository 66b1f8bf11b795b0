"""A worker process cleans the environment that it was started in.

An actor inherits the environment of its node: of a pod, a batch job, or the shell that ``eopd`` was
called from. Some variables are meant for other programs and break the libraries of a run. They are
removed here, in the process itself and before these libraries are imported: Ray's own ``env_vars``
can set a variable, and cannot remove one.

Left alone are variables by which a user tunes a library on purpose, such as
``VLLM_ATTENTION_BACKEND`` or ``NCCL_DEBUG``.
"""

import os
import pwd
import re
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Final

# Where vLLM listens: engines that share a machine would all try the same port (0.32.0,
# ``get_open_port``).
LISTENS: Final = ("VLLM_HOST_IP", "VLLM_PORT")

# Where threads of OpenMP are pinned: roles that share a machine would all be pinned to the same
# cores.
PINS: Final = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")

# Where ``getpass.getuser`` looks for the user's name before the password file.
NAMES: Final = ("LOGNAME", "USER", "LNAME", "USERNAME")

# vLLM's sockets are named by a UUID below this directory, and the kernel takes 107 bytes (0.32.0).
SOCKETS: Final = "VLLM_RPC_BASE_PATH"
LONGEST_SOCKETS: Final = 107 - len("/xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
SHORT: Final = ("/tmp", "/var/tmp", "/dev/shm")

_URL = re.compile(r"(tcp|udp|sctp)://")
_LINK = r"_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"


def clean_environment(environ: MutableMapping[str, str]) -> None:
    """Cleans the environment of a worker process, in place; to be called before any heavy library is
    imported.

    * Kubernetes describes every Service in variables that begin with its name. Those of one called
      ``vllm`` or ``master`` read like options (``VLLM_PORT=tcp://10.0.0.1:8000``), so all are
      dropped but Kubernetes' own.
    * ``LISTENS`` and ``PINS`` are dropped.
    * A home directory that takes no files, or none at all, is replaced by one below ``TMPDIR``:
      libraries keep caches and settings there. A user without an entry in the password file gets a
      name, for the same libraries.
    * vLLM's sockets move to a short directory where ``TMPDIR`` is too long for them.
    """
    for name in (*service_links(environ), *LISTENS, *PINS):
        environ.pop(name, None)

    home = _home(environ)
    environ["HOME"] = str(home if home is not None and takes_files(home) else _make_home())
    if not any(environ.get(name) for name in NAMES) and _entry() is None:
        environ["USER"] = str(os.getuid())

    sockets = environ.get(SOCKETS) or tempfile.gettempdir()
    if len(os.fsencode(sockets)) > LONGEST_SOCKETS:
        environ[SOCKETS] = next((short for short in SHORT if takes_files(Path(short))), sockets)


def service_links(environ: Mapping[str, str]) -> list[str]:
    """Returns the variables by which Kubernetes describes Services, without those of its own.

    ``VLLM_PORT=tcp://10.0.0.1:8000`` makes ``VLLM`` a Service, and so do ``VLLM_SERVICE_HOST`` and
    ``VLLM_SERVICE_PORT`` together; then ``VLLM_PORT_8000_TCP_ADDR`` is one of its variables, too.
    """
    services = set()
    for name in environ:
        if name.endswith("_PORT") and _URL.match(environ[name]):
            services.add(name.removesuffix("_PORT"))

        service = name.removesuffix("_SERVICE_HOST")
        if service != name and f"{service}_SERVICE_PORT" in environ:
            services.add(service)

    links = [re.compile(re.escape(service) + _LINK) for service in services - {"KUBERNETES"}]
    return [name for name in environ if any(link.fullmatch(name) for link in links)]


def takes_files(directory: Path) -> bool:
    """Tells whether a file can be written in a directory now."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"1")
    except OSError:
        return False

    return True


def _home(environ: Mapping[str, str]) -> Path | None:
    """Returns the home directory, or None where there is no absolute one."""
    entry = _entry()
    home = environ.get("HOME") or (entry.pw_dir if entry else "")
    return Path(home) if os.path.isabs(home) else None


def _make_home() -> Path:
    """Makes a directory of this user alone: the same one every time, unless another user has it."""
    home = Path(tempfile.gettempdir(), f"eopd-home-{os.getuid()}")
    with suppress(FileExistsError):
        home.mkdir(mode=0o700)

    entry = home.lstat()
    is_ours = stat.S_ISDIR(entry.st_mode) and entry.st_uid == os.getuid()
    return home if is_ours else Path(tempfile.mkdtemp(prefix="eopd-home-"))


def _entry() -> pwd.struct_passwd | None:
    """Returns the user's entry in the password file, or None."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None
