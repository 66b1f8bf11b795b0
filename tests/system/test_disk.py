"""A run whose disk is full."""

import shutil
import subprocess

import pytest
from program import Run

from eopd.run.checkpoint import list_checkpoints


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
        "rollout.engines=1",
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
    advice = "free some space. step-000005 is whole and kept"
    assert message.startswith(f"error: {checkpoints}/step-000010 could not be written: ")
    assert f"bytes were free there: {advice}" in message
    assert "Traceback" not in said
    assert [path.name for path in checkpoints.iterdir()] == ["step-000005"]
    assert list_checkpoints(checkpoints)
    assert run.summary()["status"] == "failed"
    assert program.left_behind() == []
