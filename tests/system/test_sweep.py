"""A sweep of two arms on real workers, one of which is killed, and its report."""

import json
import signal
import subprocess
import time

import psutil
import pytest

ARMS = ("gate-hard", "gate-never")
SMALL = (
    "run.batches=2",
    "run.expected_minutes=null",
    "rollout.engines=1",
    "learner.ranks=1",
    "flow.batch_prompts=4",
    "evaluation.prompts=4",
    "cluster.cpus=4",
)
LIMIT_S = 900

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


def arguments(program):
    """``eopd sweep`` of the tiny config."""
    _, config, *settings = program.train("swept", *SMALL)
    grid = ["--grid", "loss.gate=hard,never", "--seeds", "0", "--name", "swept"]
    return ["sweep", config, *settings, *grid, "--parallel", "2"]


def ended(process, log):
    code = process.wait(timeout=LIMIT_S)
    return subprocess.CompletedProcess(process.args, code, log.read_text())


@pytest.fixture(scope="module")
def swept(program):
    """A sweep of which a run is killed while it starts, and which the same command then completes."""
    log = program.runs.parent / "swept.log"
    process = program.start(*arguments(program), log=log)
    lock = program.runs / "swept" / "gate-hard-seed-0" / "run.lock"
    while not (lock.exists() and lock.read_text()):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)

    holder = json.loads(lock.read_text())
    psutil.Process(holder["pid"]).send_signal(signal.SIGKILL)
    first = ended(process, log)

    log = program.runs.parent / "swept-again.log"
    second = ended(program.start(*arguments(program), log=log), log)
    return program.runs / "swept", first, second


def test_a_run_that_is_killed_is_named_and_ends_no_other(swept):
    _, first, _ = swept
    assert first.returncode == 1, first.stdout
    assert "failed: gate-hard-seed-0: killed by SIGKILL" in first.stdout
    assert first.stdout.count(": completed (") == 1
    assert "continue with: eopd sweep configs/tiny.yaml" in first.stdout


def test_the_same_command_completes_it(swept, program):
    directory, _, second = swept
    assert second.returncode == 0, second.stdout
    assert "1 of 2 runs are complete" in second.stdout
    record = json.loads((directory / "sweep.json").read_text())
    assert record["status"] == "completed"
    runs = {(run["name"], run["status"]) for run in record["runs"]}
    assert runs == {(f"{arm}-seed-0", "completed") for arm in ARMS}
    assert program.left_behind() == []


def test_its_numbers_are_those_of_the_runs(swept):
    directory, _, second = swept
    record = json.loads((directory / "sweep.json").read_text())
    found = []
    for arm, result in zip(ARMS, record["arms"], strict=True):
        summary = json.loads((directory / f"{arm}-seed-0" / "summary.json").read_text())
        found.append(result["values"]["held_out/reverse_kl"]["0"])
        assert found[-1] == summary["held_out"]["after"]["reverse_kl"]["mean"]

    hard, never = found
    difference = record["arms"][1]["differences"]["held_out/reverse_kl"]
    assert difference["count"] == 1
    assert difference["mean"] == pytest.approx(never - hard)
    assert "held_out/reverse_kl" in second.stdout


def test_its_report_shows_every_run(swept):
    page = (swept[0] / "report.html").read_text()
    assert all(f"{arm}-seed-0" in page for arm in ARMS)
