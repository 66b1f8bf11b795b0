"""One run undisturbed, and once with its driver killed and its newest checkpoint cut short:
equal to the token.
"""

import json
import random
import shutil
import subprocess
import time

import pytest
from program import Run, read_rows

from eopd.run.checkpoint import list_checkpoints

CONTINUED_FROM, COMPARED = 10, 15  # steps
ONE = "rollout.engines=1"  # whichever engine writes a response, it is the same


@pytest.fixture(scope="module")
def killed(program):
    """The settings of ``synchronous`` but for an engine, and a driver killed after its second checkpoint; with
    what was left running.
    """
    run = Run(program, "killed", ONE)
    run.wait(lambda row: row["step"] >= 21)
    time.sleep(random.uniform(0, 1))  # anywhere in a step
    run.process.kill()
    run.process.wait()
    return run.directory, program.left_behind(grace_s=60)


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


def measured_before(directory):
    return summary_of(directory)["held_out"]["before"]


@pytest.fixture(scope="module")
def resumed(program, killed):
    """The same, continued, after its newest checkpoint lost its last byte."""
    directory, _ = killed
    older, newest = list_checkpoints(directory / "checkpoints")
    assert older.name == f"step-{CONTINUED_FROM:06d}"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("rb+") as file:
        file.truncate(largest.stat().st_size - 1)

    before = measured_before(directory)
    done = program.run(*program.train("killed", ONE), "--resume")
    assert measured_before(directory) == before, "the measurement before training is kept"

    return directory, done, older, newest


def test_nothing_outlives_a_driver_that_was_killed(killed):
    _, left = killed
    assert left == []


def test_the_newest_whole_checkpoint_is_resumed(resumed):
    directory, done, older, newest = resumed
    assert done.returncode == 0, done.stdout + done.stderr
    message = f"passing over {newest}: learner/"
    assert message in done.stdout.replace("\n", "")
    assert f"the newest that is whole is {older.name}" in done.stdout
    assert summary_of(directory)["status"] == "completed"
    checkpoints = directory / "checkpoints"
    names = [path.name for path in list_checkpoints(checkpoints)]
    assert names == ["step-000020", "step-000030"]
    assert len(list(checkpoints.iterdir())) == 2


def test_it_trains_every_number_once_in_order_and_the_same_tokens(resumed, synchronous):
    directory, undisturbed = resumed[0], synchronous[0]
    trained = read_rows(directory / "trained.jsonl")
    expected = read_rows(undisturbed / "trained.jsonl")
    assert len(trained) == 30
    for number, row in enumerate(trained):
        assert row["step"] == number + 1
        assert row["issues"] == list(range(8 * number, 8 * number + 8))

    # token by token, with the checksums of the responses
    assert trained[:COMPARED] == expected[:COMPARED]
    assert len({tuple(row["crc32"]) for row in trained}) == 30


def test_its_losses_are_those_of_an_undisturbed_run(resumed, synchronous):
    directory, undisturbed = resumed[0], synchronous[0]
    found = read_rows(directory / "metrics.jsonl")
    expected = read_rows(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 31))
    for name in (
        "eopd_loss",
        "eopd_grad_norm",
        "eopd_learning_rate",
        "eopd_response_tokens_total",
    ):
        ours = [row[name] for row in found[:COMPARED]]
        theirs = [row[name] for row in expected[:COMPARED]]
        assert ours == pytest.approx(theirs, abs=1e-3), name


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", tmp_path]
    mount = subprocess.run(command, capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a small disk needs root")

    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint(program, small_disk):
    settings = (
        "run.batches=50",
        "checkpoint.every=5",
        "evaluation.prompts=8",
        ONE,
        f"run.directory={small_disk}",
    )
    run = Run(program, "full", *settings)
    run.directory = small_disk / "full"
    run.wait(lambda row: row.get("eopd_checkpoint_step") == 5)
    # what a run writes beside its checkpoints has room
    free = shutil.disk_usage(small_disk).free - (1 << 19)
    (small_disk / "others").write_bytes(bytes(free))
    said = run.ended(1)

    checkpoints = run.directory / "checkpoints"
    message = said.splitlines()[-1]
    advice = "step-000005 is whole and kept. Free some space"
    assert message.startswith(f"error: {checkpoints}/step-000010 could not be written: ")
    assert f"bytes were free there. {advice}" in message
    assert "Traceback" not in said
    assert [path.name for path in checkpoints.iterdir()] == ["step-000005"]
    assert list_checkpoints(checkpoints)
    assert run.summary()["status"] == "failed"
    assert program.left_behind() == []
