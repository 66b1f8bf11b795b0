"""``eopd profile`` on real Ray, vLLM and DeepSpeed, and what a whole run says of its time."""

import json
import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def folders(monkeypatch):
    """Where the command makes its temporary folders. The path is short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def command(program, folders):
    """The command without its steps."""
    _, config, *settings = program.train("profiled", "rollout.engines=1", "learner.ranks=1")
    return ["profile", config, *settings]


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes_and_leaves_nothing(program, command, folders):
    done = program.run(*command, "--steps", "6", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 6
    stages = ("generate", "score", "train", "weights")
    for costs in (found["alone_s"], found["busy_s"]):
        assert tuple(costs) == stages
        assert min(costs.values()) > 0

    assert found["step_s"] > 0
    assert found["best_s"] >= max(found["alone_s"].values())
    assert 0.95 <= found["accounted"] <= 1.01
    assert found["tokens_per_s"] > 0
    assert 0 < found["cpu_s"] <= 1.01 * found["step_s"] * found["cores"]
    assert 1 <= len(found["advice"]) <= 3
    assert "as a run: step 8, " in done.stderr
    assert "error" not in done.stderr.lower()

    assert program.left_behind() == []
    assert not (program.runs / "profiled").exists()
    assert list(folders.glob("eopd-profile-*")) == []


def an_engine_starts(program):
    for process in program.marked():
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::Rollout"):
                return True

    return False


@pytest.mark.slow
def test_ctrl_c_ends_a_profile_that_starts_and_everything_it_has_started(
    program, command, folders, tmp_path
):
    log = tmp_path / "log"
    process = program.start(*command, log=log)
    deadline = time.monotonic() + 200
    while not an_engine_starts(program):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)

    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(timeout=60) == 130, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()

    assert log.read_text().splitlines()[-1] == "interrupted"
    assert "Traceback" not in log.read_text()
    assert program.left_behind() == []
    assert list(folders.glob("eopd-profile-*")) == []
