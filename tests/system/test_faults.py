"""One run, and one process of it after the other is killed: it goes on, and what it trains is what it should."""

import json
import os
import re
import signal
import time

import psutil
import pytest

STEP_S = 300


class Run:
    """A run under way, and its processes."""

    def __init__(self, program, name: str, *overrides: str) -> None:
        self.program, self.directory = program, program.runs / name
        self.log = program.runs.parent / f"{name}.log"
        self.process = program.start(*program.train(name, *overrides), log=self.log)

    def rows(self):
        path = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def actors(self, role: str) -> list[psutil.Process]:
        """Processes of the actors of a role, in the order they were started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.name().startswith(f"ray::{role}"[:15]) and self.program.mark in process.environ():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def wait(self, ready):
        """The last row, once ``ready`` of it."""
        deadline = time.monotonic() + STEP_S
        while not ((found := self.rows()) and ready(found[-1])):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return found[-1]

    def goes_on(self, steps: int = 3):
        """Wait for some more steps than there are."""
        step = self.rows()[-1]["step"]
        return self.wait(lambda row: row["step"] >= step + steps)

    def interrupt(self) -> str:
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(timeout=120) == 130, self.log.read_text()[-3000:]
        return self.log.read_text()


@pytest.fixture(scope="module")
def run(program):
    run = Run(
        program,
        "faults",
        "run.batches=5000",
        "flow={batch_prompts: 8, max_staleness: 1}",
        "checkpoint.every=5",
        "evaluation.prompts=8",
        "weights.timeout_s=20",
    )
    run.wait(lambda row: row["step"] >= 3)
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGINT)
        run.process.wait(timeout=120)


def engine_of(actor: psutil.Process) -> psutil.Process:
    return next(child for child in actor.children(recursive=True) if "EngineCore" in child.name())


def replaced(run, number: int):
    row = run.wait(lambda row: row["eopd_engine_replacements_total"] == number and row["eopd_engines_up"] == 2)
    assert row["eopd_engine_failures_total"] + row["eopd_weight_failures_total"] >= number
    return run.goes_on()


def test_an_engine_whose_actor_is_killed_is_replaced(run):
    run.actors("RolloutActor")[0].kill()
    replaced(run, 1)


def test_an_engine_whose_process_is_killed_is_replaced(run):
    engine_of(run.actors("RolloutActor")[0]).kill()
    replaced(run, 2)


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
