"""A run whose driver is killed while it uploads a checkpoint, and whose run directory is gone, goes
on from S3: equal to the token.
"""

import shutil
import signal
import threading

import pytest
from program import Run, read_rows
from store import BUCKET, open_store

from eopd.run.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

UPLOAD = (f"run.upload=s3://{BUCKET}/runs", "rollout.engines=1")
COMPARED = 15  # steps, of which five were trained again
NAME = "elsewhere"


@pytest.fixture(scope="module")
def store():
    with open_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)

        yield store


@pytest.fixture(scope="module")
def killed(program, store):
    """A driver killed while it uploads the second file of step 20, and its directory removed."""
    under_way, gone, first = threading.Event(), threading.Event(), set()

    def look(method, path):
        if method != "PUT" or "step-000020/learner" not in path:
            return

        first.add(path)
        if len(first) > 1:
            under_way.set()
            gone.wait(60)

    store.before = look
    run = Run(program, NAME, *UPLOAD)
    assert under_way.wait(300), run.log.read_text()[-3000:]
    run.process.kill()
    run.process.wait()
    store.before = lambda method, path: None
    gone.set()
    assert program.left_behind(grace_s=60) == []

    trained = read_rows(run.directory / "trained.jsonl")
    shutil.rmtree(run.directory)
    return run.directory, trained


@pytest.fixture(scope="module")
def resumed(program, store, killed):
    directory, _ = killed
    assert store.whole_steps(f"runs/{NAME}") == [10]
    done = program.run(*program.train(NAME, *UPLOAD), "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done


def test_it_is_restored_and_says_so(resumed):
    said = (resumed[1].stdout + resumed[1].stderr).replace("\n", "")
    there = f"s3://{BUCKET}/runs/{NAME}"
    assert f"from {there}: step-000010, " in said
    assert f"passing over {there}/checkpoints/step-000020: manifest.json is missing" in said
    assert f"restored from {there}, up to step 10" in said
    assert "which did not leave in order" in said


def test_it_trains_every_number_once_and_the_same_tokens(resumed, killed):
    trained = read_rows(resumed[0] / "trained.jsonl")
    _, expected = killed
    assert [row["step"] for row in trained] == list(range(1, 31))
    issues = [issue for row in trained for issue in row["issues"]]
    assert issues == list(range(8 * 30))
    assert trained[:COMPARED] == expected[:COMPARED]


def test_all_of_it_is_there_at_the_end(resumed, store):
    directory, _ = resumed
    here = [path.name for path in list_checkpoints(directory / "checkpoints")]
    assert here == ["step-000020", "step-000030"]
    assert store.whole_steps(f"runs/{NAME}") == [20, 30]
    objects = store.objects()
    names = ["config.yaml", "metrics.jsonl", "report.html", "summary.json", "trained.jsonl"]
    names += [f"hf/{path.name}" for path in (directory / "hf").iterdir()]
    for name in names:
        assert objects[f"runs/{NAME}/{name}"] == (directory / name).read_bytes(), name

    row = read_rows(directory / "metrics.jsonl")[-1]
    assert row["eopd_uploaded_step"] in (10.0, 20.0)
    assert row["eopd_upload_failures_total"] == 0.0


def test_a_store_that_is_gone_at_the_end_is_a_warning(program, store):
    """The run is complete; what it wrote since is not there. A person ends the wait for it."""
    small = (*UPLOAD, "run.batches=3", "learner.ranks=1")
    run = Run(program, "alone", *small, "checkpoint.every=1")
    run.wait(lambda row: row["step"] >= 1)
    store.stop()
    try:
        run.says("Ctrl-C ends the wait", after=0)
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(timeout=60) == 0, run.log.read_text()[-3000:]
        said = run.log.read_text()
    finally:
        store.start()

    assert "trying again" in said
    assert "warning: run.upload: not up at " in said
    assert "--resume auto uploads it" in said

    done = program.run(*program.train("alone", *small), "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert store.whole_steps("runs/alone")[-1] == 3
    assert "runs/alone/hf/config.json" in store.objects()
