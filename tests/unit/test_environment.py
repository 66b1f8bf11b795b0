"""What `eopd check` finds on the machine before anything starts: addresses, directories,
ports, packages.
"""

import importlib.util
import io
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import fakes
import pytest
import torch

from eopd.config import ClusterConfig, ConfigError, load_config
from eopd.preflight import environment
from eopd.preflight.environment import (
    LONGEST_TEMPORARY,
    cluster_address,
    environment_notes,
    require_engine_build,
    require_environment,
    require_gpu,
    require_local_ray,
)
from eopd.run.place import require_run_directory
from eopd.telemetry.prometheus import PrometheusSink, require_address


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A machine on which nothing is set."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path):
    path = fakes.write_config(
        tmp_path,
        batches=1,
        student="{model: /m}",
        teachers="[{model: /m}]",
        prompts="{data: a.jsonl, held_out: a.jsonl}",
        flow="{batch_prompts: 1}",
    )
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(
    ("given", "variable", "found"),
    [
        (None, None, "local"),
        (None, " ", "local"),
        ("local", "10.0.0.1:6379", "local"),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("[fd00::1]:6379", None, "[fd00::1]:6379"),
        ("auto", None, "auto"),
        ("auto", "head:6379", "head:6379"),
    ],
)
def test_the_address_comes_from_config_or_environment(given, variable, found, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)

    assert cluster_address(ClusterConfig(address=given)) == found


@pytest.mark.parametrize(
    ("given", "variable", "message"),
    [
        (
            None,
            "http://127.0.0.1:8265",
            "RAY_ADDRESS: http://127.0.0.1:8265 is the job server, for `eopd submit`; ",
        ),
        ("https://head:8265", None, "cluster.address: https://head:8265 is the job server"),
        ("auto", "http://127.0.0.1:8265", "RAY_ADDRESS: http://127.0.0.1:8265 is the job server"),
        (
            "ray://head:10001",
            None,
            "cluster.address: ray://head:10001 is for Ray Client, which cannot drive a run; ",
        ),
        *(
            (
                bad,
                None,
                f"cluster.address: {bad} is no HOST:PORT; a run joins a cluster by its HOST:PORT",
            )
            for bad in (
                "1.2.3.4",
                "head:",
                ":6379",
                "head:no",
                "head:0",
                "head:65536",
                "redis://head:1",
                "a b:1",
                "::1:2",
            )
        ),
    ],
)
def test_an_address_of_another_kind_is_told_what_to_write(given, variable, message, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)

    with pytest.raises(ConfigError) as caught:
        cluster_address(ClusterConfig(address=given))

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_cluster_that_is_joined_has_its_own_cpus():
    assert cluster_address(ClusterConfig(cpus=3)) == "local"
    with pytest.raises(
        ConfigError, match=r"cluster.cpus: 3 is for Ray started here; head:6379 has its own"
    ):
        cluster_address(ClusterConfig(address="head:6379", cpus=3))


def test_a_directory_for_temporary_files_must_take_files(monkeypatch, tmp_path):
    require_local_ray()
    (tmp_path / "file").touch()

    for name in ("TMPDIR", "RAY_TMPDIR"):
        for bad, why in (
            ("/proc", "No such file"),
            (f"{tmp_path}/no", "No such file"),
            (f"{tmp_path}/file", "Not a directory"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, bad)
                with pytest.raises(ConfigError, match=rf"^{name}: {bad} takes no files \({why}"):
                    require_local_ray()

        for bad in ("", "tmp"):
            with monkeypatch.context() as patch:
                patch.setenv(name, bad)
                with pytest.raises(ConfigError, match=rf"^{name}: '{bad}' is no absolute path"):
                    require_local_ray()


def test_ray_s_sockets_must_fit_below_the_directory(monkeypatch):
    def of_length(length: int) -> str:
        return "/" + "d" * (length - 1)

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", lambda dir: io.BytesIO())
    monkeypatch.setenv("TMPDIR", of_length(LONGEST_TEMPORARY))
    require_local_ray()
    monkeypatch.setenv("TMPDIR", of_length(LONGEST_TEMPORARY) + "/")
    require_local_ray()
    monkeypatch.setenv("TMPDIR", of_length(LONGEST_TEMPORARY + 1))
    sizes = f"{LONGEST_TEMPORARY + 1} bytes of at most {LONGEST_TEMPORARY}"
    too_long = rf"^TMPDIR: .* \({sizes}\); set RAY_TMPDIR to a"
    with pytest.raises(ConfigError, match=too_long):
        require_local_ray()

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    require_local_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/" + "ä" * (LONGEST_TEMPORARY // 2 + 1))
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: "):
        require_local_ray()


def test_the_longest_socket_that_fits_is_one_the_kernel_takes(tmp_path, monkeypatch):
    """One byte more than the limit is refused by the kernel too."""
    name = "d" * LONGEST_TEMPORARY + environment.RAY_SOCKET.replace("/", "_")
    monkeypatch.chdir(tmp_path)

    with socket.socket(socket.AF_UNIX) as fits, socket.socket(socket.AF_UNIX) as one_more:
        fits.bind(name)
        with pytest.raises(OSError, match="too long"):
            one_more.bind(name + "x")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            {"vllm"},
            r"^vllm: not installed for this Python; "
            r"`make setup` in a checkout of eopd makes an environment that has it",
        ),
        (
            {"deepspeed", "ray"},
            r"^deepspeed, ray: not installed for this Python; "
            r"`make setup` in a checkout of eopd makes an environment that has all",
        ),
    ],
)
def test_packages_that_are_not_installed_are_named(missing, message, monkeypatch, config):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in missing else find(name),
    )
    with pytest.raises(ConfigError, match=message):
        require_environment(config())

    require_environment(config("cluster.address=head:6379"))  # there the workers' machines count


