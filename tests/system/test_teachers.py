"""Two teachers, one with two replicas, and an engine of theirs dies: nothing is lost, and everyone is taught."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from eopd.telemetry.catalog import series

ROOT = Path(__file__).parents[2]


def rows(directory):
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def arguments(program, tmp_path_factory):
    data = tmp_path_factory.mktemp("prompts") / "mixed.jsonl"
    lines = (ROOT / "configs/prompts/demo_train.jsonl").read_text().splitlines()
    mixed = [json.loads(line) | {"source": ("math", "code", "prose")[i % 3]} for i, line in enumerate(lines[:96])]
    data.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    engine = "model: MODEL, dtype: float32, cpus: 0.2, vllm: {kv_cache_memory_bytes: 67108864}"
    engine = engine.replace("MODEL", str(program.models / "teacher"))
    teachers = f"[{{name: exact-1, sources: [math, code], replicas: 2, {engine}}}, {{name: other, {engine}}}]"
    return program.train(
        "teachers",
        f"teachers={teachers}",
        f"prompts.data={data}",
        f"prompts.held_out={data}",
        "run.batches=3000",
        "rollout.engines=1",
        "learner.ranks=1",
        "evaluation.prompts=8",
    )


def engines_of_teachers(program):
    """Engine processes of the teachers' actors."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().startswith("ray::Teacher") and program.mark in process.environ():
                found += [child for child in process.children(recursive=True) if "EngineCore" in child.name()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for(process, directory, ready):
    """The rows, once they are ``ready``."""
    deadline = time.monotonic() + 300
    while not ((found := rows(directory)) and ready(found)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    return found


def of_teacher(row, name, teacher):
    return row[series(f"eopd_teacher_{name}", teacher=teacher)]


def test_an_engine_that_dies_is_replaced_while_the_run_goes_on(program, arguments):
    directory = program.runs / "teachers"
    process = program.start(*arguments)
    wait_for(process, directory, lambda found: len(found) >= 3)
    engines = engines_of_teachers(program)
    assert len(engines) == 3
    os.kill(engines[0].pid, signal.SIGKILL)
    replaced = wait_for(
        process,
        directory,
        lambda found: sum(of_teacher(found[-1], "replacements_total", name) for name in ("exact-1", "other")) == 1,
    )
    wait_for(process, directory, lambda found: len(found) >= len(replaced) + 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert program.left_behind() == []
    found, last = rows(directory), rows(directory)[-1]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert sum(value for name, value in last.items() if name.startswith("eopd_lost_trajectories_total")) == 0
    assert of_teacher(last, "replicas_up", "exact-1") == 2 and of_teacher(last, "replicas_up", "other") == 1
    tokens = [of_teacher(last, "tokens_total", name) for name in ("exact-1", "other")]
    assert sum(tokens) > last["eopd_response_tokens_total"]  # and the held-out ones
    assert 1.2 < tokens[0] / tokens[1] < 3.5  # two sources of three


def serve(program, port: int, log: Path) -> "subprocess.Popen[bytes]":
    """A teacher's server, once it answers."""
    settings = [f"teachers.0.model={program.models / 'teacher'}", f"student.model={program.models / 'student'}"]
    command = [
        str(Path(sys.executable).with_name("eopd")),
        "teacher",
        "serve",
        "configs/tiny.yaml",
        "--port",
        str(port),
    ]
    for setting in settings:
        command += ["--set", setting]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=program.environment(), stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while not answers(f"http://127.0.0.1:{port}/ready"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return process


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_a_run_outlives_its_teacher_s_server(program, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve(program, port, tmp_path / "log")
    directory = program.runs / "served"
    process = program.start(
        *program.train(
            "served",
            "teachers.0.backend=eopd",
            "teachers.0.vllm={}",
            f"teachers.0.server={{url: 'http://127.0.0.1:{port}', max_attempts: 2}}",
            "run.batches=3000",
            "rollout.engines=1",
            "learner.ranks=1",
            "evaluation.prompts=8",
        )
    )
    try:
        before = wait_for(process, directory, lambda found: len(found) >= 3)
        assert all(row["eopd_gate_uncertain_ratio"] == 0.0 for row in before)
        for child in psutil.Process(server.pid).children(recursive=True):
            child.kill()
        server.kill()
        server.wait()
        time.sleep(5.0)  # longer than its two attempts
        server = serve(program, port, tmp_path / "log")
        wait_for(process, directory, lambda found: len(found) >= len(before) + 10)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        server.terminate()
        server.wait(60)
    assert process.returncode == 130, out + err
    assert program.left_behind() == []
    last = rows(directory)[-1]
    assert of_teacher(last, "failures_total", "teacher") > 0
    assert sum(value for name, value in last.items() if name.startswith("eopd_lost_trajectories_total")) == 0
