"""One run, and one process of it after the other is killed: it goes on, and what it trains is what it should."""

import json
import os
import re
import signal
import time

import pytest
from program import Run, engine_of


@pytest.fixture(scope="module")
def run(program):
    run = Run(
        program,
        "faults",
        "run.batches=5000",
        "flow={batch_prompts: 8, max_staleness: 1}",
        "checkpoint.every=5",
        "evaluation.prompts=8",
        "weights.timeout_s=10",
        "weights.connect_timeout_s=10",
    )
    run.wait(lambda row: row["step"] >= 3)
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGINT)
        run.process.wait(timeout=120)


def replaced(run, number: int):
    """Wait until so many engines were replaced, and the run goes on; how many weight transfers had failed by then."""
    row = run.wait(lambda row: row["eopd_engine_replacements_total"] == number and row["eopd_engines_up"] == 2)
    run.goes_on()
    return row["eopd_weight_failures_total"]


def test_an_engine_whose_actor_is_killed_is_replaced(run):
    run.actors("RolloutActor")[0].kill()
    replaced(run, 1)


def test_an_engine_whose_process_is_killed_is_replaced(run):
    engine_of(run.actors("RolloutActor")[0]).kill()
    replaced(run, 2)


def stuck(run):
    """Wait until no step finishes any more: all wait for the one that stands still, in a weight transfer."""
    step = -1
    while step != (step := run.rows()[-1]["step"]):
        time.sleep(5.0)


def test_an_engine_killed_in_a_weight_transfer_costs_that_transfer(run):
    engine = engine_of(run.actors("RolloutActor")[0])
    failed = run.rows()[-1]["eopd_weight_failures_total"]
    engine.suspend()
    stuck(run)
    engine.kill()
    assert replaced(run, 3) == failed + 1


def test_an_engine_that_stands_still_costs_one_time_out(run):
    failed = run.rows()[-1]["eopd_weight_failures_total"]
    engine_of(run.actors("RolloutActor")[0]).suspend()
    assert replaced(run, 4) == failed + 1


def test_engines_come_and_go_on_request(run):
    before = run.actors("RolloutActor")
    for number in (3, 2):
        done = run.program.run("scale", str(run.directory), "--engines", str(number))
        assert done.returncode == 0 and f"asked for {number} rollout engines" in done.stdout
        run.wait(lambda row, number=number: row["eopd_engines_up"] == number)
        run.goes_on()
        assert all(actor.is_running() for actor in before), "those that were there stay"
    assert run.rows()[-1]["eopd_engine_replacements_total"] == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_learner_rank_brings_the_gang_back_from_the_last_checkpoint(run, rank):
    before = run.wait(lambda row: row["step"] >= 8)
    run.actors("LearnerActor")[rank].kill()
    run.wait(lambda row: row["eopd_learner_restarts_total"] == rank + 1)
    after = run.goes_on(8)
    assert after["step"] > before["step"] - 5
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["incarnation"] == rank + 1 and summary["status"] == "running"
    assert all(row["eopd_logprob_gap_nats"] < 0.1 for row in run.rows()[-8:])  # a few versions apart: up to 0.75


def test_after_all_that_every_step_is_there_once_and_nothing_is_left_running(run):
    out = run.interrupt()
    assert run.program.left_behind() == []
    found = run.rows()
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["eopd_trajectories_total"] for row in found] == [8 * row["step"] for row in found]
    assert all(row["eopd_staleness_max"] <= 1 for row in found)
    trained = [json.loads(line) for line in (run.directory / "trained.jsonl").read_text().splitlines()]
    assert [row["step"] for row in trained] == [row["step"] for row in found]
    assert sorted(issue for row in trained for issue in row["issues"]) == list(range(8 * len(found)))  # exactly once
    assert sum(value for name, value in found[-1].items() if name.startswith("eopd_lost_trajectories_total")) == 0
    assert len(re.findall("the learner was lost", out)) == 2


def test_more_failures_than_allowed_end_the_run_with_their_causes(program):
    run = Run(program, "too-many", "run.batches=5000", "cluster.max_restarts=0", "rollout.engines=1", "learner.ranks=1")
    run.wait(lambda row: row["step"] >= 1)
    run.actors("RolloutActor")[0].kill()
    assert run.process.wait(timeout=120) == 1
    err = run.log.read_text()
    assert "1 failures within 3600 s, cluster.max_restarts is 0:" in err
    assert "1 x rollout engine 0: its actor died" in err
    assert program.left_behind() == []
    assert json.loads((run.directory / "summary.json").read_text())["status"] == "failed"