@pytest.mark.parametrize(
    ("directory", "reason"),
    [
        ("/proc/nope", "cannot be made (No such file or directory)"),
        ("/etc/hostname", "cannot be made (Not a directory)"),
        ("/etc/hostname/below", "cannot be made (Not a directory)"),
        ("{tmp}/dangling", "cannot be made (No such file or directory)"),
    ],
)
def test_a_run_directory_that_cannot_be_made_is_found_first(directory, reason, config, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    directory = directory.format(tmp=tmp_path)
    with pytest.raises(ConfigError) as caught:
        require_environment(config(f"run.directory={directory}"))

    assert str(caught.value) == f"run.directory: {directory}/r {reason}"


def test_a_run_directory_is_tried_and_left_as_it_was(config, tmp_path):
    require_environment(config())
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "r").mkdir(parents=True)
    require_environment(config())
    assert list((tmp_path / "runs" / "r").iterdir()) == []
    with pytest.raises(ConfigError, match=r"^run.directory: /proc/1 cannot be written"):
        require_run_directory(Path("/proc/1"))


def test_a_run_of_that_name_is_a_note(config, tmp_path):
    assert list(environment_notes(config())) == []
    (tmp_path / "runs" / "r" / "checkpoints").mkdir(parents=True)
    (note,) = environment_notes(config())
    assert (
        note == f"note: run.name: {tmp_path}/runs/r holds a run already; `eopd train` takes it up "
        "with --resume only"
    )


def test_where_metrics_are_served_is_tried(config):
    with (
        PrometheusSinkAt() as port,
        pytest.raises(
            ConfigError,
            match=rf"telemetry.port: 127.0.0.1:{port} cannot be served \(Address already in",
        ),
    ):
        require_environment(config(f"telemetry.port={port}"))

    require_environment(config(f"telemetry.port={port}"))
    require_environment(config("telemetry.port=null", "telemetry.host=no.such.host.invalid"))


def test_where_prometheus_is_told_of_a_run_is_tried(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^telemetry.discovery: \S+/file takes no files"):
        require_environment(config(f"telemetry.discovery={tmp_path}/file"))

    require_environment(config(f"telemetry.discovery={tmp_path}/targets"))

    for host in ("no.such.host.invalid", "192.0.2.1", "a..b", "x" * 70):
        with pytest.raises(
            ConfigError,
            match=rf"^telemetry.host, telemetry.port: {host}:0 cannot be served \(.+\); port 0",
        ):
            require_environment(config(f"telemetry.host={host}"))


def test_a_port_for_the_superuser_is_refused_to_others(monkeypatch):
    def bind(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(ConfigError, match=r"127.0.0.1:80 cannot be served \(Permission denied\)"):
        require_address("127.0.0.1", 80)


class PrometheusSinkAt:
    """A sink on a free port, which it gives."""

    def __enter__(self) -> int:
        self._sink = PrometheusSink("127.0.0.1", 0, run="r")
        return int(self._sink.address.rpartition(":")[2])

    def __exit__(self, *failure: object) -> None:
        self._sink.close()


@pytest.fixture
def vllm(monkeypatch):
    """Makes vLLM of a version, or of the package for CPUs."""

    def install(installed):
        def version(name):
            if name == "vllm" and installed is None:
                raise PackageNotFoundError(name)

            return installed

        monkeypatch.setattr(environment, "version", version)

    return install


@pytest.mark.parametrize(
    ("installed", "gpus"), [(None, 0.0), ("0.32.0+cpu", 0.0), ("0.32.0", 1.0), ("0.32.0", 0.4)]
)
def test_an_engine_computes_on_what_vllm_is_built_for(vllm, installed, gpus):
    vllm(installed)
    require_engine_build(gpus)


@pytest.mark.parametrize(
    ("installed", "gpus", "built", "other"),
    [
        (None, 1.0, "CPUs", "GPUs"),
        ("0.32.0+cpu", 0.4, "CPUs", "GPUs"),
        ("0.32.0", 0.0, "GPUs", "CPUs"),
    ],
)
def test_an_engine_does_not_compute_on_what_vllm_is_not_built_for(
    vllm, installed, gpus, built, other
):
    vllm(installed)
    with pytest.raises(ConfigError) as caught:
        require_engine_build(gpus)

    assert str(caught.value) == (
        f"gpus is {gpus:g}, and vLLM on {socket.gethostname()} is built for {built}; in a checkout "
        f"of eopd, make setup LOCK=cluster/requirements-{other[:-1].lower()}.lock makes an "
        f"environment for {other}"
    )


def test_a_rank_that_asks_for_a_gpu_must_see_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_gpu(0.0)
    with pytest.raises(ConfigError, match=r"^gpus is 1, and torch .* sees no GPU: .* make setup "):
        require_gpu(1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu(1.0)


@pytest.mark.parametrize("home", [None, "/proc/none", "", "relative"])
def test_nothing_of_ours_needs_a_home_directory(home, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "HOME"} | (
        {} if home is None else {"HOME": home}
    )
    code = (
        "import pwd, sys\n"
        # as in a container of another user
        "pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))\n"
        "import eopd.cli.main, eopd.preflight\n"
        "from eopd.remember import remembered\n"
        "print(remembered('q', [], lambda: 42))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "42\n"), ran.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"relative"}
