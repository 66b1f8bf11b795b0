"""Machines of a cluster, imitated on this one: each has an address, a name, processes, shared memory and
a Ray node of its own. A bridge joins them, from which each can be cut off.

    bridge ─┬─ link 1 ── eth0 10.203.0.1, the head of Ray
            ├─ link 2 ── eth0 10.203.0.2
            └─ link 3 ── eth0 10.203.0.3
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
from program import ROOT, Program

NETWORK, PORT = "10.203.0", 6379
RAY = Path(sys.executable).with_name("ray")
NAMESPACES = ("--net", "--mount", "--uts", "--pid")
ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")
HOLDS = ("--fork", "--mount-proc", "--kill-child", "sleep", "infinity")
TRY = "ip link add a type bridge && ip link add b type veth && mount -t tmpfs tmpfs /dev/shm"
# Ray gives a node up that has not answered for some seconds; by itself it has more patience.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def why_not() -> str | None:
    """Why machines cannot be imitated here, or None."""
    if shutil.which("ip") is None:
        return "Debian's iproute2 is not installed"

    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _network(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:  # it has ended
        return None


class Machine:
    """A machine on a bridge. It ends with the process that began its namespaces."""

    def __init__(
        self, bridge: str, number: int, folder: Path, env: dict[str, str], options: Sequence[str]
    ) -> None:
        self.address = f"{NETWORK}.{number}"
        self._env = env
        self._options = options  # of its Ray node
        self._starts = 0
        self._link = f"{bridge}-{number}"
        self._log = folder / f"ray-{number}.log"
        self._holder = subprocess.Popen([*ENDS_WITH_US, "unshare", *NAMESPACES, *HOLDS])
        while not (children := psutil.Process(self._holder.pid).children()):
            time.sleep(0.01)

        self._first = children[0].pid
        self._namespace = _network(self._first)
        peer = ("peer", "name", "eth0", "netns", str(self._first))
        _ip("link", "add", self._link, "type", "veth", *peer)
        _ip("link", "set", self._link, "master", bridge, "up")

        # as Debian's installer writes it: the name of a machine leads to itself alone
        name, hosts = f"machine-{number}", folder / f"hosts-{number}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        steps = (
            "ip link set lo up",
            "ip link set eth0 up",
            f"ip address add {self.address}/24 dev eth0",
            f"echo {name} > /proc/sys/kernel/hostname",
            f"mount --bind {hosts} /etc/hosts",
            "mount -t tmpfs tmpfs /dev/shm",
            f"mount -t tmpfs tmpfs {folder}",
        )
        subprocess.run([*self.inside, "sh", "-c", " && ".join(steps)], check=True)

    @property
    def inside(self) -> tuple[str, ...]:
        """What begins a command that runs on this machine."""
        return ("nsenter", f"--target={self._first}", *NAMESPACES, f"--wdns={ROOT}")

    def holds(self, pid: int) -> bool:
        """Whether a process runs on this machine."""
        return _network(pid) == self._namespace

    def start_node(self) -> None:
        """Starts its Ray node, and waits until it is up. Ray gives up after 30 s (2.60,
        ``_private/node.py``), which are few beside other tests: then it is started again.
        """
        while not self._node_starts():
            said = self._log.read_text()
            assert said.count("timed out during startup") < 3, said
            assert "timed out during startup" in said, said
            subprocess.run([*self.inside, RAY, "stop", "--force"], env=self._env, check=True)

        self._starts += 1

    def _node_starts(self) -> bool:
        """Starts its Ray node; returns whether that is up, and not ended."""
        command = [*self.inside, RAY, "start", "--block", f"--node-ip-address={self.address}"]
        with self._log.open("ab") as log:
            self._node = subprocess.Popen(
                [*command, *self._options], env=self._env, stdout=log, stderr=log
            )

        deadline = time.monotonic() + 90
        while self._log.read_text().count("Ray runtime started") == self._starts:
            if self._node.poll() is not None:
                return False

            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

        return True

    def node_ended(self) -> None:
        """Waits until its Ray node has ended by itself."""
        self._node.wait(timeout=120)

    def cut_off(self) -> None:
        _ip("link", "set", self._link, "down")

    def join(self) -> None:
        _ip("link", "set", self._link, "up")

    @property
    def received(self) -> int:
        """The bytes that the bridge has sent to it."""
        return int(Path(f"/sys/class/net/{self._link}/statistics/tx_bytes").read_text())

    def close(self) -> None:
        """Ends whatever runs on it; its files go with it. Its network would stay while there is a
        connection that nobody closed.
        """
        self._holder.kill()
        self._holder.wait()
        subprocess.run(["ip", "link", "delete", self._link], stderr=subprocess.DEVNULL)


@contextmanager
def cluster(
    program: Program, nodes: Sequence[tuple[int, str]]
) -> Iterator[tuple[Program, list[Machine]]]:
    """Machines of so many CPUs and with these labels, and a Ray over all of them. The first one is the
    head, where the program runs.
    """
    name = f"eopd{secrets.token_hex(3)}"
    folder = Path("/tmp") / name  # short, for Ray's sockets
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env = program.environment() | HEALTH | token
    head = ("--head", f"--port={PORT}", f"--temp-dir={folder}", "--include-dashboard=false")
    member = (f"--address={NETWORK}.1:{PORT}",)
    with ExitStack() as stack:
        folder.mkdir()
        stack.callback(shutil.rmtree, folder)
        _ip("link", "add", name, "type", "bridge")
        stack.callback(_ip, "link", "delete", name)
        _ip("link", "set", name, "up")
        machines = []
        for number, (cpus, labels) in enumerate(nodes, start=1):
            options = (
                f"--num-cpus={cpus}",
                f"--labels={labels}",
                *(head if number == 1 else member),
            )
            machines.append(Machine(name, number, folder, env, options))
            stack.callback(machines[-1].close)
            machines[-1].start_node()

        variables = (f"{key}={value}" for key, value in token.items())
        yield replace(program, inside=(*machines[0].inside, "env", *variables)), machines
