"""One run, and one process of it after the other is killed: it goes on, and what it trains is what
it should. At last there is one failure more than it may have.
"""

import re
from contextlib import suppress

import psutil
import pytest
from program import Run, lost, read_rows

from eopd.telemetry.series import series

FAILURES = 10  # that the tests before the last one cost
REPLICAS_UP = series("eopd_teacher_replicas_up", teacher="teacher")
REPLACED = series("eopd_teacher_replacements_total", teacher="teacher")


@pytest.fixture(scope="module")
def run(program):
    """Asynchronous and rewarded, with two of everything."""
    run = Run(
        program,
        "faults",
        "run.batches=5000",
        "flow={batch_prompts: 4, max_staleness: 1}",
        "prompts.data=configs/prompts/arithmetic.jsonl",
        "teachers.0.replicas=2",
        "loss.reverse_kl={kind: sampled, reward: {function: math, weight: 0.1}}",
        "rollout.samples_per_prompt=2",
        "checkpoint.every=5",
        "evaluation.prompts=8",
        "run.stall_after_s=3",
        "weights.timeout_s=10",
        "weights.connect_timeout_s=10",
        f"cluster.max_restarts={FAILURES}",
    )
    run.wait(lambda row: row["step"] >= 3)
    yield run
    run.close()


def test_engines_on_cpus_are_threads_of_their_actors(run):
    for role in ("RolloutActor", "TeacherActor"):
        actors = run.actors(role)
        assert len(actors) == 2
        for actor in actors:
            children = [child.name() for child in actor.children(recursive=True)]
            assert not any("EngineCore" in name for name in children)


def replaced(run: Run, number: int) -> float:
    """Wait until so many engines were replaced, and the run goes on; how many weight
    transfers had failed by then.
    """
    row = run.wait(
        lambda row: row["eopd_engine_replacements_total"] == number and row["eopd_engines_up"] == 2
    )
    run.goes_on()
    return row["eopd_weight_failures_total"]


def test_engines_are_replaced_also_when_both_are_lost_at_once(run):
    for actor in run.actors("RolloutActor"):
        actor.kill()

    replaced(run, 2)


def suspended_in_a_transfer(run: Run) -> psutil.Process:
    """Suspend an engine that is being sent weights. Where the run turns out to wait for something
    else, the engine goes on, and it is tried again.
    """
    while True:
        engine = run.actors("RolloutActor")[0]
        before = len(run.log.read_text())
        engine.suspend()
        report = run.says(r"^  weights: (\w+)", after=before)
        if report[1] != "idle":
            return engine

        engine.resume()
        run.goes_on()


def test_an_engine_killed_in_a_weight_transfer_costs_that_transfer(run):
    engine = suspended_in_a_transfer(run)
    failed = run.rows()[-1]["eopd_weight_failures_total"]
    engine.kill()
    assert replaced(run, 3) == failed + 1


def test_an_engine_that_stands_still_costs_one_time_out(run):
    engine = suspended_in_a_transfer(run)
    failed = run.rows()[-1]["eopd_weight_failures_total"]
    assert replaced(run, 4) == failed + 1
    with suppress(psutil.NoSuchProcess):
        engine.kill()  # Ray 2.60 asks it to end, and does not always kill what cannot answer


def test_engines_come_and_go_on_request(run):
    before = run.actors("RolloutActor")
    replaced_before = run.rows()[-1]["eopd_engine_replacements_total"]
    for number in (3, 2):
        done = run.program.run("scale", str(run.directory), "--engines", str(number))
        assert done.returncode == 0
        assert f"asked for {number} rollout engines" in done.stdout
        run.wait(lambda row, number=number: row["eopd_engines_up"] == number)
        run.goes_on()
        assert all(actor.is_running() for actor in before), "those that were there stay"

    assert run.rows()[-1]["eopd_engine_replacements_total"] == replaced_before


def test_a_dead_teacher_is_replaced(run):
    run.actors("TeacherActor")[0].kill()
    run.wait(lambda row: row[REPLACED] == 1 and row[REPLICAS_UP] == 2)
    run.goes_on()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_brings_the_gang_back(run, rank):
    before = run.wait(lambda row: row["step"] >= 20)  # the gap is large while the student is new
    run.actors("LearnerActor")[rank].kill()
    run.wait(lambda row: row["eopd_learner_restarts_total"] == rank + 1)
    after = run.goes_on(8)
    assert after["step"] > before["step"] - 5
    summary = run.summary()
    assert summary["incarnation"] == rank + 1
    assert summary["status"] == "running"
    # without a fault single steps reach 0.15, with weights a few versions apart 0.75
    assert all(row["eopd_logprob_gap_nats"] < 0.3 for row in run.rows()[-8:])


def test_a_learner_lost_with_every_engine_comes_back(run):
    """The loop waits for responses alone: the first new engine finds out that there is no learner."""
    for engine in wait_for_a_batch(run):
        engine.kill()

    run.actors("LearnerActor")[0].kill()
    run.wait(lambda row: row["eopd_learner_restarts_total"] == 3)
    run.goes_on()
    assert run.summary()["incarnation"] == 3


def wait_for_a_batch(run: Run) -> list[psutil.Process]:
    """Suspend all engines while the loop waits for what they write; where it turns out to wait for
    something else, they go on, and it is tried again.
    """
    while True:
        engines = run.actors("RolloutActor")
        before = len(run.log.read_text())
        for engine in engines:
            engine.suspend()

        if run.says(r"^  loop: ([^;]*)", after=before)[1] == "waiting for a batch":
            return engines

        for engine in engines:
            engine.resume()

        run.goes_on()


def test_one_failure_too_many_ends_the_run_with_all_causes(run):
    run.actors("RolloutActor")[0].kill()
    said = run.ended(1)
    assert run.program.left_behind() == []
    assert f"{FAILURES + 1} failures within 3600 s, cluster.max_restarts is {FAILURES}:" in said
    causes = re.findall(r"^  (\d+) x (.+)$", said, re.M)
    assert sum(int(count) for count, _ in causes) == FAILURES + 1
    assert any(re.match(r"rollout engine \d+: its actor died", cause) for _, cause in causes), (
        causes
    )
    assert len(re.findall("the learner was lost", said)) == 3
    assert run.summary()["status"] == "failed"


def test_after_all_that_every_step_is_there_once(run):
    found = run.rows()
    trained = read_rows(run.directory / "trained.jsonl")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["eopd_trajectories_total"] for row in found] == [8 * row["step"] for row in found]
    assert {row["eopd_staleness_max"] for row in found} == {0, 1}
    assert all(0.0 <= row["eopd_reward_mean"] <= 1.0 for row in found)
    assert [row["step"] for row in trained] == [row["step"] for row in found]
    issues = sorted(issue for row in trained for issue in row["issues"])
    assert issues == list(range(8 * len(found)))  # exactly once
    assert lost(found[-1]) == found[-1]["eopd_dropped_trajectories_total"] == 0
    newest = max((run.directory / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) == len(found), (
        "what was trained is saved before the run ends"
    )
