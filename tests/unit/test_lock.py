"""One process runs a run; the second is told who does."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from eopd.config import ConfigError
from eopd.run import lock
from eopd.run.lock import held, holder, last_holder, require_same

HOLD = (
    "import pathlib, sys, time\n"
    "from eopd.run.lock import held\n"
    "with held(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "runs" / "r"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("")
    return path


@pytest.fixture
def other(directory):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_refused_and_told_of_the_first(directory, other):
    host = re.escape(socket.gethostname())
    since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    who = rf"process {other.pid} on {host}, since {since}"
    message = rf"run.name: {directory} is being run by {who}. Wait for it, stop it"
    with pytest.raises(ConfigError, match=message), held(directory):
        raise AssertionError("held twice")

    assert holder(directory).pid == other.pid, "the refused one has not taken its name away"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_leaves_its_name_and_no_lock(directory, other, how):
    os.kill(other.pid, how)
    other.wait()
    assert holder(directory) is None
    assert last_holder(directory).pid == other.pid
    with held(directory) as notes:
        assert notes == []
        assert holder(directory).pid == os.getpid()

    assert holder(directory) is None
    assert last_holder(directory) is None


def test_it_waits_for_the_holder_as_long_as_it_may(directory, other):
    said = []

    def say(text):
        said.append(text)
        assert holder(directory).pid == other.pid
        other.kill()

    with held(directory, wait_s=60.0, say=say) as notes:
        assert notes == []
        assert holder(directory).pid == os.getpid()

    host = socket.gethostname()
    (line,) = said
    assert line.startswith(f"waiting for process {other.pid} on {host}, since ")
    assert line.endswith(" to end, for up to 60 s (cluster.wait_s)")


def test_it_goes_on_where_the_holder_has_begun_nothing_and_taken_its_directory_away(tmp_path):
    path = tmp_path / "runs" / "r"
    leaves, left = threading.Event(), threading.Event()

    def begins_nothing():
        with held(path):
            left.set()
            leaves.wait(10.0)

    first = threading.Thread(target=begins_nothing, daemon=True)
    first.start()
    assert left.wait(10.0)
    with held(path, wait_s=60.0, say=lambda text: leaves.set()) as notes:
        first.join(10.0)
        assert notes == []
        assert holder(path).pid == os.getpid()

    assert not path.exists()


def test_it_waits_no_longer_than_it_may(directory, other):
    began = time.monotonic()
    with (
        pytest.raises(ConfigError, match="is being run by process"),
        held(directory, wait_s=2.0),
    ):
        raise AssertionError("held twice")

    assert 2.0 < time.monotonic() - began < 10.0


def test_a_directory_in_which_nothing_was_begun_does_not_stay(tmp_path):
    path = tmp_path / "runs" / "r"
    with held(path):
        assert [file.name for file in path.iterdir()] == ["run.lock"]

    assert not path.exists() and holder(path) is None
    with pytest.raises(RuntimeError), held(path):
        (path / "config.yaml").write_text("")
        raise RuntimeError

    assert sorted(file.name for file in path.iterdir()) == ["config.yaml", "run.lock"]


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(directory, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        flock(descriptor, operation)
        if not removed:
            removed.append(os.unlink(directory / "run.lock"))
            # by a third one, who will hold another file of this name
            (directory / "run.lock").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with held(directory):
        assert removed
        assert holder(directory).pid == os.getpid()


def test_a_process_of_another_host_that_did_not_leave_is_named(directory):
    record = {"host": "elsewhere", "pid": 7, "since": time.time()}
    (directory / "run.lock").write_text(json.dumps(record))
    with held(directory) as notes:
        (note,) = notes

    assert "run.lock names process 7 on elsewhere, since 20" in note
    assert "If it still runs" in note


def test_a_file_system_without_locks_is_said(directory, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)

    with held(directory) as notes:
        assert notes == [
            f"the file system of {directory} has no locks: nothing keeps a "
            "second process out of this run"
        ]
        assert holder(directory).pid == os.getpid()

    assert holder(directory) is None


def test_a_look_at_a_lock_does_not_keep_a_run_from_it(directory, monkeypatch):
    monkeypatch.setattr(lock, "_PAUSE_S", 0.01)
    (directory / "run.lock").write_text("")
    looking = os.open(directory / "run.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(
        time,
        "sleep",
        lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN),
    )
    with held(directory):
        assert holder(directory) is not None

    os.close(looking)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"run.directory: .*/file/r cannot be made \(Not a directory\)"
    with pytest.raises(ConfigError, match=message), held(tmp_path / "file" / "r"):
        raise AssertionError


@pytest.mark.parametrize("since", ['"y"', "1e300", "-1", "null"])
def test_a_lock_that_names_no_process_is_held_by_nobody_known(directory, since):
    (directory / "run.lock").write_text(f'{{"host": "elsewhere", "pid": 1, "since": {since}}}')
    assert last_holder(directory) is None
    with held(directory) as notes:
        assert notes == []


def test_the_directory_that_the_driver_holds_is_known_on_every_node(directory):
    with held(directory):
        require_same(directory, holder(directory))


def test_a_lock_that_is_seen_late_is_waited_for(directory, monkeypatch):
    with held(directory):
        driver = holder(directory)
        (directory / "run.lock").rename(directory / "hidden")
        show = iter([lambda: None, lambda: (directory / "hidden").rename(directory / "run.lock")])
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: next(show)())
        require_same(directory, driver)


@pytest.mark.parametrize("there", [None, "", '{"host": "other", "pid": 7, "since": 5.0}'])
def test_another_directory_of_that_name_is_the_users_mistake(directory, there, monkeypatch):
    monkeypatch.setattr(lock, "_SEEN_S", 0.0)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node-7")
    if there is not None:
        (directory / "run.lock").write_text(there)

    driver = lock.Holder(host="head", pid=7, since=5.0)
    with pytest.raises(
        ConfigError, match=r"run\.directory: .* on node-7, .* on head, .* every node"
    ):
        require_same(directory, driver)
