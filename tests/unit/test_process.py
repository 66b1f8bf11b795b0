"""What a worker process takes from the environment it was started in."""

import os
import pwd
import socket
import tempfile
from pathlib import Path

import pytest

from eopd.runtime import process
from eopd.runtime.process import LONGEST_SOCKETS, SOCKETS, clean_environment, service_links

VLLM_SERVICE = {
    "VLLM_SERVICE_HOST": "10.0.0.1",
    "VLLM_SERVICE_PORT": "8000",
    "VLLM_SERVICE_PORT_HTTP": "8000",
    "VLLM_PORT": "tcp://10.0.0.1:8000",
    "VLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "VLLM_PORT_8000_TCP_PROTO": "tcp",
    "VLLM_PORT_8000_TCP_PORT": "8000",
    "VLLM_PORT_8000_TCP_ADDR": "10.0.0.1",
}


@pytest.fixture
def usual(tmp_path):
    return {"HOME": str(tmp_path), "USER": "me"}


def test_what_kubernetes_says_of_services_is_dropped():
    services = {
        **VLLM_SERVICE,
        "MASTER_PORT": "udp://10.0.0.2:53",
        "MY_DB_SERVICE_HOST": "h",
        "MY_DB_SERVICE_PORT": "1",
    }
    others = {
        "KUBERNETES_PORT": "tcp://10.0.0.1:443",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
        "VLLM_ATTENTION_BACKEND": "FLASHINFER",
        "VLLM_PORTS": "many",
        "TEACHER_PORT": "8000",
        "ONLY_SERVICE_HOST": "h",
    }
    assert sorted(service_links(services | others)) == sorted(services)
    assert service_links({"VLLM_PORT": "tcp://10.0.0.1:8000"}) == ["VLLM_PORT"]


def test_a_worker_listens_and_runs_where_it_pleases(usual):
    environ = usual | {
        "VLLM_PORT": "8000",
        "VLLM_HOST_IP": "10.0.0.9",
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": "cores",
    }
    environ |= {"VLLM_USE_DEEP_GEMM": "0", "OMP_NUM_THREADS": "3"}
    clean_environment(environ)
    assert environ == usual | {"VLLM_USE_DEEP_GEMM": "0", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    "home",
    [
        None,
        "",
        "relative",
        "/proc/none",
        "/etc/hostname",
    ],
)
def test_a_home_that_takes_no_files_is_replaced(home, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    environ = {} if home is None else {"HOME": home}
    clean_environment(environ)
    assert (
        Path(environ["HOME"]).parent == tmp_path
        and (Path(environ["HOME"]).stat().st_mode & 0o777) == 0o700
    )
    assert environ["USER"] == str(os.getuid())
    before = environ["HOME"]
    clean_environment(environ | ({} if home is None else {"HOME": home}))
    assert [str(path) for path in tmp_path.iterdir()] == [before]  # the same one again


def test_without_home_the_password_file_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        pwd,
        "getpwuid",
        lambda uid: pwd.struct_passwd(("me", "x", uid, uid, "", str(tmp_path), "")),
    )
    environ: dict[str, str] = {}
    clean_environment(environ)
    assert environ == {"HOME": str(tmp_path)}


def test_a_home_of_somebody_else_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"eopd-home-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    environ = {"HOME": "/proc/none", "USER": "me"}
    clean_environment(environ)
    assert Path(environ["HOME"]).is_dir() and not Path(environ["HOME"]).is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def no_entry(uid: int) -> object:
    raise KeyError(uid)


@pytest.mark.parametrize("more", [0, 1])
def test_sockets_of_vllm_move_where_the_directory_is_too_long(more, usual, monkeypatch, tmp_path):
    long = "/" + "d" * (LONGEST_SOCKETS - 1 + more)
    monkeypatch.setattr(tempfile, "tempdir", long)
    environ = dict(usual)
    clean_environment(environ)
    assert environ == (usual | {SOCKETS: "/tmp"} if more else usual)
    environ = usual | {SOCKETS: long}  # named by the user
    clean_environment(environ)
    assert environ[SOCKETS] == ("/tmp" if more else long)
    monkeypatch.setattr(process, "SHORT", ("/proc", str(tmp_path)))
    environ = dict(usual)
    clean_environment(environ)
    assert environ.get(SOCKETS) == (str(tmp_path) if more else None)


def test_the_longest_directory_still_holds_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "d" * LONGEST_SOCKETS + "_" + "x" * 36

    with socket.socket(socket.AF_UNIX) as fits, socket.socket(socket.AF_UNIX) as one_more:
        fits.bind(name)
        with pytest.raises(OSError, match="too long"):
            one_more.bind(name + "x")
