"""Joining and starting Ray: what goes wrong is one message, and what others hold is not free."""

import logging
import os
import signal
import socket
import time
from functools import partial

import pytest
from ray.exceptions import AuthenticationError

from eopd.config import ClusterConfig, ConfigError, UnavailableError
from eopd.run.lock import held, last_holder
from eopd.run.stopping import ask_to_stop
from eopd.runtime import cluster
from eopd.runtime.placement import RoleResources
from eopd.runtime.signals import ASK_TO_END, heed

WAIT = "RAY_gcs_server_port_wait_time_s"


class FakeRay:
    """Ray as far as ``cluster`` uses it; ``free`` are the answers to come, the last for good."""

    def __init__(self, failure: Exception | None = None, free: tuple[float, ...] = (2.0,)) -> None:
        self.failure, self.free = failure, list(free)
        self.asked: dict[str, object] = {}
        self.shutdowns = 0

    def init(self, **options: object) -> None:
        self.asked = options
        if self.failure is not None:
            raise self.failure

    def shutdown(self) -> None:
        self.shutdowns += 1

    def nodes(self):
        resources = {"CPU": 2.0, "node:1.2.3.4": 1.0}
        labels = {"pool": "new"}
        return [
            {"NodeID": "a", "Alive": True, "Resources": resources, "Labels": labels},
            {"NodeID": "b", "Alive": False, "Resources": resources, "Labels": labels},
        ]

    def available(self):
        free = self.free.pop(0) if len(self.free) > 1 else self.free[0]
        return {} if free < 0 else {"a": {"CPU": free}}


@pytest.fixture
def ray(monkeypatch):
    def install(*arguments, **options) -> FakeRay:
        fake = FakeRay(*arguments, **options)
        monkeypatch.setattr(cluster, "ray", fake)
        monkeypatch.setattr(cluster, "available_resources_per_node", fake.available)
        monkeypatch.setattr(cluster.logs, "silence", lambda: None)
        return fake

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", WAIT):
        monkeypatch.setenv(name, "")  # so that whatever is set meanwhile is taken back
        monkeypatch.delenv(name)

    return install


def version_mismatch() -> Exception:
    error = ConnectionError("Failed to connect to Ray cluster at 1.2.3.4:6379")
    error.__cause__ = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.59\n    Python: 3.11\n"
    )
    return error


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            version_mismatch(),
            "Version mismatch: The cluster was started with: Ray: 2.59 Python: 3.11",
        ),
        (
            AuthenticationError("Token authentication is enabled but no token"),
            "Token authentication is enabled but no t",
        ),
        (
            RuntimeError(
                "Failed to connect to GCS. Last connection error: Traceback (most recent\n"
            ),
            "Failed to connect to GCS.",
        ),
        (ValueError("not this"), "not this"),
        (RuntimeError("this node is not of the cluster"), "this node is not of the cluster"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line_and_is_left(ray, failure, reason):
    fake = ray(failure)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught, cluster.connect(ClusterConfig(address=address)):
            pytest.fail("it was joined")

    assert str(caught.value).startswith(
        f"cluster.address or RAY_ADDRESS: {address} cannot be joined: {reason}"
    )
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert os.environ[WAIT] == "1"
    assert fake.shutdowns == 1


def test_an_address_at_which_nobody_answers_is_not_waited_for(ray):
    fake = ray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    started = time.monotonic()

    for host, reason in (
        ("127.0.0.1", "Connection refused"),
        ("no.such.host.invalid", "Name or service not known"),
    ):
        told = rf"{host}:{port} cannot be joined: nobody answers there \({reason}\)"
        with (
            pytest.raises(UnavailableError, match=told),
            cluster.connect(ClusterConfig(address=f"{host}:{port}")),
        ):
            pytest.fail("it was joined")

    assert time.monotonic() - started < cluster.REACH_S
    assert fake.asked == {}


@pytest.mark.parametrize(
    "failure", [OSError("the disk is full"), Exception("The node timed out during startup.")]
)
def test_ray_that_does_not_start_here_is_one_line(ray, failure):
    ray(failure)
    told = f"^Ray cannot be started on this machine: {failure}$"
    with pytest.raises(ConfigError, match=told), cluster.connect(ClusterConfig()):
        pytest.fail("it was started")


def test_a_cluster_started_here_keeps_strangers_out_without_a_word(ray, monkeypatch, tmp_path):
    fake = ray()
    monkeypatch.setenv("HOME", str(tmp_path))

    with cluster.connect(ClusterConfig(cpus=3)):
        assert fake.asked["address"] == "local"
        assert fake.asked["num_cpus"] == 3
        assert "RAY_AUTH_TOKEN" not in os.environ  # Ray keeps one in the home directory
        assert not logging.getLogger(cluster.authentication_token_setup.__name__).isEnabledFor(
            logging.WARNING
        )

    assert fake.shutdowns == 1
    monkeypatch.setenv("HOME", "/proc/none")
    with cluster.connect(ClusterConfig()):
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with cluster.connect(ClusterConfig()):
        assert "RAY_AUTH_TOKEN" not in os.environ


LABELS = {"pool": "new"}
ROLES = [RoleResources(role="rollout", actors=1, cpus=1.5, gpus=0.0, env={}, labels=LABELS)]


def test_what_others_hold_is_not_free(ray, monkeypatch):
    ray(free=(0.5,))
    monkeypatch.setattr(cluster, "SETTLE_S", 0.1)

    with pytest.raises(
        UnavailableError,
        match=r"ask for 1.5 cpus \(rollout 1 x 1.5\); 0.5 of 2 are free \(1.5 are held",
    ):
        cluster.require_room(ROLES, ClusterConfig())


def test_what_an_ended_run_still_holds_is_waited_for(ray, monkeypatch):
    fake = ray(free=(-1.0, 0.5, 2.0))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    cluster.require_room(ROLES, ClusterConfig())
    assert fake.free == [2.0]


def test_what_no_wait_can_make_is_told_at_once(ray, monkeypatch):
    ray(free=(0.0,))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: pytest.fail("it waits"))
    roles = [RoleResources(role="rollout", actors=3, cpus=1.0, gpus=0.0, env={})]
    with pytest.raises(
        ConfigError, match=r"ask for 3 cpus \(rollout 3 x 1\); the cluster has 2$"
    ) as caught:
        cluster.require_room(roles, ClusterConfig())

    assert caught.type is ConfigError


