"""A run over three machines, one of which is cut off for a while."""

import machines
import pytest
from program import Run, read_rows

WHY_NOT = machines.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

# The engines find room on the third machine, the teacher beside a rank on the second.
NODES = ((2, "ranks=here"), (3, "ranks=here,engines=here"), (2, "engines=here"))


@pytest.fixture(scope="module")
def cluster(program):
    with machines.cluster(program, NODES) as joined:
        yield joined


@pytest.fixture(scope="module")
def run(cluster):
    program, (head, *_) = cluster
    run = Run(
        program,
        "machines",
        f"cluster.address={head.address}:{machines.PORT}",
        "cluster.cpus=null",
        "cluster.wait_s=60",
        "learner.cpus=2",
        "rollout.cpus=1",
        "teachers.0.cpus=1",
        "learner.node_labels={ranks: here}",
        "rollout.node_labels={engines: here}",
        "teachers.0.node_labels={engines: here}",
        "run.batches=5000",
        "checkpoint.every=5",
        "evaluation.prompts=8",
        "weights.timeout_s=10",
        "weights.connect_timeout_s=10",
    )
    run.wait(lambda row: row["step"] >= 3)
    yield run
    run.close()


def test_every_machine_has_its_part_and_weights_reach_all_of_them(cluster, run):
    program, joined = cluster
    places = {
        role: {
            machine.address
            for actor in run.actors(role)
            for machine in joined
            if machine.holds(actor.pid)
        }
        for role in ("LearnerActor", "RolloutActor", "TeacherActor")
    }
    first, second, third = (machine.address for machine in joined)
    assert places["LearnerActor"] == {first, second}
    assert places["RolloutActor"] == {third}
    assert places["TeacherActor"] == {second}

    before, step = joined[2].received, run.rows()[-1]["step"]
    row = run.goes_on(5)
    size = (program.models / "student" / "model.safetensors").stat().st_size
    assert joined[2].received - before > (row["step"] - step - 1) * size
    assert row["eopd_staleness_max"] == 0
    assert row["eopd_logprob_gap_nats"] < 1e-3


def test_one_is_cut_off_with_all_it_has_and_comes_back(cluster, run):
    """The others have no room for what it had. Its Ray node ends itself once it hears that it was
    given up, and is started again.
    """
    _, (_, second, _) = cluster
    before = len(run.log.read_text())
    second.cut_off()
    run.says("its actor died", after=before)  # of whom is heard first, depends on the moment
    second.join()
    second.node_ended()
    second.start_node()
    run.says("^the learner was lost", after=before)
    run.goes_on()


def test_after_all_that_every_step_is_there_once(cluster, run):
    program, _ = cluster
    stopped = program.run("stop", str(run.directory))
    assert stopped.returncode == 0, stopped.stderr
    run.ended(130)
    summary, rows = run.summary(), run.rows()
    assert summary["status"] == "interrupted"
    assert [row["step"] for row in rows] == list(range(1, summary["steps"] + 1))
    trained = read_rows(run.directory / "trained.jsonl")
    issues = [issue for row in trained for issue in row["issues"]]
    assert issues == list(range(8 * summary["steps"])), "each is trained once"
