"""Uploads to a real S3 endpoint, which fails, disappears, or is slow."""

import shutil
import time

import fakes
import pytest
from store import BUCKET, open_store

from eopd.config import ConfigError, load_config
from eopd.run import upload
from eopd.run.checkpoint import list_checkpoints
from eopd.run.directory import RunDirectory
from eopd.run.elsewhere import require_upload
from eopd.run.lock import held
from eopd.run.progress import Progress
from eopd.run.restore import restore
from eopd.run.upload import Uploads

RUN = "some/folder/r"


@pytest.fixture(scope="module")
def server():
    with open_store() as store:
        yield store


@pytest.fixture
def store(server, monkeypatch):
    import fsspec

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    monkeypatch.setattr(upload, "FIRST_PAUSE_S", 0.05)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.clear()
    return server


@pytest.fixture
def config(tmp_path, store):
    path = fakes.write_config(tmp_path, batches=20)
    return load_config(path, [f"run.upload=s3://{BUCKET}/some/folder/"])


@pytest.fixture
def run(config):
    """A run under way, and its uploads."""
    with held(config.run.path):
        directory = RunDirectory.create(config)
        with Uploads(config, print) as uploads:
            uploads.start()
            yield directory, uploads


async def save(run, step, *, keep_last=1):
    directory, uploads = run
    progress = Progress(step=step)
    await fakes.write_checkpoint(
        directory.checkpoints,
        fakes.driver_state(step),
        fakes.save_weights,
        keep_last=keep_last,
        keep=uploads.needed,
    )
    directory.write_summary(progress.summary("running"))
    uploads.wake()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_up(run, step):
    return lambda: run[1].row().get("eopd_uploaded_step") == float(step)


async def test_no_reader_meets_a_manifest_without_its_files_or_no_checkpoint(run, store):
    """Whenever a request arrives, what is there is looked at."""
    seen = []

    def look(method, path):
        seen.append(store.whole_steps(RUN))  # raises where a file is missing
        return None

    store.before = look
    for step in range(1, 6):
        await save(run, step)
        wait_for(is_up(run, step))
        wait_for(lambda step=step: store.whole_steps(RUN) == [step])

    first = next(number for number, steps in enumerate(seen) if steps)
    assert all(seen[first:])
    assert [1, 2] in seen
    assert [4, 5] in seen


async def test_a_store_that_fails_for_a_while_is_tried_again(run, store):
    asked = []
    store.before = lambda method, path: "503 Slow Down" if not asked.append(path) else None
    await save(run, 1)
    wait_for(lambda: run[1].row()["eopd_upload_failures_total"] >= 2)
    store.before = lambda method, path: "500 Oh" if path.endswith("weights") else None
    failures = run[1].row()["eopd_upload_failures_total"]
    wait_for(lambda: run[1].row()["eopd_upload_failures_total"] > failures)
    assert store.whole_steps(RUN) == []

    store.before = lambda method, path: None
    wait_for(is_up(run, 1))
    assert store.whole_steps(RUN) == [1]


async def test_a_store_that_disappears_and_comes_back_gets_the_newest(run, store):
    await save(run, 1)
    wait_for(is_up(run, 1))
    store.stop()
    for step in (2, 3):
        await save(run, step)

    wait_for(lambda: run[1].row()["eopd_upload_failures_total"] >= 2)
    store.start()
    wait_for(lambda: store.whole_steps(RUN) == [3])
    assert is_up(run, 3)()


async def test_the_newest_checkpoint_goes_first(run, store):
    store.before = lambda method, path: "503 Slow Down"
    for step in (1, 2):
        await save(run, step, keep_last=2)

    store.requests.clear()
    store.before = lambda method, path: None
    wait_for(lambda: store.whole_steps(RUN) == [1, 2])
    manifests = [
        path for method, path in store.requests if method == "PUT" and "manifest.json" in path
    ]
    folder = f"/{BUCKET}/{RUN}/checkpoints"
    assert manifests == [f"{folder}/step-00000{step}/manifest.json" for step in (2, 1)]


