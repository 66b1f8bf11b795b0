"""``ray job submit --working-dir . -- eopd train`` against a local Ray with its job server
and token authentication.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example import EXAMPLE, require_its_functions_took_part, settings

ROOT = Path(__file__).parents[2]

BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory, program):
    """A Ray head of our own, stopped by its own process; yields the environment of its clients."""
    # a socket's path must be short
    dashboard = free_port()
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(4)}"
    env = program.environment() | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    ports = ["--port", free_port(), "--dashboard-port", dashboard, "--temp-dir", str(temporary)]
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--include-dashboard=true",
        *ports,
    ]

    with (tmp_path_factory.mktemp("head") / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        yield env
        process.terminate()
        process.wait(timeout=60)

    shutil.rmtree(temporary, ignore_errors=True)


def submit(head: dict[str, str], directory: Path, *arguments: str) -> None:
    """Submit ``eopd`` with a working directory, once the job server is up, and wait for its end."""
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "eopd", *arguments]
    deadline = time.monotonic() + 60

    while subprocess.run(
        [BIN / "ray", "job", "list"],
        env=head,
        cwd=directory,
        capture_output=True,
    ).returncode:
        assert time.monotonic() < deadline, "the job server did not come up"
        time.sleep(1)

    done = subprocess.run(
        command, env=head, cwd=directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_submitted_job_finds_the_functions_of_its_working_directory(program, head, tmp_path):
    project = shutil.copytree(EXAMPLE, tmp_path / "project")
    runs = tmp_path / "runs"

    submit(head, project, "train", "config.yaml", *settings(program, runs))

    require_its_functions_took_part(runs / "letters")


@pytest.mark.slow
def test_a_submitted_job_trains(program, head):
    arguments = program.train(
        "job",
        "run.batches=3",
        "evaluation.prompts=4",
        "rollout.engines=1",
        "learner.ranks=1",
        "cluster.cpus=null",
    )

    submit(head, ROOT, *arguments)

    summary = json.loads((program.runs / "job" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["steps"] == 3
