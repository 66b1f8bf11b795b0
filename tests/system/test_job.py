"""``eopd submit``, and ``ray job submit --working-dir . -- eopd train``, against a local Ray with
its job server and token authentication.
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
from program import read_rows
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]

BIN = Path(sys.executable).parent
NO_AGENT = "No available agent to submit job"


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
    ports = ["--port", free_port(), "--dashboard-port", dashboard]
    # of which a machine has one, unless it is told another: a run beside this one may have it
    ports += ["--dashboard-agent-listen-port", free_port()]
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--include-dashboard=true",
        *("--temp-dir", str(temporary)),
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


def ask(head: dict[str, str], directory: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the environment beside the cluster, once the job server is up."""
    deadline = time.monotonic() + 60
    while subprocess.run([BIN / "ray", "job", "list"], env=head, capture_output=True).returncode:
        assert time.monotonic() < deadline, "the job server did not come up"
        time.sleep(1)

    # its node may be up later, which `eopd submit` waits for
    while NO_AGENT in (done := run_beside(head, directory, *command)).stderr:
        assert command[0] == "ray" and time.monotonic() < deadline, done.stderr

    return done


def run_beside(
    env: dict[str, str], directory: Path, program: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BIN / program, *arguments],
        env=env,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_submitted_job_finds_the_functions_of_its_working_directory(program, head, tmp_path):
    project = shutil.copytree(EXAMPLE, tmp_path / "project")
    runs, server = tmp_path / "runs", ["--address", head["RAY_API_SERVER_ADDRESS"]]
    secret = secrets.token_hex(16)
    options = [*settings(program, runs), *server, "--env", "A_SECRET", "--name", "letters-1"]

    done = ask(head | {"A_SECRET": secret}, project, "eopd", "submit", "config.yaml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job letters-1 has ended: SUCCEEDED, exit code 0" in done.stderr
    assert f"report: {runs / 'letters' / 'report.html'}" in done.stdout.splitlines()
    require_its_functions_took_part(runs / "letters")

    status = ask(head, tmp_path, "eopd", "status", "letters-1", *server)
    assert status.returncode == 0, status.stderr
    assert status.stdout.startswith("job letters-1: SUCCEEDED\n")
    assert f"run directory: {runs / 'letters'}\nletters: completed, step 6/6" in status.stdout

    logs = ask(head, tmp_path, "eopd", "logs", "letters-1", *server, "--lines", "100000")
    assert logs.stdout == done.stdout, "what was streamed is what was written"
    assert secret not in done.stdout + done.stderr + status.stdout

    for token in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled"}):
        refused = run_beside(head | token, tmp_path, "eopd", "status", "letters-1", *server)
        assert refused.returncode == 2
        assert "the cluster wants its token" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_job_submitted_by_ray_is_stopped_with_a_checkpoint(program, head):
    """Its engines are sent adapters alone."""
    arguments = program.train(
        "job",
        "run.batches=1000",
        "evaluation.prompts=4",
        "rollout.engines=1",
        "learner.ranks=1",
        "checkpoint.every=1000",
        "cluster.cpus=null",
        "student.lora={rank: 4}",
    )
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "3600"}})
    options = ["--no-wait", "--submission-id", "by-ray", "--runtime-env-json", environment]
    command = ["ray", "job", "submit", "--working-dir", ".", *options, "--", "eopd", *arguments]
    done = ask(head, ROOT, *command)
    assert done.returncode == 0, done.stdout + done.stderr

    run, deadline = program.runs / "job", time.monotonic() + 200
    while len(read_rows(run / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline, ask(head, ROOT, "ray", "job", "logs", "by-ray").stdout
        time.sleep(0.5)

    done = ask(head, ROOT, "eopd", "stop", "by-ray", "--address", head["RAY_API_SERVER_ADDRESS"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "job by-ray has ended: STOPPED"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    checkpoints = [path.name for path in (run / "checkpoints").iterdir()]
    assert checkpoints == [f"step-{summary['steps']:06d}"]
    adapters = load_file(run / "adapter" / "adapter_model.safetensors")
    assert max(abs(b).max() for name, b in adapters.items() if "lora_B" in name) > 1e-3
    for row in read_rows(run / "metrics.jsonl"):
        assert row["eopd_weight_bytes"] == sum(matrix.nbytes for matrix in adapters.values())
        assert row["eopd_logprob_gap_nats"] < 1e-3