async def test_the_newest_that_is_there_stays_until_a_newer_one_is(run, store):
    """Also where an older one is kept here for longer, and is there."""
    seen = []
    for step in (1, 2):
        await save(run, step, keep_last=2)

    wait_for(lambda: store.whole_steps(RUN) == [1, 2])
    store.before = lambda method, path: seen.append(store.whole_steps(RUN)) or time.sleep(0.1)
    await save(run, 3, keep_last=9)
    shutil.rmtree(run[0].checkpoints / "step-000002")
    wait_for(lambda: store.whole_steps(RUN) == [1, 3])
    assert [1, 2] in seen
    assert all(steps[-1] >= 2 for steps in seen)


async def test_a_slow_store_gets_whole_checkpoints_and_holds_nobody_up(run, store):
    """The checkpoint that is under way stays until it is up, though newer ones are written."""
    weights = []

    def slowly(method, path):
        if path.endswith("learner/weights"):
            weights.append(path)
            time.sleep(1.0)

    store.before = slowly
    await save(run, 1)
    wait_for(lambda: weights)
    started = time.monotonic()
    for step in (2, 3, 4):
        await save(run, step)

    assert time.monotonic() - started < 0.9, "saving waits for no upload"
    kept = [path.name for path in list_checkpoints(run[0].checkpoints)]
    assert kept == ["step-000001", "step-000004"]
    wait_for(is_up(run, 1))
    wait_for(is_up(run, 4))
    assert all("step-000002" not in path and "step-000003" not in path for path in weights)
    await save(run, 5)
    assert [path.name for path in list_checkpoints(run[0].checkpoints)][-1] == "step-000005"


async def test_files_of_several_parts_come_back_as_they_were(run, store, tmp_path):
    """A file above twice s3fs' part of 50 MiB is uploaded in parts."""
    directory, _ = run
    content = bytes(range(256)) * (110 << 12)
    (directory.path / ".large.bin").write_bytes(content)
    (directory.path / ".large.bin").rename(directory.path / "large.bin")
    await save(run, 1)
    wait_for(is_up(run, 1))
    parts = [path for method, path in store.requests if method == "PUT" and path.endswith("bin")]
    assert len(parts) == 3
    assert store.objects()[f"{RUN}/large.bin"] == content

    other = load_config(
        tmp_path / "c.yaml",
        [f"run.upload=s3://{BUCKET}/some/folder", f"run.directory={tmp_path}/other"],
    )
    with held(other.run.path):
        restore(other, "auto", print)

    assert (tmp_path / "other/r/large.bin").read_bytes() == content


# --- before anything starts


def refused(config):
    with pytest.raises(ConfigError) as caught:
        require_upload(config.run)

    message = str(caught.value)
    assert message.startswith("run.upload: s3://")
    assert "\n" not in message
    return message


def test_a_bucket_that_is_missing_is_one_message(config, tmp_path):
    other = load_config(tmp_path / "c.yaml", ["run.upload=s3://nowhere/x"])
    message = refused(other)
    assert "s3://nowhere/x/r cannot be written: The specified bucket does not exist" in message
    assert "Make the bucket or the folder first" in message


def test_credentials_that_are_refused_are_one_message(config, store):
    store.before = lambda method, path: "403 Forbidden"
    assert "Give credentials that may write, read, list and delete there" in refused(config)


def test_credentials_that_are_missing_are_one_message(config, monkeypatch):
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "Unable to locate credentials" in refused(config)


def test_nobody_who_answers_is_one_message_soon(config, store):
    store.stop()
    started = time.monotonic()
    try:
        assert "Could not connect to the endpoint URL" in refused(config)
        assert time.monotonic() - started < 15.0
    finally:
        store.start()


def test_a_probe_is_removed(config, store):
    require_upload(config.run)
    assert store.objects() == {}
    methods = [method for method, path in store.requests if ".eopd-check-" in path]
    assert methods == ["PUT", "DELETE"]