@pytest.mark.parametrize(
    ("address", "waits"), [("1.2.3.4:6379", ["group", 1.0, 1.0, "removed"]), (None, [])]
)
def test_room_is_waited_for_in_a_cluster_that_others_use_too(ray, monkeypatch, address, waits):
    """Waits are short, so that a signal is heard between two; a Ray of one's own never grows."""
    fake = ray(free=(0.5,))
    monkeypatch.setattr(cluster, "SETTLE_S", 0.0)
    asked = []

    class Group:
        def wait(self, seconds):
            asked.append(seconds)
            if len(asked) == 3:
                fake.free = [2.0]

            return len(asked) == 3

    def group(bundles, bundle_label_selector):
        assert (bundles, bundle_label_selector) == ([{"CPU": 1.5}], [{"pool": "new"}])
        asked.append("group")
        return Group()

    monkeypatch.setattr(cluster, "placement_group", group)
    monkeypatch.setattr(cluster, "remove_placement_group", lambda group: asked.append("removed"))
    config = ClusterConfig(address=address, wait_s=60)
    said = []
    if address is None:
        with pytest.raises(ConfigError, match=r"0\.5 of 2 are free"):
            cluster.require_room(ROLES, config, said.append)
    else:
        cluster.require_room(ROLES, config, said.append)

    assert asked == waits
    assert len(said) == bool(waits)


def test_room_that_somebody_else_was_quicker_to_take_is_waited_for_again(ray, monkeypatch):
    fake = ray(free=(0.5,))
    monkeypatch.setattr(cluster, "SETTLE_S", 0.0)
    waits = iter([0.5, 0.5, 2.0])

    def wait(roles, until, look):
        fake.free = [next(waits)]

    monkeypatch.setattr(cluster, "_wait_for_room", wait)
    cluster.require_room(ROLES, ClusterConfig(address="1.2.3.4:6379", wait_s=60), lambda text: None)
    assert list(waits) == []


@pytest.mark.parametrize("number", ASK_TO_END)
@pytest.mark.parametrize("wait_s", [0, 60])
def test_a_signal_ends_the_wait_for_room_and_what_was_asked_for_is_given_back(
    ray, monkeypatch, number, wait_s
):
    ray(free=(0.5,))
    given_back = []

    class Group:
        def wait(self, seconds):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(cluster, "SETTLE_S", 0.0 if wait_s else 60.0)
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: os.kill(os.getpid(), number))
    monkeypatch.setattr(cluster, "placement_group", lambda *asked, **options: Group())
    monkeypatch.setattr(cluster, "remove_placement_group", given_back.append)
    before = signal.getsignal(number)
    config = ClusterConfig(address="1.2.3.4:6379", wait_s=wait_s)
    with pytest.raises(KeyboardInterrupt):
        cluster.require_room(ROLES, config, lambda text: None)

    assert len(given_back) == bool(wait_s)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("now", [False, True])
def test_a_request_to_stop_ends_the_wait_for_room(ray, monkeypatch, tmp_path, now):
    ray(free=(0.5,))
    directory = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt), held(directory):
        ask_to_stop(directory, last_holder(directory), now=now)
        config = ClusterConfig(address="1.2.3.4:6379", wait_s=60)
        cluster.require_room(ROLES, config, look=partial(heed, directory))

    assert not directory.exists()
